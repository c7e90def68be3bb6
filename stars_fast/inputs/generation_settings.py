"""What becomes of each field of a GenerationConfig: one place for the engine, the drop-in and TRL's rollouts."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import LogitsProcessorList, SynthIDTextWatermarkingConfig

from stars_fast.inputs.processors import foreign_processors, row_processor
from stars_fast.inputs.sampling import SAMPLING_FIELDS
from stars_fast.loop.request import StopTest
from stars_fast.notices import warn
from stars_fast.policy.leaf import RowProcessor, Sampling
from stars_fast.tree.support import is_encoder_decoder, written

# Fields that hold where nothing above them sets the same: StarsConfig, or what a transformers call itself sets.
APPLIED = frozenset(
    {*SAMPLING_FIELDS, "eos_token_id", "pad_token_id", "stop_strings", "max_time"}
    # of a transformers call alone: StarsConfig has lengths and counts of its own
    | {"max_length", "max_new_tokens", "num_return_sequences", "return_dict_in_generate"}
)
# By transformers' own logits processors, row by row.
PROCESSED = frozenset(
    {"bad_words_ids", "begin_suppress_tokens", "suppress_tokens", "sequence_bias", "renormalize_logits"}
    | {"min_length", "min_new_tokens", "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id"}
    | {"no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "remove_invalid_values"}
    | {"typical_p", "top_h", "epsilon_cutoff", "eta_cutoff", "watermarking_config"}
)
# Not applied, and named: other ways of decoding, and what would change the prompt. Field -> the value that is none.
NAMED: dict[str, Any] = {
    "constraints": None,
    "diversity_penalty": 0.0,
    "dola_layers": None,
    "force_words_ids": None,
    "guidance_scale": 1,
    "num_beam_groups": 1,
    "num_beams": 1,
    "token_healing": False,
}
# Fields that no answer depends on: how a cache is kept or text is drafted, what a call returns, parameters of ways of
# decoding that are named above or that sampling does not have, ids that begin a text.
HARMLESS = frozenset(
    {"use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size", "low_memory"}
    | {"compile_config", "disable_compile", "continuous_batching_config", "transformers_version"}
    | {"output_attentions", "output_hidden_states", "output_scores", "output_logits"}
    | {"use_mtp", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "speculation_type"}
    | {"assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind", "target_lookbehind"}
    | {"assistant_ensemble_weight", "prompt_lookup_num_tokens", "max_matching_ngram_size"}
    | {"do_sample", "early_stopping", "length_penalty", "penalty_alpha", "bos_token_id", "decoder_start_token_id"}
)


def set_fields(generation_config: GenerationConfig) -> dict[str, Any]:
    """Fields of transformers that a generation_config sets to something, by name."""
    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    defaults = GenerationConfig._get_default_generation_params() | NAMED
    return {
        name: value
        for name, value in vars(generation_config).items()
        if name in known and value is not None and value != defaults.get(name)
    }


def unapplied(generation_config: GenerationConfig) -> dict[str, Any]:
    """Set fields that guidance does not apply, by name: those it knows, and any that a newer transformers has."""
    applied = APPLIED | PROCESSED | HARMLESS
    return {
        name: value
        for name, value in set_fields(generation_config).items()
        if name not in applied or isinstance(value, SynthIDTextWatermarkingConfig)
    }


def warn_of_unapplied(generation_config: GenerationConfig) -> None:
    """Name what is set and not applied."""
    if ignored := unapplied(generation_config):
        settings = ", ".join(f"{name}={value!r:.60}" for name, value in ignored.items())
        warn(
            f"the generation_config sets {settings}, which guidance does not apply: answers are sampled without "
            "(set it to None to say so)"
        )


def row_processors(
    own: GenerationConfig,
    model: PreTrainedModel,
    sampling: Sampling,
    max_new_tokens: int,
    prompts: Sequence[Sequence[int]],
    read: Sequence[Sequence[int]],
) -> tuple[Sampling, Sequence[RowProcessor | None]]:
    """transformers' logits processors for what a generation_config sets beyond ``sampling``, as functions of a row.

    Answers go on from ``prompts``; what was ``read`` is the same, but for an encoder-decoder.

    Returns
    -------
    Sampling
        What is left to the decode step: all of it, or, where processors come between its filters, EOS ids alone.
    sequence of RowProcessor or None
        One per prompt.
    """
    fields = set_fields(own).keys() & PROCESSED
    if is_encoder_decoder(model):
        fields -= {"forced_bos_token_id"}  # the prompts have it
    if not fields:
        return sampling, [None] * len(prompts)
    made, size = _prepared(own, model, sampling), written(model)
    device, rest, processors = next(model.parameters()).device, sampling, list[RowProcessor | None]()
    for prompt, source in zip(prompts, read, strict=True):
        ids, encoded = (torch.tensor([one], device=device, dtype=torch.int64) for one in (prompt, source))
        made.max_length = len(prompt) + max_new_tokens
        foreign = foreign_processors(_made_of(made, model, ids, encoded), made, ids, size)
        processors.append(None if foreign is None else row_processor(foreign.processors, ids, None, 0))
        if foreign is not None and foreign.whole:
            rest = Sampling(eos_token_ids=sampling.eos_token_ids)
    return rest, processors


def _prepared(own: GenerationConfig, model: PreTrainedModel, sampling: Sampling) -> GenerationConfig:
    """What transformers would make processors from: with ``sampling``, and without what is not applied."""
    made = copy.deepcopy(own)
    for name in (*NAMED, *unapplied(own)):
        setattr(made, name, NAMED.get(name))
    for name in SAMPLING_FIELDS:
        setattr(made, name, getattr(sampling, name))
    made.do_sample, made.num_return_sequences, eos = True, 1, sampling.eos_token_ids
    made._eos_token_tensor = torch.tensor(eos, device=next(model.parameters()).device) if eos else None
    if not eos:
        made.exponential_decay_length_penalty = None  # of the end of a text, which nothing ends
    return made


def _made_of(
    made: GenerationConfig, model: PreTrainedModel, ids: torch.Tensor, encoded: torch.Tensor
) -> LogitsProcessorList:
    """transformers' list for an answer behind ``ids`` ``[1, length]`` to what was ``encoded`` ``[1, length]``."""
    try:
        processors: LogitsProcessorList = cast(Any, model)._get_logits_processor(
            made, input_ids_seq_length=ids.shape[1], encoder_input_ids=encoded, device=ids.device
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"the model's generation_config: {error}") from error
    return processors


def time_limit(generation_config: GenerationConfig) -> StopTest | None:
    """A test whether ``max_time`` seconds have passed from now on."""
    seconds = getattr(generation_config, "max_time", None)
    if seconds is None:
        return None
    end = time.monotonic() + seconds
    return lambda tokens: time.monotonic() > end

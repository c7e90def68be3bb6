"""Logits processors, stopping criteria and stop strings, applied to one row at a time.

Rows fork, and candidates of several requests share a step, so a processor that was built for a batch sees its own row
only. What the engine does itself is taken out; anything else in the list, and the whole list runs per row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from transformers import GenerationConfig
from transformers.generation import (
    EosTokenCriteria,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinPLogitsWarper,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from stars_fast.loop.request import StopTest
from stars_fast.policy.leaf import RowProcessor
from stars_fast.text.decode import CONTEXT_TOKENS, continuation

# Class -> the attribute that holds its setting, which is the generation_config's field of the same meaning.
_NATIVE = {
    RepetitionPenaltyLogitsProcessor: ("penalty", "repetition_penalty"),
    TemperatureLogitsWarper: ("temperature", "temperature"),
    TopKLogitsWarper: ("top_k", "top_k"),
    TopPLogitsWarper: ("top_p", "top_p"),
    MinPLogitsWarper: ("min_p", "min_p"),
}
_STATEFUL = (SynthIDTextWatermarkLogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor)


def foreign_processors(
    processors: LogitsProcessorList | None, generation_config: GenerationConfig
) -> LogitsProcessorList | None:
    """The whole list if anything in it is not what the engine does itself for this configuration, else None.

    Raises
    ------
    ValueError
        For a processor that keeps a state of the one text it follows.
    """
    if not processors:
        return None
    for processor in processors:
        if isinstance(processor, _STATEFUL):
            raise ValueError(
                f"{type(processor).__name__} keeps a state of the text it follows, which candidates side by side "
                "would mix up"
            )
    kinds = {type(processor) for processor in processors}
    if len(kinds) == len(processors) and all(_is_native(processor, generation_config) for processor in processors):
        return None
    return processors


def _is_native(processor: LogitsProcessor, generation_config: GenerationConfig) -> bool:
    """Whether transformers made it from the generation_config; a user's own may hold another value."""
    if type(processor) not in _NATIVE:
        return False
    attribute, setting = _NATIVE[type(processor)]
    own_rules = getattr(processor, "min_tokens_to_keep", 1) != 1 or isinstance(
        getattr(processor, "prompt_ignore_length", None), int
    )
    return not own_rules and getattr(processor, attribute) == getattr(generation_config, setting, None)


def row_processor(
    processors: LogitsProcessorList, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, row: int
) -> RowProcessor:
    """The list as a function of one row's tokens. What it knows of the batch becomes what it knows of this row."""
    prompt = input_ids[row]
    padding = 0 if attention_mask is None else int((attention_mask[row] != 0).int().argmax())
    own = LogitsProcessorList()
    for processor in processors:
        if isinstance(processor, RepetitionPenaltyLogitsProcessor) and not isinstance(
            processor.prompt_ignore_length, int
        ):
            processor = RepetitionPenaltyLogitsProcessor(processor.penalty, prompt_ignore_length=padding)
        elif isinstance(processor, PrefixConstrainedLogitsProcessor):
            processor = PrefixConstrainedLogitsProcessor(_for_row(processor._prefix_allowed_tokens_fn, row), 1)
        own.append(processor)

    def process(tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
        ids = torch.cat([prompt, prompt.new_tensor(tokens)])[None]
        return own(cast(torch.LongTensor, ids), cast(torch.FloatTensor, logits))

    return process


def _for_row(allowed: Callable[[int, torch.Tensor], list[int]], row: int) -> Callable[[int, torch.Tensor], list[int]]:
    return lambda _, ids: allowed(row, ids)


def row_stop(
    criteria: StoppingCriteriaList | None, generation_config: GenerationConfig, prompt: torch.Tensor
) -> StopTest | None:
    """The user's criteria on one row. The call's length and EOS are the engine's own."""
    own = [c for c in criteria or [] if not _is_the_calls_own(c, generation_config)]
    if not own:
        return None

    def ends(tokens: list[int]) -> bool:
        ids = torch.cat([prompt, prompt.new_tensor(tokens)])[None]
        return any([_is_met(criterion, ids) for criterion in own])  # all are asked: they may count

    return ends


def _is_met(criterion: StoppingCriteria, ids: torch.Tensor) -> bool:
    try:
        return bool(criterion(cast(torch.LongTensor, ids), cast(Any, None)))
    except Exception as error:
        raise RuntimeError(
            f"the stopping criterion {type(criterion).__name__} raised {type(error).__name__}: {error}; criteria get "
            "the ids of one row and no scores (None)"
        ) from error


def _is_the_calls_own(criterion: StoppingCriteria, generation_config: GenerationConfig) -> bool:
    if type(criterion) is MaxLengthCriteria:
        return criterion.max_length == generation_config.max_length
    if type(criterion) is EosTokenCriteria:
        eos = generation_config._eos_token_tensor
        return eos is not None and set(criterion.eos_token_id.tolist()) == set(eos.tolist())
    return False


def stop_test(stop_strings: str | Sequence[str] | None, tokenizer: Any, prompt: Sequence[int] = ()) -> StopTest | None:
    """A test whether the text of a completion, asked about after every token, has come to contain a stop string.

    Parameters
    ----------
    stop_strings : str or sequence of str, optional
    tokenizer
        The policy's.
    prompt : sequence of int
        Ids that the completion goes on from. Stop strings are not sought in them.

    Raises
    ------
    ValueError
        For stop strings without a tokenizer.
    """
    if not stop_strings:
        return None
    if tokenizer is None:
        raise ValueError(
            f"stop_strings={stop_strings!r} needs a tokenizer: pass tokenizer= to StarsEngine, stars_fast.generate or "
            "decoding"
        )
    strings = (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings)
    most = max(len(string.encode()) for string in strings) + CONTEXT_TOKENS  # a token has a byte at least

    def ends(tokens: list[int]) -> bool:
        text = None
        for size in range(most, most + 4):  # further where the cut goes through a character, of four bytes at most
            if text is None and size < len(tokens):
                text = continuation(tokenizer, tokens[:-size], tokens[-size:], skip_special_tokens=False)
        if text is None:
            text = continuation(tokenizer, prompt, tokens, skip_special_tokens=False)
        if text is None:
            text = tokenizer.decode(tokens, skip_special_tokens=False)
        return any(string in text for string in strings)

    return ends

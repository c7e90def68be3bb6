"""Drop-in for ``model.generate``: the same arguments, plus a reward model."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput, LogitsProcessorList, StoppingCriteriaList

from stars_fast.config import StarsConfig
from stars_fast.engine import StarsEngine
from stars_fast.inputs.arguments import Arguments
from stars_fast.inputs.hooks import foreign_processors, row_processor, row_stop
from stars_fast.inputs.sampling import NEUTRAL, SAMPLING_FIELDS
from stars_fast.outputs import StarsOutput

_CACHES = ("past_key_values", "cache")  # until transformers 5.23, and from 5.24 on
# What transformers hands to every decoding loop.
_PREPARED = ("attention_mask", "position_ids", *_CACHES, "use_cache", "logits_to_keep", "cache_position")
_ENGINE_ARGUMENTS = (
    "reward_tokenizer",
    "reward_tail",
    "max_rows",
    "kv_cache_tokens",
    "gpu_memory_utilization",
    "cuda_graphs",
    "torch_compile",
)
_SETTINGS = {field.name for field in dataclasses.fields(StarsConfig)}


@dataclass
class StarsGenerateOutput(GenerateDecoderOnlyOutput):
    """transformers' output of ``generate`` with what guidance adds.

    Attributes
    ----------
    rewards : torch.FloatTensor
        ``[batch * num_return_sequences]``, of what was returned.
    stats : dict
        As in :class:`StarsOutput`.
    """

    rewards: torch.FloatTensor | None = None
    stats: dict[str, Any] | None = None


def generate(
    model: PreTrainedModel,
    inputs: torch.Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    reward_model: Any,
    stars_config: StarsConfig | None = None,
    streamer: Any = None,
    tokenizer: Any = None,
    reward_tokenizer: Any = None,
    reward_tail: str | Sequence[int] = "auto",
    reward_prompts: Any = None,
    columns: dict[str, Sequence[Any]] | None = None,
    seed: int | Sequence[int] | None = None,
    max_rows: int | None = None,
    kv_cache_tokens: int | None = None,
    **kwargs: Any,
) -> torch.LongTensor | StarsGenerateOutput:
    """``model.generate(...)`` with guidance: takes what it takes, returns what it returns.

    Parameters
    ----------
    model : transformers causal LM
    inputs, generation_config, **kwargs
        As for ``model.generate``. Its generation_config is honoured, transformers' default of ``top_k=50`` included.
        ``do_sample`` unset means True. What is set here wins over ``stars_config``, which wins over what the model
        brings. Ids and their mask only: no embeddings, no cache, no images.
    reward_model : as ``reward`` of :class:`StarsEngine`
    stars_config : StarsConfig, optional
    streamer : transformers streamer, optional
    tokenizer : transformers tokenizer, optional
        For stop strings and for rewards of text.
    reward_tokenizer, reward_tail, max_rows, kv_cache_tokens : as in :class:`StarsEngine`
        So are ``gpu_memory_utilization``, ``cuda_graphs`` and ``torch_compile`` (here False by default).
    reward_prompts, columns, seed : as in :meth:`StarsEngine.generate`

    Returns
    -------
    torch.Tensor or StarsGenerateOutput
        Ids ``[batch * num_return_sequences, length]``, prompt included; the output object with
        ``return_dict_in_generate``.

    Raises
    ------
    ValueError
        For greedy decoding, beams, assistants, and whatever :meth:`StarsEngine.generate` refuses.
    """
    config = _with_methods_sampling(stars_config or StarsConfig())
    engine = {name: kwargs.pop(name) for name in _ENGINE_ARGUMENTS if name in kwargs}
    for name in _SETTINGS - vars(GenerationConfig()).keys():  # those that transformers does not know
        if name in kwargs:
            raise _misplaced(name, kwargs[name])
    explicit = _explicit_settings(generation_config, kwargs)
    if explicit.get("do_sample") is False:
        raise ValueError("do_sample=False: reward-guided decoding samples; leave do_sample unset or pass True")
    for name in ("assistant_model", "prompt_lookup_num_tokens"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{name} is set: assisted decoding and reward-guided decoding cannot be combined")
    settings: dict[str, Any] = {}  # what the call leaves open
    if explicit.get("do_sample") is None:
        settings["do_sample"] = True
    explicit |= _models_own(model, config)
    if explicit.get("max_new_tokens") is None and explicit.get("max_length") is None:
        settings["max_new_tokens"] = config.max_new_tokens
    if explicit.get("num_return_sequences") is None:
        settings["num_return_sequences"] = config.num_return_sequences
    for name in ("inputs_embeds", "position_ids", *_CACHES):
        if kwargs.get(name) is not None:
            raise ValueError(f"{name} is given: reward-guided decoding starts from token ids alone")
    for name in (*SAMPLING_FIELDS, "eos_token_id"):
        value = getattr(config, name)
        if explicit.get(name) is None and value is not None:
            settings[name] = list(value) if isinstance(value, tuple) else value
    stop_strings = kwargs.pop("stop_strings", None) or explicit.get("stop_strings")
    if stop_strings is not None:
        config = config.replace(stop_strings=stop_strings)
    if generation_config is None:
        kwargs |= settings
    else:  # transformers wants no settings beside one
        generation_config = copy.deepcopy(generation_config)
        for name, value in {**settings, "stop_strings": None}.items():
            setattr(generation_config, name, value)
            kwargs.pop(name, None)
    decoder = _Decoder(
        reward_model,
        config,
        explicit=set(explicit),
        tokenizer=tokenizer,
        streamer=streamer,
        engine={
            "reward_tokenizer": reward_tokenizer,
            "reward_tail": reward_tail,
            "max_rows": max_rows,
            "kv_cache_tokens": kv_cache_tokens,
            **engine,
        },
        call={"reward_prompts": reward_prompts, "columns": columns, "seed": seed},
    )
    out = GenerationMixin.generate(cast(Any, model), inputs, generation_config, custom_generate=decoder, **kwargs)
    return cast("torch.LongTensor | StarsGenerateOutput", out)


def decoding(
    reward_model: Any,
    stars_config: StarsConfig | None = None,
    *,
    tokenizer: Any = None,
    streamer: Any = None,
    **options: Any,
) -> Callable[..., torch.LongTensor | StarsGenerateOutput]:
    """A decoding method: ``model.generate(**inputs, do_sample=True, custom_generate=decoding(reward_model, config))``.

    Parameters
    ----------
    reward_model, stars_config : as for :func:`generate`
    tokenizer, streamer : optional
        transformers hands neither its tokenizer nor its streamer to a custom method: pass them here, and stop strings
        in ``stars_config``.
    **options
        ``reward_tokenizer``, ``reward_tail``, ``max_rows``, ``kv_cache_tokens``, ``gpu_memory_utilization``,
        ``cuda_graphs``, ``torch_compile`` (here False by default) of :class:`StarsEngine`; ``seed``,
        ``reward_prompts``, ``columns`` of :meth:`StarsEngine.generate`.

    Notes
    -----
    A setting counts as the call's own where it differs from what the model's generation_config would have given.
    """
    known = {*_ENGINE_ARGUMENTS, "seed", "reward_prompts", "columns"}
    for name, value in options.items():
        if name in _SETTINGS:
            raise _misplaced(name, value)
        if name not in known:
            raise TypeError(f"{name!r} is not an option of decoding; the options are {', '.join(sorted(known))}")
    engine = {name: options.pop(name) for name in _ENGINE_ARGUMENTS if name in options}
    config = _with_methods_sampling(stars_config or StarsConfig())
    return _Decoder(
        reward_model, config, explicit=None, tokenizer=tokenizer, streamer=streamer, engine=engine, call=options
    )


def _misplaced(name: str, value: Any) -> TypeError:
    return TypeError(f"{name} is a setting of StarsConfig: pass stars_config=StarsConfig({name}={value!r:.80})")


def _with_methods_sampling(config: StarsConfig) -> StarsConfig:
    """Sampling settings of its own that a method has, such as CARDS' top_k, win over what the model brings."""
    ruled = config.chosen_method.rule(config)
    return config.replace(**{name: getattr(ruled, name) for name in SAMPLING_FIELDS})


def _explicit_settings(generation_config: GenerationConfig | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What the transformers call itself sets, by keyword or by a generation_config of its own."""
    given = {} if generation_config is None else generation_config.to_dict()
    return {name: value for name, value in {**given, **kwargs}.items() if value is not None}


def _models_own(model: PreTrainedModel, config: StarsConfig) -> dict[str, Any]:
    """Lengths and counts that the model's generation_config sets, where the StarsConfig leaves its defaults."""
    own, default = model.generation_config, StarsConfig()
    names = []
    if config.max_new_tokens == default.max_new_tokens:
        names += ["max_new_tokens", "max_length"]
    if config.num_return_sequences == default.num_return_sequences:
        names.append("num_return_sequences")
    values = {name: getattr(own, name, None) for name in names}
    return {name: value for name, value in values.items() if value is not None}


class _Decoder:
    """The callable that transformers runs in place of its own decoding loop."""

    def __init__(
        self,
        reward_model: Any,
        config: StarsConfig,
        *,
        explicit: set[str] | None,  # None: not known, to be told from the prepared generation_config
        tokenizer: Any,
        streamer: Any,
        engine: dict[str, Any],
        call: dict[str, Any],
    ) -> None:
        self.reward_model, self.config, self.explicit = reward_model, config, explicit
        self.tokenizer, self.streamer, self.engine, self.call = tokenizer, streamer, engine, call

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        generation_config: GenerationConfig | None = None,
        **model_kwargs: Any,
    ) -> torch.LongTensor | StarsGenerateOutput:
        assert generation_config is not None
        _refuse(generation_config)
        samples = generation_config.num_return_sequences or 1
        _refuse_inputs(model_kwargs)
        explicit = self.explicit
        if explicit is None:
            explicit = _differing(model, generation_config, input_ids.shape[1]) | _models_own(model, self.config).keys()
        config = self._merge(generation_config, explicit, input_ids.shape[1])
        mask = model_kwargs.get("attention_mask")
        processors = foreign_processors(logits_processor, generation_config)
        if processors is not None:
            _check_in_force(config, generation_config)
            config = config.replace(**NEUTRAL)
        arguments = Arguments(
            input_ids[::samples].cpu(),
            config,
            attention_mask=None if mask is None else mask[::samples].cpu(),
            on_error="raise",
            processor=lambda row: None if processors is None else row_processor(processors, input_ids, mask, row),
            stop=lambda row: row_stop(stopping_criteria, generation_config, input_ids[row]),
            **self.call,
        )
        # An engine of one call: what compiling costs, it would not earn back.
        engine = StarsEngine(
            model, self.reward_model, tokenizer=self.tokenizer, **{"torch_compile": False, **self.engine}
        )
        out = engine.run(arguments, self.streamer)
        return self._as_transformers(out, input_ids, model, generation_config)

    def _merge(self, generation_config: GenerationConfig, explicit: set[str], prompt_length: int) -> StarsConfig:
        """Settings of the transformers call over those of the StarsConfig, over the model's."""
        values: dict[str, Any] = {"num_return_sequences": generation_config.num_return_sequences or 1}
        for name in SAMPLING_FIELDS:
            value = getattr(generation_config, name, None)
            if value is not None and (name in explicit or getattr(self.config, name) is None):
                values[name] = value
        if "eos_token_id" in explicit or self.config.eos_token_id is None:
            eos = generation_config._eos_token_tensor
            values["eos_token_id"] = None if eos is None else tuple(eos.tolist())
            if eos is None:
                values["ignore_eos"] = True
        if explicit & {"max_new_tokens", "max_length"}:
            values["max_new_tokens"] = max(generation_config.max_length - prompt_length, 1)
        if "stop_strings" in explicit and generation_config.stop_strings is not None:
            values["stop_strings"] = generation_config.stop_strings
        return self.config.replace(**values)

    def _as_transformers(
        self, out: StarsOutput, input_ids: torch.Tensor, model: PreTrainedModel, generation_config: GenerationConfig
    ) -> torch.LongTensor | StarsGenerateOutput:
        """Prompts as they came (padding on the left kept), completions behind them, padded on the right."""
        pad = generation_config._pad_token_tensor
        width = max(len(completion) for completion in out.completions)
        tail = input_ids.new_full((len(out.completions), width), 0 if pad is None else int(pad))
        for row, completion in enumerate(out.completions):
            tail[row, : len(completion)] = torch.tensor(completion, dtype=tail.dtype)
        sequences = cast(torch.LongTensor, torch.cat([input_ids, tail], dim=1))
        if not generation_config.return_dict_in_generate:
            return sequences
        return StarsGenerateOutput(
            sequences=sequences,
            rewards=cast(torch.FloatTensor, torch.tensor(out.rewards, dtype=torch.float32, device=sequences.device)),
            stats=out.stats,
        )


def _refuse(generation_config: GenerationConfig) -> None:
    """Modes of ``generate`` that guidance cannot have."""
    beams = generation_config.num_beams or 1
    if beams > 1:
        raise ValueError(f"num_beams={beams}: beam search and reward-guided decoding cannot be combined")
    if getattr(generation_config, "prompt_lookup_num_tokens", None) or getattr(generation_config, "is_assistant", None):
        raise ValueError("prompt_lookup_num_tokens is set: assisted decoding cannot be combined with guidance")
    if not generation_config.do_sample:
        raise ValueError("do_sample=False: reward-guided decoding samples; pass do_sample=True")
    for name in ("dola_layers", "constraints", "force_words_ids"):
        if getattr(generation_config, name, None) is not None:
            raise ValueError(f"{name} asks for another way of decoding: it cannot be combined with guidance")
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(generation_config, name, False):
            raise ValueError(f"{name}=True is not supported: use StarsEngine, whose output has log-probabilities")


def _refuse_inputs(model_kwargs: dict[str, Any]) -> None:
    """Anything to start from besides ids and their mask. transformers itself adds what is let through here."""
    for name in _CACHES:
        if model_kwargs.get(name) is not None and model_kwargs[name].get_seq_length():
            raise ValueError(f"{name} holds tokens: reward-guided decoding starts from token ids alone")
    for name, value in model_kwargs.items():
        if value is not None and name not in _PREPARED:
            raise ValueError(f"{name} is given: reward-guided decoding starts from token ids alone")


def _check_in_force(config: StarsConfig, generation_config: GenerationConfig) -> None:
    """A list of processors that transformers has built already cannot take settings of the StarsConfig any more."""
    for name, neutral in NEUTRAL.items():
        value, built = getattr(config, name), getattr(generation_config, name, None)
        if value is not None and value != (neutral if built is None else built):
            raise ValueError(
                f"{name}={value!r} of the StarsConfig comes too late for the logits processors of this call: "
                f"pass {name} to model.generate, or use stars_fast.generate"
            )


def _differing(model: PreTrainedModel, generation_config: GenerationConfig, prompt_length: int) -> set[str]:
    """Settings that the model's own generation_config and transformers' defaults do not explain."""
    own, defaults = model.generation_config, generation_config._get_default_generation_params()
    differing = set()
    for name in (field.name for field in dataclasses.fields(StarsConfig)):
        value = getattr(generation_config, name, None)
        expected = getattr(own, name, None)
        expected = defaults.get(name) if expected is None else expected
        if value is not None and value != expected:
            differing.add(name)
    # By now transformers has put the prompt's length on top of its default.
    unset = (own.max_length, defaults["max_length"] + prompt_length)
    if generation_config.max_new_tokens is None and generation_config.max_length not in unset:
        differing.add("max_length")
    return differing

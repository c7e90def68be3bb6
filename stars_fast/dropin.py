"""Drop-in for ``model.generate``: the same arguments, plus a reward model."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType, MethodType
from typing import Any, cast

import torch
import transformers
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput, LogitsProcessorList, StoppingCriteriaList

from stars_fast.config import StarsConfig
from stars_fast.engine import StarsEngine
from stars_fast.inputs import transformers_call
from stars_fast.inputs.arguments import Arguments
from stars_fast.inputs.hooks import row_stop
from stars_fast.inputs.outcome import first_error
from stars_fast.inputs.processors import foreign_processors, row_processor
from stars_fast.inputs.sampling import NEUTRAL
from stars_fast.locks import Lock
from stars_fast.loop.stream import Streaming
from stars_fast.methods.numbers import plain, shown
from stars_fast.notices import warn
from stars_fast.outputs import StarsOutput
from stars_fast.policy.leaf import RowProcessor
from stars_fast.tree.support import written

_ENGINE_OPTIONS = {
    name
    for name, parameter in inspect.signature(StarsEngine.__init__).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
}
_KEPT = "_stars_fast_engine"  # attribute of a policy
_making = Lock()


@dataclass
class StarsGenerateOutput(GenerateDecoderOnlyOutput):
    """transformers' output of ``generate`` with what guidance adds.

    Attributes
    ----------
    rewards : torch.FloatTensor
        ``[batch * num_return_sequences]``, of what was returned; NaN for a row that failed.
    errors : list of str or None
        Why a row failed. What it had by then is in ``sequences``.
    stats : dict
        As in :class:`StarsOutput`.
    """

    rewards: torch.FloatTensor | None = None
    stats: dict[str, Any] | None = None
    errors: list[str | None] | None = None


def generate(
    model: PreTrainedModel,
    inputs: torch.Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    reward_model: Any,
    stars_config: StarsConfig | None = None,
    streamer: Any = None,
    tokenizer: Any = None,
    reward_prompts: Any = None,
    columns: dict[str, Sequence[Any]] | None = None,
    seed: int | Sequence[int] | None = None,
    on_error: str = "return",
    **kwargs: Any,
) -> torch.LongTensor | StarsGenerateOutput:
    """``model.generate(...)`` with guidance: takes what it takes, returns what it returns.

    Parameters
    ----------
    model : transformers causal LM
    inputs, generation_config
        As for ``model.generate``. Its generation_config is honoured, transformers' default of ``top_k=50`` included.
        ``do_sample`` unset means True. What is set here wins over ``stars_config``, which wins over what the model
        brings. Ids and their mask, with what a processor made beside them of pictures (``pixel_values`` and whatever
        else the model's ``forward`` names): no embeddings, no cache.
    reward_model : as ``reward`` of :class:`StarsEngine`
    stars_config : StarsConfig, optional
    streamer : transformers streamer, optional
    tokenizer : transformers tokenizer, optional
        For stop strings and for rewards of text.
    reward_prompts, columns, seed : as in :meth:`StarsEngine.generate`
    on_error : {"return", "raise"}
        Whether rows that fail are returned as far as they came, beside those that did not, with a warning, or the first
        one's error is raised.
    **kwargs
        What ``model.generate`` takes, and options of :class:`StarsEngine`, such as ``reward_tokenizer`` and
        ``max_rows`` (``torch_compile`` is False here by default).

    Returns
    -------
    torch.Tensor or StarsGenerateOutput
        Ids ``[batch * num_return_sequences, length]``, prompt included; the output object with
        ``return_dict_in_generate``.

    Raises
    ------
    ValueError
        For greedy decoding, beams, assistants, and whatever :meth:`StarsEngine.generate` refuses.
    RuntimeError
        The first row's error: with ``on_error="raise"``, or where all rows failed and a plain tensor could not say so.

    Notes
    -----
    The engine of a call stays with the model, with its pools of keys and values and the reward model, until a call
    with another reward, tokenizer or option takes its place, or the model is dropped. A copy of the model has none.
    """
    engine = {"tokenizer": tokenizer, **{name: kwargs.pop(name) for name in _ENGINE_OPTIONS & kwargs.keys()}}
    with Streaming(streamer) as streaming:
        if not hasattr(model, "get_output_embeddings"):
            raise TypeError(f"model={shown(model)}: give a transformers causal LM")
        for name, given in (("inputs", inputs), ("input_ids", kwargs.get("input_ids"))):
            transformers_call.check_ids(name, given)
        if not isinstance(generation_config, (GenerationConfig, type(None))):
            raise TypeError(f"generation_config={shown(generation_config)}: give a GenerationConfig")
        config = transformers_call.with_methods_sampling(_checked(stars_config))
        call = transformers_call.merge(model, config, generation_config, kwargs)
        decoder = _Decoder(
            reward_model,
            call.config,
            explicit=call.explicit,
            streamer=streaming,
            engine=engine,
            call={"reward_prompts": reward_prompts, "columns": columns, "seed": seed, "on_error": on_error},
        )
        out = GenerationMixin.generate(
            cast(Any, model), inputs, call.generation_config, custom_generate=decoder, **call.kwargs
        )
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
        transformers hands its streamer to no custom method: pass it here. It is ended with the call, unless
        transformers itself refuses that before. The tokenizer may be given to ``model.generate`` as well.
    **options
        Further options of :class:`StarsEngine`, such as ``reward_tokenizer`` and ``max_rows`` (``torch_compile`` is
        False here by default); ``seed``, ``reward_prompts``, ``columns`` of :meth:`StarsEngine.generate`; ``on_error``
        of :func:`generate`.

    Notes
    -----
    A setting counts as the call's own where it differs from what the model's generation_config would have given. The
    engine stays with the model, as that of :func:`generate` does.
    """
    if "logits_processor" in options:  # transformers has called it in place of what it returns
        raise TypeError("custom_generate=decoding: give it the reward, custom_generate=decoding(reward_model)")
    known = {*_ENGINE_OPTIONS, "seed", "reward_prompts", "columns", "on_error"}
    for name, value in options.items():
        transformers_call.refuse_setting(name, value)
        if name not in known:
            raise TypeError(f"{name!r} is not an option of decoding; the options are {', '.join(sorted(known))}")
    engine = {"tokenizer": tokenizer, **{name: options.pop(name) for name in _ENGINE_OPTIONS & options.keys()}}
    config = transformers_call.with_methods_sampling(_checked(stars_config))
    return _Decoder(reward_model, config, explicit=None, streamer=streamer, engine=engine, call=options)


def _checked(stars_config: StarsConfig | None) -> StarsConfig:
    if not isinstance(stars_config, (StarsConfig, type(None))):
        raise TypeError(f"stars_config={shown(stars_config)}: give a StarsConfig")
    return stars_config or StarsConfig()


class _Decoder:
    """The callable that transformers runs in place of its own decoding loop."""

    def __init__(
        self,
        reward_model: Any,
        config: StarsConfig,
        *,
        explicit: set[str] | None,  # None: not known, to be told from the prepared generation_config
        streamer: Any,
        engine: dict[str, Any],
        call: dict[str, Any],
    ) -> None:
        self.reward_model, self.config, self.explicit = reward_model, config, explicit
        # Calls through this door are few and short: what compiling costs, they would not earn back.
        self.streamer, self.engine, self.call = streamer, {"torch_compile": False, **engine}, call

    @property
    def __signature__(self) -> inspect.Signature:
        """Of :meth:`__call__`. transformers takes its caller's tokenizer away before it asks here what a custom method
        wants, and then refuses stop strings for want of one: so it gets one back while it asks. Pictures, which it
        would encode or repeat for each sample, it hands on as they came.
        """
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_globals.get("__name__") == "inspect":
            frame = frame.f_back
        if frame is not None and frame.f_code.co_name == "_extract_generation_mode_kwargs":
            arguments, taken = frame.f_locals.get("kwargs"), frame.f_locals.get("generation_mode_kwargs", {})
            tokenizer = self._tokenizer(taken.get("tokenizer"))
            if isinstance(arguments, dict):
                if tokenizer is not None:
                    arguments["tokenizer"] = tokenizer
                arguments["stars_media"] = transformers_call.taken_media(frame.f_locals.get("self"), arguments)
        return inspect.signature(self.__call__)

    def _tokenizer(self, callers: Any) -> Any:
        """The one given here, else that of the transformers call."""
        own = self.engine["tokenizer"]
        return callers if own is None else own

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        generation_config: GenerationConfig | None = None,
        tokenizer: Any = None,
        stars_media: Mapping[str, Any] | None = None,
        **model_kwargs: Any,
    ) -> torch.LongTensor | StarsGenerateOutput:
        assert generation_config is not None
        if stars_media is None:  # where transformers has asked for the signature, there are some, or none
            warn(
                f"transformers {transformers.__version__} has not asked this decoding method for its arguments, as "
                "versions that stars_fast knows do where custom_generate= is the method itself: a tokenizer given to "
                "model.generate is not seen, and pictures are refused; pass tokenizer= to stars_fast.generate or "
                "decoding, or use StarsEngine"
            )
        engine = {**self.engine, "tokenizer": self._tokenizer(tokenizer)}
        with Streaming.of(self.streamer) as streaming:
            theirs = (logits_processor, stopping_criteria)
            return self._decode(
                model, input_ids, theirs, generation_config, model_kwargs, stars_media or {}, engine, streaming
            )

    def _decode(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        theirs: tuple[LogitsProcessorList | None, StoppingCriteriaList | None],
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        media: Mapping[str, Any],
        engine: dict[str, Any],
        streaming: Streaming,
    ) -> torch.LongTensor | StarsGenerateOutput:
        logits_processor, stopping_criteria = theirs
        transformers_call.refuse_modes(generation_config)
        transformers_call.refuse_inputs(model_kwargs, media)
        config = transformers_call.settled(
            self.config, self.explicit, model, generation_config, prompt_length=input_ids.shape[1]
        )
        mask, samples = model_kwargs.get("attention_mask"), config.num_return_sequences
        processors = foreign_processors(logits_processor, generation_config, input_ids, written(model))
        if processors is not None and processors.whole:
            transformers_call.check_in_force(config, generation_config)
            config = config.replace(**NEUTRAL)

        def processor(row: int) -> RowProcessor | None:
            return None if processors is None else row_processor(processors.processors, input_ids, mask, row)

        # transformers repeats ids and mask for each sample; media are as they came.
        own_mask = None if mask is None else mask[::samples].cpu()
        arguments = Arguments(
            {"input_ids": input_ids[::samples].cpu(), "attention_mask": own_mask, **media},
            config,
            processor=processor,
            stop=lambda row: row_stop(stopping_criteria, generation_config, input_ids[row]),
            **self.call,
        )
        kept = _kept_engine(model, self.reward_model, engine)
        job = kept.finished(arguments, streaming)
        out, named = kept.output(job, texts=False), bool(generation_config.return_dict_in_generate)
        lost = all(reason == "error" for reason in out.finish_reasons) and not named
        if job.failed and (arguments.on_error == "raise" or lost):
            raise first_error(job)
        kept.warn_of(job, "errors has them all" if named else "return_dict_in_generate=True returns their errors")
        return _as_transformers(out, input_ids, generation_config)


@dataclass(frozen=True, eq=False)
class _Kept:
    """An engine and what it was made of, hung on its policy so that the two are dropped together."""

    engine: StarsEngine
    made_of: dict[str, Any]

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # copies and pickles of the policy have no engine

    def serves(self, model: PreTrainedModel, made_of: dict[str, Any]) -> bool:
        """Whether an engine made now would be the same."""
        if self.engine.policy.model is not model or self.made_of.keys() != made_of.keys():
            return False
        return all(_same(self.made_of[name], made_of[name]) for name in made_of)


def _kept_engine(model: PreTrainedModel, reward: Any, options: dict[str, Any]) -> StarsEngine:
    """The engine of an earlier call on the model, where it was made of the same things, else a new one."""
    modules = [one for one in (model, reward) if isinstance(one, torch.nn.Module)]
    weights = [(weight.dtype, weight.device, weight.shape) for one in modules for weight in one.parameters()]
    made_of = {"reward": reward, "weights": weights, **options}
    made_of = {name: tuple(v) if isinstance(v := plain(value), list) else v for name, value in made_of.items()}
    with _making.held():
        kept: _Kept | None = vars(model).get(_KEPT)
        if kept is None or not kept.serves(model, made_of):
            del kept  # its pools make room for those of the next
            vars(model).pop(_KEPT, None)
            kept = vars(model)[_KEPT] = _Kept(StarsEngine(model, reward, **options), made_of)
        return kept.engine


def _same(one: Any, other: Any) -> bool:
    """Whether two arguments mean the same: objects by identity, names and numbers by value."""
    by_value = isinstance(one, (str, os.PathLike, int, float, tuple, dict, MethodType)) and type(one) is type(other)
    return one is other or (by_value and one == other)


def _as_transformers(
    out: StarsOutput, input_ids: torch.Tensor, generation_config: GenerationConfig
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
        errors=out.errors,
    )

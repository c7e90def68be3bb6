"""Logits processors, applied to one row at a time.

Rows fork, and candidates of several requests share a step, so a processor that was built for a batch sees its own row
only, and a user's own that follows one text by a state gets a copy for each text. What the engine does itself is taken
out where the others only forbid ids, which may come first; else the whole list runs per row, in its order.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from hashlib import blake2b
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch.utils._pytree import tree_leaves
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from stars_fast.policy.leaf import ProcessorError, RowProcessor
from stars_fast.tree.lack import is_lack_of_memory

# Class -> the attribute that holds its setting, which is the generation_config's field of the same meaning.
_NATIVE = {
    RepetitionPenaltyLogitsProcessor: ("penalty", "repetition_penalty"),
    TemperatureLogitsWarper: ("temperature", "temperature"),
    TopKLogitsWarper: ("top_k", "top_k"),
    TopPLogitsWarper: ("top_p", "top_p"),
    MinPLogitsWarper: ("min_p", "min_p"),
}
# They forbid ids and leave the others' logits alone: before penalties and filters they do what they do among them.
_FORBID = (
    EncoderNoRepeatNGramLogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)
# One id is left, with a logit of 0, which is the same before and after.
_FORCE = (ForcedBOSTokenLogitsProcessor, ForcedEOSTokenLogitsProcessor)
_STATEFUL = (SynthIDTextWatermarkLogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor)
_FOLLOWERS = 1024  # texts that a processor's copies follow at a time
_keeping: WeakKeyDictionary[Any, bool | None] = WeakKeyDictionary()  # whether processors keep a state: asked once


class Foreign(NamedTuple):
    """What runs per row."""

    processors: LogitsProcessorList
    whole: bool  # whether sampling settings are among them, so that the decode step has none to apply


def foreign_processors(
    processors: LogitsProcessorList | None, generation_config: GenerationConfig, input_ids: torch.Tensor, vocab: int
) -> Foreign | None:
    """What the engine does not do itself for this configuration, if there is any.

    Parameters
    ----------
    input_ids : torch.Tensor
        int64 ``[rows, length]``: prompts that the processors will be asked about.
    vocab : int
        Ids that a logit is for.

    Raises
    ------
    ValueError
        For a processor that keeps a state of the one text it follows and cannot be copied.
    """
    for processor in processors or ():
        if isinstance(processor, _STATEFUL):
            raise ValueError(
                f"{type(processor).__name__} keeps a state of the text it follows, which candidates side by side "
                "would mix up"
            )
    foreign = [one for one in processors or () if not _is_native(one, generation_config)]
    natives = [type(one) for one in processors or () if _is_native(one, generation_config)]
    if not foreign and len(set(natives)) == len(natives):
        return None
    whole = len(set(natives)) < len(natives) or not all(type(one) in (*_FORBID, *_FORCE) for one in foreign)
    kept = LogitsProcessorList(cast(Any, processors) if whole else foreign)
    return Foreign(LogitsProcessorList([_followed(one, input_ids[:1], vocab) for one in kept]), whole)


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
    """The list as a function of one row's tokens. What it knows of the batch becomes what it knows of this row.

    The function raises :class:`stars_fast.policy.leaf.ProcessorError`, which names the processor.
    """
    prompt, rows = input_ids[row], input_ids.shape[0]
    padding = 0 if attention_mask is None else int((attention_mask[row] != 0).int().argmax())
    own = [_of_row(processor, row, rows, padding) for processor in processors]

    def process(tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
        ids = torch.cat([prompt, prompt.new_tensor(tokens)])[None]
        for processor, given in zip(own, processors, strict=True):
            logits = _asked(processor, given, ids, logits)
        return logits

    return process


def _of_row(processor: Any, row: int, rows: int, padding: int) -> Any:
    if isinstance(processor, RepetitionPenaltyLogitsProcessor) and not isinstance(processor.prompt_ignore_length, int):
        return RepetitionPenaltyLogitsProcessor(processor.penalty, prompt_ignore_length=padding)
    if isinstance(processor, PrefixConstrainedLogitsProcessor):
        return PrefixConstrainedLogitsProcessor(_for_row(processor._prefix_allowed_tokens_fn, row), 1)
    if isinstance(processor, EncoderRepetitionPenaltyLogitsProcessor):
        processor = copy.copy(processor)
        place = row * processor.encoder_input_ids.shape[0] // rows  # samples of a prompt have one row there
        processor.encoder_input_ids = processor.encoder_input_ids[place : place + 1]
    elif isinstance(processor, EncoderNoRepeatNGramLogitsProcessor):
        processor = copy.copy(processor)
        place = row * processor.batch_size // rows
        processor.batch_size, processor.generated_ngrams = 1, processor.generated_ngrams[place : place + 1]
    return processor


def _for_row(allowed: Callable[[int, torch.Tensor], list[int]], row: int) -> Callable[[int, torch.Tensor], list[int]]:
    return lambda _, ids: allowed(row, ids)


def _asked(processor: Any, named: Any, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    try:
        out: torch.Tensor = processor(cast(torch.LongTensor, ids), cast(torch.FloatTensor, logits))
        return out
    except Exception as error:
        if is_lack_of_memory(error):
            raise
        raise ProcessorError(
            f"the logits processor {_name(named)} raised {type(error).__name__}: {str(error) or 'without a message'}"
        ) from error


def _name(processor: Any) -> str:
    if isinstance(processor, _Following):
        return _name(processor.processor)
    if isinstance(processor, PrefixConstrainedLogitsProcessor):
        allowed = processor._prefix_allowed_tokens_fn
        return f"prefix_allowed_tokens_fn={getattr(allowed, '__qualname__', type(allowed).__name__)}"
    return f"{type(processor).__module__}.{type(processor).__qualname__}"


class _Following:
    """A processor that keeps a state of the one text it follows, as a function of the text.

    A copy that has seen all of a text but its last token goes on with it; else a fresh one is shown the text, from its
    prompt on. Of the logits it sees the last only.
    """

    def __init__(self, processor: Any, prompt_length: int) -> None:
        self.processor, self._prompt_length = processor, prompt_length
        self._followers = OrderedDict[bytes, Any]()  # by a digest of the text that was seen

    def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        text = ids[0].cpu().numpy()
        digest = blake2b(text[:-1].tobytes(), digest_size=16)
        follower = self._followers.pop(digest.digest(), None)
        if follower is None:
            follower = _fresh(self.processor)
            for length in range(self._prompt_length, len(text)):
                follower(ids[:, :length], torch.zeros_like(logits))
        out: torch.Tensor = follower(ids, logits)
        digest.update(text[-1:].tobytes())
        self._followers[digest.digest()] = follower
        if len(self._followers) > _FOLLOWERS:
            self._followers.popitem(last=False)
        return out


def _followed(processor: Any, ids: torch.Tensor, vocab: int) -> Any:
    """The processor, as a function of the text where it is none by itself. transformers' own need not be asked."""
    constrains = isinstance(processor, PrefixConstrainedLogitsProcessor)
    if type(processor).__module__.startswith("transformers.") and not constrains:
        return processor
    asked = processor._prefix_allowed_tokens_fn if constrains else processor  # transformers wraps it for each call
    keeps = None
    with suppress(TypeError):  # of what no weak reference can be made to
        keeps = _keeping.get(asked)
    if keeps is None:
        keeps = _keeps_state(processor, ids, vocab)
        with suppress(TypeError):
            _keeping[asked] = keeps
    return _Following(processor, ids.shape[1]) if keeps else processor


def _keeps_state(processor: Any, ids: torch.Tensor, vocab: int) -> bool | None:
    """Whether it is no function of the text; None where that cannot be told.

    A copy is asked about a text, about the text and a token, and about the text again.
    """
    drawn = torch.Generator("cpu").manual_seed(0)
    first, further = torch.randn(2, 1, vocab, generator=drawn, device="cpu", dtype=torch.float32).to(ids.device)
    asked = _fresh(processor)
    try:
        expected = asked(ids, first.clone())
    except Exception:
        return None  # it says so when the text begins
    longer, after = torch.cat([ids, expected.argmax(-1, keepdim=True)], 1), None
    with suppress(Exception):  # as one raises that expects its text with a token more
        after = asked(longer, further.clone())
        if _same(asked(ids, first.clone()), expected):
            return False
    with suppress(Exception):
        fresh = _fresh(processor)
        if _same(fresh(ids, first.clone()), expected) and _same(fresh(longer, further.clone()), after):
            return True
    raise ValueError(
        f"the logits processor {_name(processor)} gives other logits when it is asked about the same ids again: it "
        "follows one text by a state of its own, where candidates are many texts, and a copy of it differs too. "
        "Pass one that computes its state from the ids it is given, or prefix_allowed_tokens_fn="
    )


def _same(one: Any, other: Any) -> bool:
    return isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and torch.equal(one, other)


def _fresh(processor: Any) -> Any:
    """A copy with a state of its own, tensors included, which may be changed in place. Models and tokenizers, also in
    lists and dicts, and what else cannot be copied are shared.
    """
    shared = (torch.nn.Module, PreTrainedTokenizerBase)
    try:
        held = tree_leaves(getattr(processor, "__dict__", None))
        return copy.deepcopy(processor, {id(one): one for one in held if isinstance(one, shared)})
    except Exception:
        return copy.copy(processor)

"""Stopping criteria and stop strings, applied to one row at a time: each sees a row of its own only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import GenerationConfig
from transformers.generation import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from stars_fast.loop.request import StopTest
from stars_fast.text.decode import CONTEXT_TOKENS, continuation


def row_stop(
    criteria: StoppingCriteriaList | None, generation_config: GenerationConfig, prompt: torch.Tensor
) -> StopTest | None:
    """The user's criteria on one row. The call's length, EOS and stop strings are the engine's own."""
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
    if type(criterion) is StopStringCriteria:
        strings = generation_config.stop_strings
        return strings is not None and set(criterion.stop_strings) == set(_several(strings))
    return False


def _several(strings: str | Sequence[str]) -> tuple[str, ...]:
    return (strings,) if isinstance(strings, str) else tuple(strings)


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
            "decoding, or stop_strings=() to go on behind them"
        )
    strings = _several(stop_strings)
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

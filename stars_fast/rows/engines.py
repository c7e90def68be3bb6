"""Engines of models that users name."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from stars_fast.engine import StarsEngine

# What transformers and the engine raise for models that do not exist, do not load, or cannot be used.
MEANT = (OSError, ValueError, TypeError, NotImplementedError, ImportError)


class Names(NamedTuple):
    """Models and tokenizers as the user named them."""

    policy: str | None
    reward: str | None
    tokenizer: str | None
    reward_tokenizer: str | None
    reward_tail: str
    processor: str | None = None


def build_engine(
    names: Names, dtype: str, device: str, max_rows: int | None, kv_cache_tokens: int | None
) -> StarsEngine:
    """The engine of these models. Raises what loading them leads to."""
    from stars_fast.engine import StarsEngine
    from stars_fast.inputs.functions import file_of, load_function
    from stars_fast.inputs.models import load_classifier, load_policy

    quiet_transformers()
    assert names.policy is not None and names.reward is not None
    reward, reward_tokenizer = names.reward, names.reward_tokenizer
    scorer = None if file_of(reward) is None else load_function(reward)  # before what takes minutes
    policy, tokenizer, processor = load_policy(names.policy, names.tokenizer, device, dtype, names.processor)
    if scorer is None:
        scorer, reward_tokenizer = load_classifier(reward, reward_tokenizer, device, dtype)
    return StarsEngine(
        policy,
        scorer,
        tokenizer=tokenizer,
        processor=processor,
        reward_tokenizer=reward_tokenizer,
        reward_tail=_tail(names.reward_tail),
        max_rows=max_rows,
        kv_cache_tokens=kv_cache_tokens,
    )


def quiet_transformers() -> None:
    """No bars while weights load, and no reports: what of a checkpoint is missing or of no use is said in one line."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _tail(text: str) -> str | list[int]:
    return [int(token) for token in text.split(",")] if re.fullmatch(r"\d+(,\d+)*", text) else text

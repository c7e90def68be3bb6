"""Where an answer ends, besides EOS and its greatest length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stars_fast.request import StopTest


def stop_test(stop_strings: str | Sequence[str] | None, tokenizer: Any) -> StopTest | None:
    """A test whether the text of a completion contains a stop string.

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

    def ends(tokens: list[int]) -> bool:
        text = tokenizer.decode(tokens, skip_special_tokens=False)
        return any(string in text for string in strings)

    return ends

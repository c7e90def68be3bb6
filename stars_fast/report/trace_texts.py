"""The texts of a trace: what each segment adds, and each candidate behind what it continues."""

from __future__ import annotations

from typing import Any

from stars_fast.outputs import CandidateTrace, Origin
from stars_fast.report.trace import plain
from stars_fast.text.decode import TextStream, continuation
from stars_fast.text.tokens import legible, text_of


class Texts:
    """Of one answer's tokens, without the special ones; None without a tokenizer."""

    def __init__(self, origin: Origin) -> None:
        self._origin, self._tokenizer, self._stream = origin, origin.tokenizer, TextStream()
        self._branches: dict[int, list[int]] = {}  # of a population, by their last candidate

    def prompt(self, row: int) -> str | None:
        given, ids = self._origin.prompts[row], self._origin.prompt_ids[row]
        if isinstance(given, str) or self._tokenizer is None:
            return given if isinstance(given, str) else None
        try:
            return legible(self._tokenizer, ids, skip_special_tokens=False)
        except Exception:  # of the tokenizer: the ids stand beside it
            return None

    def piece(self, tokens: list[int], last: bool) -> str | None:
        """What the answer's text has grown by: the pieces add up to it."""
        return None if self._tokenizer is None else self._stream.piece(self._tokenizer, tokens, last)[0]

    def candidate(self, one: CandidateTrace, context: list[int]) -> dict[str, Any]:
        """A candidate behind what it continues: the answer so far, nothing, or another candidate."""
        before = context if self._origin.loop not in ("trials", "chains", "population") else []
        if one.parent is not None:
            before = self._branches[one.parent]
        self._branches[one.attempt] = [*before, *one.tokens]
        values = {name: plain(getattr(one, name)) for name in ("reward", "score", "threshold", "logprob")}
        return {
            "attempt": one.attempt,
            "verdict": one.verdict,
            "text": self._behind(before, one.tokens),
            "tokens": one.tokens,
            **values,
            "parts": plain(one.parts),
            "parent": one.parent,
        }

    def _behind(self, before: list[int], tokens: list[int]) -> str | None:
        if self._tokenizer is None:
            return None
        try:
            text = continuation(self._tokenizer, before, tokens, skip_special_tokens=True)
        except Exception:
            text = None
        return text_of(self._tokenizer, tokens)[0] if text is None else text

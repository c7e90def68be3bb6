"""Traces that are written: what was looked at and what became of it, a line of JSON per answer (docs/trace.md)."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import IO, Any

from stars_fast.outputs import CandidateTrace, SegmentTrace, StarsOutput
from stars_fast.report.files import replacing, to_line
from stars_fast.report.trace import SCHEMA
from stars_fast.text.decode import TextStream, continuation
from stars_fast.text.tokens import legible, text_of

_DIGITS = 7  # float32 has no more
_INFINITIES = {math.inf: "Infinity", -math.inf: "-Infinity"}


@dataclass(frozen=True)
class Origin:
    """What a traced output came of, and what did not become part of it. Lists are by row of the output."""

    settings: dict[str, Any]  # the fields of StarsConfig, with what the method decides itself; of a fit, whether
    loop: str  # how candidates hang together: ``Method.loop``
    samples: int  # of a prompt
    prompts: list[Any]  # as they were given: text, messages or ids
    prompt_ids: list[list[int]]
    seeds: list[int | None]
    rules: list[tuple[float, float | None, float]]  # r_star, r0, beta
    unfinished: list[list[CandidateTrace]]  # of the segment, or of all answers, in which a request ended too early
    tokenizer: Any

    def save(self, output: StarsOutput, path: str | os.PathLike[str]) -> None:
        """See :meth:`stars_fast.StarsOutput.save_trace`."""
        with replacing(Path(path)) as file:
            self.write(output, file)

    def write(self, output: StarsOutput, file: IO[bytes], before: int = 0) -> int:
        """The lines of an output whose prompts come behind so many others. Returns how many these are together."""
        for row in range(len(output.completions)):
            record = _record(output, self, row)
            record["row"] += before * self.samples
            record["prompt_index"] += before
            file.write(to_line(record).encode())
        return before + len(output.completions) // self.samples


def _plain(value: Any) -> Any:
    """What JSON can hold: numbers not finite as ``report.trace.number`` reads them, of what is no value the name."""
    if isinstance(value, float):
        return None if math.isnan(value) else _INFINITIES.get(value) or float(f"{value:.{_DIGITS}g}")
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value if isinstance(value, (str, int, type(None))) else f"<{type(value).__name__}>"


def _record(output: StarsOutput, origin: Origin, row: int) -> dict[str, Any]:
    target, base, beta = origin.rules[row]
    texts, segments, context = _Texts(origin), output.segments[row], list[int]()
    told = []
    for place, segment in enumerate(segments, 1):
        candidates = [texts.candidate(one, context) for one in segment.candidates or ()]
        context = context + segment.tokens
        piece = texts.piece(context, last=place == len(segments))
        told.append({"text": piece, **_segment(segment), "candidates": candidates})
    return {
        "schema": SCHEMA,
        "row": row,
        "prompt_index": row // origin.samples,
        "sample_index": row % origin.samples,
        "method": _name(origin.settings["method"]),
        "loop": origin.loop,
        "settings": _plain(origin.settings),
        "seed": origin.seeds[row],
        "target": _plain(target),
        "base": _plain(base),
        "beta": _plain(beta),
        "prompt": _plain(origin.prompts[row]),
        "prompt_text": texts.prompt(row),
        "prompt_ids": origin.prompt_ids[row],
        "text": None if output.texts is None else output.texts[row],
        "tokens": output.completions[row],
        "reward": _plain(output.rewards[row]),
        "finish_reason": output.finish_reasons[row],
        "error": output.errors[row],
        "segments": told,
        "unfinished": [texts.candidate(one, context) for one in origin.unfinished[row]],
    }


def _name(method: str | Mapping[str, Any]) -> str:
    return method if isinstance(method, str) else str(method["name"])


def _segment(segment: SegmentTrace) -> dict[str, Any]:
    return {
        "tokens": segment.tokens,
        "reward": _plain(segment.reward),
        "threshold": _plain(segment.threshold),
        "attempts": segment.attempts,
        "accepted": segment.accepted,
        "logprob": _plain(segment.logprob),
        "parts": _plain(segment.parts),
        "scaffold": None if segment.scaffold is None else _plain(segment.scaffold._asdict()),
    }


class _Texts:
    """The texts of one answer's tokens, without the special ones; None without a tokenizer."""

    def __init__(self, origin: Origin) -> None:
        self._origin, self._tokenizer, self._stream = origin, origin.tokenizer, TextStream()
        self._branches: dict[int, list[int]] = {}  # of a population, by their last candidate

    def prompt(self, row: int) -> str | None:
        given, ids = self._origin.prompts[row], self._origin.prompt_ids[row]
        if isinstance(given, str) or self._tokenizer is None:
            return given if isinstance(given, str) else None
        try:
            special = set(getattr(self._tokenizer, "all_special_ids", ()))  # a picture is one, hundreds of times
            shown = [one for token, same in groupby(ids) for one in ([token] if token in special else same)]
            return legible(self._tokenizer, shown, skip_special_tokens=False)
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
        values = {name: _plain(getattr(one, name)) for name in ("reward", "score", "threshold", "logprob")}
        return {
            "attempt": one.attempt,
            "verdict": one.verdict,
            "text": self._behind(before, one.tokens),
            "tokens": one.tokens,
            **values,
            "parts": _plain(one.parts),
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

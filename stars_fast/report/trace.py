"""Traces that are read: a line of JSON per answer (docs/trace.md), without torch."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SCHEMA = "stars_fast.trace/1"
_INFINITE = ("Infinity", "-Infinity")
_NUMBER, _WORDS, _MAYBE = (int, float, str, type(None)), (str, type(None)), (int, type(None))
_ANSWER = (
    {"settings": dict, "seed": _MAYBE, "prompt_text": _WORDS, "error": _WORDS}
    | dict.fromkeys(("row", "sample_index"), int)
    | dict.fromkeys(("method", "loop", "finish_reason"), str)
    | dict.fromkeys(("target", "beta", "reward"), _NUMBER)
    | dict.fromkeys(("prompt_ids", "tokens", "segments", "unfinished"), list)
)
_PIECE = {"text": _WORDS, "tokens": list, "reward": _NUMBER, "threshold": _NUMBER}
_SEGMENT = _PIECE | {"attempts": int, "accepted": bool, "candidates": list}
_CANDIDATE = _PIECE | {"attempt": int, "verdict": str, "score": _NUMBER, "parent": _MAYBE}


def load_trace(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a file of ``StarsOutput.save_trace``; :func:`number` reads what may not be finite.

    Raises
    ------
    OSError, ValueError
        For a file that cannot be read or is no trace, naming the line.
    """
    records = []
    with Path(path).open("rb") as file:
        for place, line in enumerate(file, 1):
            try:
                record = json.loads(line, parse_constant=_not_json, parse_float=_finite)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {place}, is not JSON: {error}") from error
            schema = record.get("schema") if isinstance(record, dict) else None
            if schema != SCHEMA:
                raise ValueError(
                    f"{path}, line {place}, is no answer of a trace: its schema is {schema!r}, not {SCHEMA!r}. "
                    "StarsOutput.save_trace writes them"
                )
            if wrong := _wrong(record):
                raise ValueError(f"{path}, line {place}, is no answer of a trace: {wrong}")
            records.append(record)
    if not records:
        raise ValueError(f"{path} is empty: a trace has a line per answer")
    return records


def _wrong(record: dict[str, Any]) -> str:
    """What those who show a trace could not do with: a field that is missing, or of another kind."""
    if wrong := _mismatch(record, _ANSWER, "the answer"):
        return wrong
    for place, segment in enumerate(record["segments"], 1):
        if wrong := _mismatch(segment, _SEGMENT, f"segment {place}"):
            return wrong
    groups = [*(segment["candidates"] for segment in record["segments"]), record["unfinished"]]
    every = (_mismatch(one, _CANDIDATE, "a candidate") for group in groups for one in group)
    return next(filter(None, every), "")


def _mismatch(given: Any, kinds: Mapping[str, Any], what: str) -> str:
    if not isinstance(given, dict):
        return f"{what} is a {type(given).__name__}"
    for name, kind in kinds.items():
        if name not in given:
            return f"{what} lacks {name!r}"
        value = given[name]
        if not isinstance(value, kind) or (kind is _NUMBER and isinstance(value, str) and value not in _INFINITE):
            return f"{what} has a {type(value).__name__} for {name!r}"
    return ""


def _finite(digits: str) -> float:
    if math.isinf(value := float(digits)):
        raise ValueError(f"{digits:.40} is beyond all bounds")
    return value


def _not_json(constant: str) -> float:
    raise ValueError(f"JSON has no {constant}")


def number(value: float | str | None) -> float:
    """What a record has for a number: null stands for NaN, "Infinity" and "-Infinity" for themselves."""
    return math.nan if value is None else float(value)

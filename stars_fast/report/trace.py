"""Traces in files: what was looked at and what became of it, a line of JSON per answer (docs/trace.md)."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stars_fast.report.files import replacing, to_line

if TYPE_CHECKING:
    from stars_fast.outputs import Origin, SegmentTrace, StarsOutput

SCHEMA = "stars_fast.trace/1"
_DIGITS = 7  # float32 has no more
_INFINITIES = {math.inf: "Infinity", -math.inf: "-Infinity"}


def save_trace(output: StarsOutput, path: str | os.PathLike[str]) -> None:
    """See :meth:`stars_fast.StarsOutput.save_trace`."""
    if output.origin is None:
        raise ValueError("save_trace: this output has no trace: pass trace=True to generate")
    with replacing(Path(path)) as file:
        for row in range(len(output.completions)):
            file.write(to_line(_record(output, output.origin, row)).encode())


def load_trace(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a file that ``save_trace`` wrote; :func:`number` reads what may not be finite.

    Raises
    ------
    OSError, ValueError
        For a file that cannot be read or is no trace, naming the line.
    """
    records = []
    with Path(path).open("rb") as file:
        for place, line in enumerate(file, 1):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {place}, is not JSON: {error}") from error
            schema = record.get("schema") if isinstance(record, dict) else None
            if schema != SCHEMA:
                raise ValueError(
                    f"{path}, line {place}, is no answer of a trace: its schema is {schema!r}, not {SCHEMA!r}. "
                    "StarsOutput.save_trace writes them"
                )
            records.append(record)
    if not records:
        raise ValueError(f"{path} is empty: a trace has a line per answer")
    return records


def number(value: float | str | None) -> float:
    """What a record has for a number: null stands for NaN, "Infinity" and "-Infinity" for themselves."""
    return math.nan if value is None else float(value)


def plain(value: Any) -> Any:
    """What JSON can hold: numbers that are not finite as :func:`number` reads them, the name of what is no value."""
    if isinstance(value, float):
        return None if math.isnan(value) else _INFINITIES.get(value) or float(f"{value:.{_DIGITS}g}")
    if isinstance(value, Mapping):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return value if isinstance(value, (str, int, type(None))) else f"<{type(value).__name__}>"


def _record(output: StarsOutput, origin: Origin, row: int) -> dict[str, Any]:
    from stars_fast.report.trace_texts import Texts  # and with it torch, which who reads does without

    target, base, beta = origin.rules[row]
    texts, segments, context = Texts(origin), output.segments[row], list[int]()
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
        "settings": plain(origin.settings),
        "seed": origin.seeds[row],
        "target": plain(target),
        "base": plain(base),
        "beta": plain(beta),
        "prompt": plain(origin.prompts[row]),
        "prompt_text": texts.prompt(row),
        "prompt_ids": origin.prompt_ids[row],
        "text": None if output.texts is None else output.texts[row],
        "tokens": output.completions[row],
        "reward": plain(output.rewards[row]),
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
        "reward": plain(segment.reward),
        "threshold": plain(segment.threshold),
        "attempts": segment.attempts,
        "accepted": segment.accepted,
        "logprob": plain(segment.logprob),
        "parts": plain(segment.parts),
    }

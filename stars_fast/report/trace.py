"""Traces that are read: a line of JSON per answer (docs/trace.md), without torch."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

SCHEMA = "stars_fast.trace/1"


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

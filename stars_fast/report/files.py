"""What the commands read and write: YAML of known names, and records as lines of JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from stars_fast.outputs import SegmentTrace


def read_yaml(path: Path, known: Sequence[str]) -> dict[str, Any]:
    """The values in a YAML file, by name; an empty one has none.

    Raises
    ------
    OSError, ValueError
        For a file that cannot be read or is no such mapping, and for names that are not known.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}: write one `name: value` a line")
    check_known(map(str, values), str(path), known)
    return values


def check_known(names: Iterable[str], where: str, known: Sequence[str]) -> None:
    """Raise ValueError for names that are not known, with those that are."""
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(f"{where}: unknown {', '.join(map(repr, unknown))}; known are {', '.join(known)}")


def to_line(record: dict[str, Any]) -> str:
    """A record as a line of JSON."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def replace_file(path: Path, text: str) -> None:
    """Write a file in one step: a kill leaves the old one or the new one."""
    swap = path.with_name(path.name + ".tmp")
    swap.write_text(text, encoding="utf-8")
    swap.replace(path)


def rounded(value: float) -> float | None:
    """Six digits, and None for what JSON has no number for."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def summary(segment: SegmentTrace) -> dict[str, Any]:
    """What a record says of a committed segment."""
    return {
        "tokens": len(segment.tokens),
        "reward": rounded(segment.reward),
        "threshold": rounded(segment.threshold),
        "attempts": segment.attempts,
        "accepted": segment.accepted,
    }

"""Rows in and rows out: JSON Lines with an id, which is all that a resumed run goes by."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stars_fast.outputs import SegmentTrace

Id = str | int
_FORMS = ("prompt", "messages", "prompt_ids")


@dataclass(frozen=True)
class Row:
    """One row of the input."""

    id: Id
    prompt: Any  # text, chat messages or token ids; None where the row is bad
    seed: int
    error: str | None = None


def read_rows(lines: Iterable[bytes | str], seed: int) -> list[Row]:
    """Rows of a JSON Lines file. What cannot be used becomes a row with an error.

    Raises
    ------
    ValueError
        For an id that comes twice, naming both lines: a resumed run could not tell the rows apart.
    """
    rows, seen = [], dict[Id, int]()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = _read_row(number, line, seed)
        if row.id in seen:
            raise ValueError(f"lines {seen[row.id]} and {number} have the same id {row.id!r}: ids must differ")
        seen[row.id] = number
        rows.append(row)
    return rows


def row_seed(seed: int, row_id: Id) -> int:
    """Seed of a row: depends on its id and nothing else, so neither order nor interruption changes a text."""
    digest = hashlib.blake2b(json.dumps([seed, row_id]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _read_row(number: int, line: bytes | str, seed: int) -> Row:
    row_id: Id = number
    try:
        fields = _parse(line)
        row_id = _checked(fields, "id", number, str, int)
        own_seed = _checked(fields, "seed", row_seed(seed, row_id), int)
        return Row(row_id, _prompt(fields), own_seed)
    except ValueError as error:
        return Row(row_id, None, row_seed(seed, row_id), f"line {number}: {error}")


def _parse(line: bytes | str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
        json.dumps(fields, ensure_ascii=False).encode()  # half a surrogate pair is JSON, but no text
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"a JSON {type(fields).__name__}, not an object with one of {', '.join(_FORMS)}")
    return fields


def _checked(fields: dict[str, Any], name: str, default: Any, *kinds: type) -> Any:
    value = fields.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, kinds):
        wanted = " or ".join({str: "text", int: "an integer"}[kind] for kind in kinds)
        raise ValueError(f"{name}={value!r}: must be {wanted}")
    return value


def _prompt(fields: dict[str, Any]) -> Any:
    given = [name for name in _FORMS if fields.get(name) is not None]
    if len(given) != 1:
        raise ValueError(f"has {' and '.join(given) or 'none'} of {', '.join(_FORMS)}: give exactly one")
    name, value = given[0], fields[given[0]]
    if name == "prompt" and not isinstance(value, str):
        raise ValueError(f"prompt is a {type(value).__name__}: give text, or use messages or prompt_ids")
    if name == "messages" and not _is_list(value, dict):
        raise ValueError('messages: give a list of {"role": ..., "content": ...}')
    if name == "prompt_ids" and not _is_list(value, int):
        raise ValueError("prompt_ids: give a list of integers")
    return value


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and bool(value) and all(type(entry) is kind for entry in value)


def record(
    row: Row,
    sample: int,
    tokens: Sequence[int] = (),
    text: str | None = None,
    segments: Sequence[SegmentTrace] = (),
    finish_reason: str = "error",
    error: str | None = None,
) -> dict[str, Any]:
    """A row of the output. Rewards are rounded to 6 digits; those that are not finite become null, as JSON has none."""
    return {
        "id": row.id,
        "sample": sample,
        "prompt": row.prompt,
        "completion": text,
        "reward": _finite(segments[-1].reward) if segments and error is None else None,
        "finish_reason": finish_reason,
        "error": error,
        "tokens": len(tokens),
        "completion_ids": list(tokens),
        "segments": [_summary(segment) for segment in segments],
        "seed": row.seed,
    }


def _summary(segment: SegmentTrace) -> dict[str, Any]:
    return {
        "tokens": len(segment.tokens),
        "reward": _finite(segment.reward),
        "threshold": _finite(segment.threshold),
        "attempts": segment.attempts,
        "accepted": segment.accepted,
    }


def _finite(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def to_line(one: dict[str, Any]) -> str:
    """A record as a line of JSON."""
    return json.dumps(one, ensure_ascii=False, allow_nan=False) + "\n"


# How a record begins, whatever the interruption left of it.
_TORN_START = b'{"id": '


def resume(path: Path, samples: int) -> set[Id]:
    """Ids that an output file holds in full. A torn last line, and an id short of samples at the end, are cut off.

    Raises
    ------
    ValueError
        For a file that this command did not write, naming the line.
    """
    if not path.exists():
        return set()
    ids, kept, whole = list[Id](), 0, 0
    with path.open("r+b") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                if not ids and line[: len(_TORN_START)] != _TORN_START[: len(line)]:
                    raise _not_ours(path, number)
                break
            row_id = _written_id(path, number, line)
            if not ids or ids[-1] != row_id:
                ids.append(row_id)
                kept, held = whole, 0
            held += 1
            whole += len(line)
        if ids and held < samples:
            ids.pop()
            whole = kept
        file.truncate(whole)
    return set(ids)


def _written_id(path: Path, number: int, line: bytes) -> Id:
    try:
        found = json.loads(line)
        if {"id", "sample", "completion"} <= found.keys():
            row_id: Id = found["id"]
            return row_id
    except (ValueError, AttributeError):
        pass
    raise _not_ours(path, number)


def _not_ours(path: Path, number: int) -> ValueError:
    return ValueError(f"{path}, line {number}, is not a row that this command wrote: name another output, or remove it")

"""Rows in and rows out: JSON Lines with an id, which is all that a resumed run goes by."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stars_fast.outputs import SegmentTrace
from stars_fast.report.files import replace_file, rounded, summary

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
        "reward": rounded(segments[-1].reward) if segments and error is None else None,
        "finish_reason": finish_reason,
        "error": error,
        "tokens": len(tokens),
        "completion_ids": list(tokens),
        "segments": [summary(segment) for segment in segments],
        "seed": row.seed,
    }


# How a record begins, whatever the interruption left of it.
_TORN_START = b'{"id": '


@dataclass
class _Written:
    """The lines of one row in an output file."""

    id: Id
    start: int
    size: int = 0
    samples: int = 0
    failed: bool = False


def resume(path: Path, samples: int, ids: Set[Id], settings: dict[str, Any]) -> set[Id]:
    """Ids that an output file holds in full.

    A torn last line, an id short of samples at the end, and those of ``ids`` that ended with an error are cut out, for
    the run that follows to write them again.

    Raises
    ------
    ValueError
        For a file that this command did not write, naming the line, or wrote with other settings, naming those.
    """
    if not path.exists():
        return set()
    rows = _written_rows(path)
    if rows and rows[-1].samples < samples:
        rows.pop()
    kept = [row for row in rows if not (row.failed and row.id in ids)]
    if kept:
        _check_settings(path, settings)
    if sum(row.size for row in kept) < path.stat().st_size:
        _keep(path, kept)
    return {row.id for row in kept}


def write_settings(output: Path, settings: dict[str, Any]) -> None:
    """Note beside an output what its rows were made with."""
    replace_file(_settings_path(output), json.dumps(settings, indent=1) + "\n")


def _settings_path(output: Path) -> Path:
    return output.with_name(output.name + ".settings.json")


def _check_settings(output: Path, settings: dict[str, Any]) -> None:
    path = _settings_path(output)
    if not path.exists():
        return
    earlier, now = json.loads(path.read_text(encoding="utf-8")), json.loads(json.dumps(settings))
    changed = [
        f"{name} was {earlier[name]!r} and is {now[name]!r}"
        for name in now
        if name in earlier and earlier[name] != now[name]
    ]
    if changed:
        raise ValueError(
            f"{output} holds a run with other settings ({path.name}): {', '.join(changed)}; name another output, or "
            "remove it"
        )


def _written_rows(path: Path) -> list[_Written]:
    rows, start = list[_Written](), 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                if not rows and line[: len(_TORN_START)] != _TORN_START[: len(line)]:
                    raise _not_ours(path, number)
                break
            found = _written_record(path, number, line)
            if not rows or rows[-1].id != found["id"]:
                rows.append(_Written(found["id"], start))
            row = rows[-1]
            row.size += len(line)
            row.samples += 1
            row.failed |= found.get("error") is not None
            start += len(line)
    return rows


def _keep(path: Path, rows: Sequence[_Written]) -> None:
    """Replace a file by these of its rows, in one step."""
    whole = path.resolve()
    swap = whole.with_name(whole.name + ".tmp")
    with whole.open("rb") as source, swap.open("wb") as target:
        for row in rows:
            source.seek(row.start)
            target.write(source.read(row.size))
    shutil.copymode(whole, swap)
    swap.replace(whole)


def _written_record(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(line)
        if {"id", "sample", "completion"} <= found.keys():
            return found
    except (ValueError, AttributeError):
        pass
    raise _not_ours(path, number)


def _not_ours(path: Path, number: int) -> ValueError:
    return ValueError(f"{path}, line {number}, is not a row that this command wrote: name another output, or remove it")

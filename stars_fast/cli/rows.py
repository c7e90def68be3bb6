"""Rows in and rows out: JSON Lines with an id, which is all that a resumed run goes by."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from stars_fast.outputs import SegmentTrace
from stars_fast.report.files import replace_file, replacing, rounded, summary

Id = str | int
_FORMS = ("prompt", "messages", "prompt_ids")
_LINE = "line "  # in front of its number: the id of a line that has none to be read
_LONGEST_LINE = 1 << 25  # bytes: a million tokens as JSON, several times over
_DEPTH = 64  # of messages; Python's own limit depends on how deep the caller is already


@dataclass(frozen=True)
class Row:
    """One row of the input."""

    id: Id
    prompt: Any  # text, chat messages or token ids; None where the row is bad
    seed: int
    error: str | None = None


def lines_of(file: IO[bytes]) -> Iterator[bytes]:
    """The lines of a file. Of one that is too long, only so much that it is seen."""
    while line := file.readline(_LONGEST_LINE + 2):
        yield line
        while not line.endswith(b"\n") and (line := file.readline(_LONGEST_LINE)):
            pass


def read_rows(lines: Iterable[bytes | str], seed: int) -> list[Row]:
    """Rows of a JSON Lines file. What cannot be used becomes a row with an error.

    Raises
    ------
    ValueError
        For an id that comes twice, naming both lines: a resumed run could not tell the rows apart.
    """
    return list(each_row(lines, seed, {}))


def each_row(lines: Iterable[bytes | str], seed: int, seen: dict[Id, str], name: str = "") -> Iterator[Row]:
    """:func:`read_rows` one by one. Files read together have names, and share ``seen``: ids, and where they are.

    A row without an id is called by its line number, in a named file ``NAME:NUMBER``.
    """
    of_file = f" of {name}" if name else ""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{number}{of_file}"
        row = _read_row(place, f"{name}:{number}" if name else number, line, seed)
        if row.id in seen:
            raise ValueError(f"lines {seen[row.id]} and {place} have the same id {row.id!r}: ids must differ")
        seen[row.id] = place
        yield row


def row_seed(seed: int, row_id: Id) -> int:
    """Seed of a row: depends on its id and nothing else, so neither order nor interruption changes a text."""
    digest = hashlib.blake2b(json.dumps([seed, row_id]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _read_row(place: str, own_id: Id, line: bytes | str, seed: int) -> Row:
    row_id: Id = f"{_LINE}{place}"  # a number may be another row's own id
    try:
        fields = _parse(line)
        row_id = _checked(fields, "id", own_id, str, int)
        own_seed = _checked(fields, "seed", row_seed(seed, row_id), int)
        return Row(row_id, _prompt(fields), own_seed)
    except ValueError as error:
        return Row(row_id, None, row_seed(seed, row_id), f"{_LINE}{place}: {error}")


def _parse(line: bytes | str) -> dict[str, Any]:
    if len(line.rstrip()) > _LONGEST_LINE:
        raise ValueError(f"longer than {_LONGEST_LINE:,} bytes")
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
    if _is_deeper(value, _DEPTH):
        raise ValueError(f"{name}: nested more than {_DEPTH} deep")
    try:
        json.dumps(value, allow_nan=False)  # it is written out again with the answer
    except ValueError as error:
        raise ValueError(f"{name}: holds NaN or a number beyond all bounds, which JSON has none for") from error
    return value


def _is_deeper(value: Any, most: int) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return bool(parts) and (most == 0 or any(_is_deeper(part, most - 1) for part in parts))


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
        "reward": rounded(segments[-1].reward) if segments and finish_reason in ("stop", "length") else None,
        "finish_reason": finish_reason,
        "error": error,
        "tokens": len(tokens),
        "completion_ids": list(tokens),
        "segments": [summary(segment) for segment in segments],
        "seed": row.seed,
    }


# How a record begins, whatever the interruption left of it.
_TORN_START = b'{"id": '
_NAMED = 5  # ids in a message; a file may hold any number


@dataclass
class _Written:
    """The lines of one row in an output file."""

    id: Id
    start: int
    size: int = 0
    samples: int = 0
    failed: bool = False
    changed: bool = False  # it is of another prompt or seed than the row that has this id now


def _stands_for_a_line(row_id: Id) -> bool:
    return isinstance(row_id, str) and row_id.removeprefix(_LINE).isdigit() and row_id.startswith(_LINE)


def resume(path: Path, samples: int, rows: Sequence[Row], settings: dict[str, Any]) -> set[Id]:
    """Ids that an output file holds in full.

    A torn last line, an id short of samples at the end, those of ``rows`` that ended with an error, and what stands for
    lines that could not be read are cut out, for the run that follows to write them again.

    Raises
    ------
    ValueError
        For a file that this command did not write, naming the line; or wrote with other settings, naming those; or for
        other prompts or seeds under the same ids, naming these.
    """
    if not path.exists():
        return set()
    wanted = {row.id: row for row in rows}
    written = _written_rows(path, wanted)
    if written and written[-1].samples < samples:
        written.pop()
    kept = [row for row in written if not (row.failed and (row.id in wanted or _stands_for_a_line(row.id)))]
    if kept:
        check_settings(path, settings)
    check_unchanged(path, [row.id for row in kept if row.changed])
    if sum(row.size for row in kept) < path.stat().st_size:
        _keep(path, kept)
    return {row.id for row in kept}


def check_unchanged(output: Path, changed: Sequence[Id]) -> None:
    """Raise ValueError for ids under which an output answers other prompts or seeds than the input has now."""
    if changed:
        more = f" and {len(changed) - _NAMED} more" * (len(changed) > _NAMED)
        raise ValueError(
            f"{output} holds answers to other prompts or seeds under id {', '.join(map(repr, changed[:_NAMED]))}"
            f"{more}: give what changed new ids, or name another output"
        )


def write_settings(output: Path, settings: dict[str, Any]) -> None:
    """Note beside an output what its rows were made with."""
    replace_file(_settings_path(output), json.dumps(settings, indent=1) + "\n")


def _settings_path(output: Path) -> Path:
    return output.with_name(output.name + ".settings.json")


def check_settings(output: Path, settings: dict[str, Any]) -> None:
    """Raise ValueError where other settings than these are noted beside an output, naming them."""
    path = _settings_path(output)
    if not path.exists():
        return
    try:
        earlier, now = json.loads(path.read_text(encoding="utf-8")), json.loads(json.dumps(settings))
        if not isinstance(earlier, dict):
            raise ValueError(f"a {type(earlier).__name__}, not an object")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not what this command wrote: {error}") from error
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


def _written_rows(path: Path, wanted: Mapping[Id, Row]) -> list[_Written]:
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
            own = wanted.get(row.id)
            # Files of earlier versions may lack one of the two.
            row.changed |= own is not None and any(
                found.get(name, now) != now for name, now in (("prompt", own.prompt), ("seed", own.seed))
            )
            start += len(line)
    return rows


def _keep(path: Path, rows: Sequence[_Written]) -> None:
    """Cut a file down to these of its rows, in one step."""
    size = sum(row.size for row in rows)
    if not rows or rows[-1].start + rows[-1].size == size:  # all that goes is at the end, which needs no room
        os.truncate(path, size)
        return
    with path.open("rb") as source, replacing(path) as target:
        for row in rows:
            source.seek(row.start)
            target.write(source.read(row.size))


def _written_record(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(line)
        if {"id", "sample", "completion"} <= found.keys() and isinstance(found["id"], (str, int)):
            return found
    except (ValueError, AttributeError, RecursionError):
        pass
    raise _not_ours(path, number)


def _not_ours(path: Path, number: int) -> ValueError:
    return ValueError(f"{path}, line {number}, is not a row that this command wrote: name another output, or remove it")

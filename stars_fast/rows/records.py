"""Rows out: records in a file, beside it what they were made with, and what a run that goes on finds there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stars_fast.outputs import SegmentTrace
from stars_fast.report.files import replace_file, replacing, rounded, summary
from stars_fast.rows.reading import Id, Row, stands_for_a_line

# How a record begins, whatever the interruption left of it.
_TORN_START = b'{"id": '
_NAMED = 5  # ids in a message; a file may hold any number


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
        **({} if row.image is None else {"image": row.image}),
        "completion": text,
        "reward": rounded(segments[-1].reward) if segments and finish_reason in ("stop", "length") else None,
        "finish_reason": finish_reason,
        "error": error,
        "tokens": len(tokens),
        "completion_ids": list(tokens),
        "segments": [summary(segment) for segment in segments],
        "seed": row.seed,
    }


@dataclass
class _Written:
    """The lines of one row in an output file."""

    id: Id
    start: int
    size: int = 0
    samples: int = 0
    failed: bool = False
    changed: bool = False  # it is of another prompt or seed than the row that has this id now


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
    kept = [row for row in written if not (row.failed and (row.id in wanted or stands_for_a_line(row.id)))]
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
    """Raise ValueError where other settings than these are noted beside an output, naming them; None is none."""
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
        f"{name} was {earlier.get(name)!r} and is {now.get(name)!r}"
        for name in dict.fromkeys([*now, *earlier])
        if earlier.get(name) != now.get(name)
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
            row.changed |= own is not None and (
                any(found.get(name, now) != now for name, now in (("prompt", own.prompt), ("seed", own.seed)))
                or found.get("image") != own.image
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

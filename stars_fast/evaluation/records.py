"""What a run keeps: a line for every generation, a line for every finished batch, and what it was run with."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stars_fast.report.files import replace_file, replacing, to_line

Record = dict[str, Any]
BatchKey = tuple[str, int, int]  # cell, seed, batch


class Records:
    """A folder of JSON Lines that a killed run leaves readable, and that the next one goes on from.

    A batch counts once its line is in ``batches.jsonl``, which is written after its generations; what an interrupted
    batch left is dropped when the folder is opened again.

    Raises
    ------
    ValueError
        If the folder holds a run with other settings, naming what differs.
    """

    def __init__(self, folder: Path, settings: Record) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._check_settings(settings)
        self.batches = self._kept("batches.jsonl", lambda batch: True)
        done = self.done
        self.generations = self._kept("generations.jsonl", lambda row: _key(row) in done)

    @property
    def done(self) -> set[BatchKey]:
        """Batches that are complete."""
        return {_key(batch) for batch in self.batches}

    def add(self, generations: Sequence[Record], batch: Record) -> None:
        """Write a batch down."""
        _append(self.folder / "generations.jsonl", generations)
        _append(self.folder / "batches.jsonl", [batch])
        self.generations += generations
        self.batches.append(batch)

    def _kept(self, name: str, wanted: Callable[[Record], bool]) -> list[Record]:
        """The rows of a file that are whole and wanted; the others are cut out of it."""
        path = self.folder / name
        contents = path.read_bytes() if path.exists() else b""
        lines = contents.split(b"\n")[:-1]  # what is behind the last line break is torn
        rows = [_row(path, number, line) for number, line in enumerate(lines, 1)]
        kept = [line for line, row in zip(lines, rows, strict=True) if wanted(row)]
        if sum(len(line) + 1 for line in kept) < len(contents):
            with replacing(path) as file:
                file.writelines(line + b"\n" for line in kept)
        return [row for row in rows if wanted(row)]

    def _check_settings(self, settings: Record) -> None:
        path = self.folder / "settings.json"
        settings = json.loads(json.dumps(settings))
        if not path.exists():
            # Without it no run has begun here: whatever lies there is somebody else's.
            for name in ("batches.jsonl", "generations.jsonl"):
                if (self.folder / name).exists():
                    raise ValueError(f"{self.folder / name} is of no run of this command: name another output")
            replace_file(path, json.dumps(settings, indent=1) + "\n")
            return
        try:
            earlier = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} is not what this command wrote: {error}") from error
        changed = [name for name in sorted({*earlier, *settings}) if earlier.get(name) != settings.get(name)]
        if changed:
            raise ValueError(
                f"{self.folder} holds a run with other {', '.join(changed)}: name another output, or remove it"
            )


def _key(row: Record) -> BatchKey:
    return row["cell"], row["seed"], row["batch"]


def _row(path: Path, number: int, line: bytes) -> Record:
    try:
        row: Record = json.loads(line)
        _key(row)
        return row
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{path}, line {number}, is not a row that this command wrote: name another output, or remove it"
        ) from error


def _append(path: Path, rows: Sequence[Record]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(map(to_line, rows)))

"""What a run keeps: a line for every generation, a line for every finished batch, and what it was run with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stars_fast.report.files import replace_file, to_line

Record = dict[str, Any]
BatchKey = tuple[str, int]


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
        self.batches = _lines(folder / "batches.jsonl")
        done = self.done
        kept = [row for row in _lines(folder / "generations.jsonl") if _key(row) in done]
        replace_file(folder / "batches.jsonl", "".join(map(to_line, self.batches)))
        replace_file(folder / "generations.jsonl", "".join(map(to_line, kept)))
        self.generations: list[Record] = kept

    @property
    def done(self) -> set[BatchKey]:
        """Cells and batches that are complete."""
        return {_key(batch) for batch in self.batches}

    def add(self, generations: Sequence[Record], batch: Record) -> None:
        """Write a batch down."""
        _append(self.folder / "generations.jsonl", generations)
        _append(self.folder / "batches.jsonl", [batch])
        self.generations += generations
        self.batches.append(batch)

    def _check_settings(self, settings: Record) -> None:
        path = self.folder / "settings.json"
        settings = json.loads(json.dumps(settings))
        if not path.exists():
            path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
            return
        earlier = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in sorted({*earlier, *settings}) if earlier.get(name) != settings.get(name)]
        if changed:
            raise ValueError(
                f"{self.folder} holds a run with other {', '.join(changed)}: name another output, or remove it"
            )


def _key(row: Record) -> BatchKey:
    return row["cell"], row["batch"]


def _lines(path: Path) -> list[Record]:
    """The whole lines of a file; a torn last one is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def _append(path: Path, rows: Sequence[Record]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(map(to_line, rows)))

"""The output folder of a job: one part per batch, written in one step, and what of the input is done."""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stars_fast.report.files import replacing, to_line
from stars_fast.rows.reading import Id, Row

_PARTS, _LEASES = "part-*.jsonl", ".writing-*"


@dataclass(frozen=True)
class Parts:
    """Where the workers of one run write.

    A part is a file of whole rows. It is written in ``lease`` and moved from there, so that the output has all of it or
    nothing. A run that begins takes the leases of earlier ones away: no worker that has outlived its run can move
    anything then. A part is named after the ids in it: a batch that is done again, because its worker died between two
    steps, replaces what it had written.
    """

    output: Path
    checkpoint: Path  # for each part a list of ids, and of what was asked under them
    lease: Path

    @classmethod
    def open(cls, output: Path, checkpoint: Path | None) -> Parts:
        """Make the folders of a run."""
        parts = cls(output, checkpoint or output / "_checkpoint", output / f".writing-{secrets.token_hex(4)}")
        for folder in (parts.output, parts.errors, parts.checkpoint):
            folder.mkdir(parents=True, exist_ok=True)
        return parts

    @property
    def errors(self) -> Path:
        return self.output / "errors"

    def begin(self) -> None:
        """Take over from earlier runs. What had failed is tried again."""
        for lease in self.output.glob(_LEASES):
            gone = lease.rename(lease.with_name(f".gone-{secrets.token_hex(4)}"))
            shutil.rmtree(gone, ignore_errors=True)
        for part in self.errors.glob(_PARTS):
            part.unlink()
        self.lease.mkdir()

    def end(self) -> None:
        """No worker writes any more."""
        shutil.rmtree(self.lease, ignore_errors=True)

    def tries(self, ids: Sequence[Id]) -> int:
        """How often a batch has been begun in this run, this time included."""
        with (self.lease / _name(ids)).with_suffix(".tries").open("ab") as file:
            file.write(b".")
            return file.tell()

    def write(self, rows: Sequence[Sequence[dict[str, Any]]]) -> int:
        """Write a batch: the records of each row. Returns how many rows failed, which go to :attr:`errors`.

        Raises
        ------
        OSError
            Where the folder is not the one that the run began in.
        """
        name = _name([records[0]["id"] for records in rows])
        good, bad = list[dict[str, Any]](), list[dict[str, Any]]()
        for records in rows:
            (bad if any(record["error"] is not None for record in records) else good).extend(records)
        try:
            for folder, records in ((self.output, good), (self.errors, bad)):
                if not records:
                    (folder / name).unlink(missing_ok=True)
                    continue
                with replacing(self.lease / name) as file:
                    for record in records:
                        file.write(to_line(record).encode())
                (self.lease / name).rename(folder / name)
        except FileNotFoundError as error:
            raise OSError(
                f"{self.lease} is gone, or not there on this node: --output must be a folder that all nodes share, and "
                "that no other run has taken over"
            ) from error
        if good:
            self._check_in(name, good)
        return len({record["id"] for record in bad})

    def done(self) -> dict[Id, str]:
        """Ids that need not be done again, and what was asked under them.

        Raises
        ------
        ValueError
            For a file of another kind, naming it.
        """
        for part in self.output.glob(_PARTS):
            if not self._entry(part.name).exists():  # the run ended between the two
                self._check_in(part.name, _records(part))
        return {id_: asked for entry in self.checkpoint.glob("part-*.done") for id_, asked in _entries(entry)}

    def _check_in(self, name: str, records: Sequence[dict[str, Any]]) -> None:
        asked = {record["id"]: fingerprint(record["prompt"], record["seed"], record.get("image")) for record in records}
        with replacing(self._entry(name)) as file:
            file.write(json.dumps(list(asked.items())).encode())

    def _entry(self, name: str) -> Path:
        return (self.checkpoint / name).with_suffix(".done")


def _name(ids: Sequence[Id]) -> str:
    return f"part-{_digest(list(ids))}.jsonl"


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=8).hexdigest()


def fingerprint(prompt: Any, seed: int, image: Any = None) -> str:
    """Stands for what a row asks."""
    return _digest([prompt, seed] if image is None else [prompt, seed, image])


def is_same(row: Row, asked: str) -> bool:
    """Whether a row asks what was asked under its id."""
    return row.error is None and fingerprint(row.prompt, row.seed, row.image) == asked


def _records(part: Path) -> list[dict[str, Any]]:
    try:
        with part.open(encoding="utf-8") as file:
            found = [json.loads(line) for line in file]
        if all({"id", "prompt", "seed", "completion"} <= record.keys() for record in found):
            return found
    except (ValueError, AttributeError, RecursionError):
        pass
    raise ValueError(f"{part} is not a part that this command wrote: name another output, or remove it")


def _entries(entry: Path) -> Iterator[tuple[Id, str]]:
    try:
        yield from ((id_, asked) for id_, asked in json.loads(entry.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{entry} is not what this command wrote: {error}") from error

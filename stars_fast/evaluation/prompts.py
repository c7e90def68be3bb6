"""Prompts of an evaluation: fields of JSON Lines or of a hub data set, in a random order that a seed fixes."""

from __future__ import annotations

import json
import lzma
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class PromptSource:
    """Where prompts come from, and how a row becomes one.

    Parameters
    ----------
    path : str
        JSON Lines, ``.xz`` or plain, or a hub id with the split after a colon: ``stanfordnlp/imdb:test``.
    field : str
        What to read of each row.
    words : int, optional
        Only the first words of the field.
    template : str
        What the policy is given, ``{}`` standing for the field.
    where : dict, optional
        Rows to keep: values of other fields.
    """

    path: str
    field: str = "prompt"
    words: int | None = None
    template: str = "{}"
    where: dict[str, Any] | None = None

    def read(self, count: int, seed: int, calibration: int = 0) -> list[str]:
        """The first ``count + calibration`` different prompts in the seed's order.

        Raises
        ------
        ValueError
            For a row without the field, naming the line, and for fewer prompts than asked for.
        """
        prompts = dict.fromkeys(self._prompt(number, row) for number, row in enumerate(self._rows(), 1))
        if len(prompts) < count + calibration:
            asked = f"{count} (--count)" + (f" + {calibration} for the target" if calibration else "")
            raise ValueError(f"{self.path} has {len(prompts)} different prompts, fewer than {asked}")
        return random.Random(seed).sample(list(prompts), count + calibration)

    def _rows(self) -> Iterable[Any]:
        rows = _json_lines(Path(self.path)) if Path(self.path).exists() else _hub_rows(self.path)
        wanted = (self.where or {}).items()
        return (row for row in rows if all(row.get(name) == value for name, value in wanted))

    def _prompt(self, number: int, row: Any) -> str:
        text = row.get(self.field) if isinstance(row, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{self.path}, row {number}: {self.field}={text!r} is no text; name the field to read")
        words = text.split()
        return self.template.format(" ".join(words[: self.words]))


def _json_lines(path: Path) -> Iterable[Any]:
    with lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}, is not JSON: {error}") from error


def _hub_rows(name: str) -> Iterable[Any]:
    hub_id, _, split = name.partition(":")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(f"no file {name}; to read it as a hub id, install datasets ({error})") from error
    rows: Iterable[Any] = load_dataset(hub_id, split=split or "test")
    return rows

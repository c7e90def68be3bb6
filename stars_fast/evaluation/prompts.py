"""Prompts of an evaluation: fields of JSON Lines or of a hub data set, in a random order that a seed fixes."""

from __future__ import annotations

import json
import lzma
import os
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from stars_fast.evaluation.recipe import Recipe
from stars_fast.methods.numbers import shown
from stars_fast.rows.pictures import image_of, with_pictures

_FIELDS = ("prompt", "messages")  # that are read where none is named


def read_prompts(recipe: Recipe, target: int = 0, sharing: Sequence[str] = ()) -> list[Any]:
    """The first ``count + target + fit`` different prompts in the order of the recipe's seed: text, or chats' messages,
    with the row's ``image`` in them.

    Parameters
    ----------
    recipe : Recipe
    target : int
        Prompts for one target for all. Without methods that share one there may be fewer: they are drawn all the same
        where there are as many, so that the prompts of a run stay the same whatever methods are added to it.
    sharing : sequence of str
        Methods that share a target.

    Raises
    ------
    ValueError
        For a row without the field, naming it by number, and for fewer prompts than are needed.
    """
    assert recipe.prompts is not None
    rows = _json_lines(Path(recipe.prompts)) if Path(recipe.prompts).exists() else _hub_rows(recipe.prompts)
    wanted = (recipe.where or {}).items()
    rows = (row for row in rows if all(row.get(name) == value for name, value in wanted))
    found = (_prompt(recipe, number, row) for number, row in enumerate(rows, 1))
    prompts = {json.dumps(prompt): prompt for prompt in found}
    most = recipe.count + target + recipe.fit
    needed = most if sharing else recipe.count + recipe.fit
    if len(prompts) < needed:
        asked = f"{recipe.count} (--count)" + (f" + {recipe.fit} (--fit)" if recipe.fit else "")
        asked += f" + {target} (for one target of {', '.join(sharing)})" if sharing else ""
        raise ValueError(
            f"{recipe.prompts} has {len(prompts)} different prompts, fewer than {asked}: give {needed - len(prompts)} "
            f"more, or less for --count{' or --fit' if recipe.fit else ''}"
        )
    return random.Random(recipe.seed).sample(list(prompts.values()), len(prompts))[:most]


def _prompt(recipe: Recipe, number: int, row: Any) -> Any:
    fields = row if isinstance(row, dict) else {}
    text, folder = _text(recipe, number, fields), os.path.abspath(os.path.dirname(str(recipe.prompts)))
    try:
        return with_pictures(text, image_of(fields), folder)
    except ValueError as error:
        raise ValueError(f"{recipe.prompts}, row {number}: {error}") from error


def _text(recipe: Recipe, number: int, fields: dict[str, Any]) -> Any:
    name = recipe.field or next((one for one in _FIELDS if fields.get(one) is not None), _FIELDS[0])
    text = fields.get(name)
    if isinstance(text, list) and text and all(isinstance(turn, dict) for turn in text):
        if recipe.words is not None or recipe.template != Recipe.template:
            raise ValueError(f"{recipe.prompts}, row {number}: {name} is a chat: words and template are for text")
        return text
    if not isinstance(text, str) or not text.strip():
        has = ", ".join(map(str, fields)) or "none"
        raise ValueError(
            f"{recipe.prompts}, row {number}: {name}={shown(text)} is neither text nor a chat; name the field to read: "
            f"the row has {has}"
        )
    return recipe.template.format(" ".join(text.split()[: recipe.words]))


def _json_lines(path: Path) -> Iterable[Any]:
    with lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}, is not JSON: {error}") from error


def _hub_rows(name: str) -> Iterable[Any]:
    hub_id, _, split = name.partition(":")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(f"no file {name}; to read it as a hub id, install datasets ({error})") from error
    rows: Iterable[Any] = load_dataset(hub_id, split=split or "test")
    return rows

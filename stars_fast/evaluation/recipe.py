"""What is evaluated on what: the options of ``stars-fast eval``, which a YAML file may set by name."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stars_fast.report.files import read_yaml


@dataclass(frozen=True)
class Recipe:
    """One task. Models and prompts are folders, files or hub ids."""

    policy: str | None = None  # writes
    guide: str | None = None  # the reward that methods follow
    judge: str | None = None  # the reward that decides who wins
    aligned: str | None = None  # a causal LM that was aligned: TreeBoN takes its log-ratio to the policy
    draft: str | None = None  # RSD's draft model
    probe: str | None = None  # MARA's network, as safetensors
    prompts: str | None = None  # JSON Lines, .xz or plain, or a hub id and its split: stanfordnlp/imdb:test
    field: str = "prompt"  # of each row, what to read
    words: int | None = None  # only the first ones of the field
    template: str = "{}"  # what the policy is given, with the field in the braces
    where: dict[str, Any] | None = None  # rows to keep: values of other fields
    count: int = 100  # prompts
    methods: tuple[str, ...] = ("stars", "best_of_n")  # the baseline runs in any case
    budgets: tuple[float, ...] = (2, 4, 8)  # as in stars_fast.evaluation.cells.cells
    settings: dict[str, Any] | None = None  # fields of StarsConfig, for all methods
    parameters: dict[str, dict[str, Any]] | None = None  # by method, its own
    batch_size: int = 16
    seed: int = 0


def read_recipe(path: Path | None, given: dict[str, Any]) -> Recipe:
    """The file's values, and what is given over them where it is not None.

    Raises
    ------
    OSError, ValueError
        For a file that cannot be read, a key that is not known, a budget that is no number.
    """
    values = {} if path is None else read_yaml(path, [field.name for field in dataclasses.fields(Recipe)])
    values |= {name: value for name, value in given.items() if value is not None}
    for name in ("methods", "budgets"):
        if isinstance(values.get(name), str):
            values[name] = values[name].split(",")
    recipe = dataclasses.replace(Recipe(), **values)
    return dataclasses.replace(recipe, methods=tuple(recipe.methods), budgets=tuple(map(_number, recipe.budgets)))


def _number(budget: Any) -> float:
    try:
        return float(budget)
    except (TypeError, ValueError) as error:
        raise ValueError(f"budgets: {budget!r} is no number") from error

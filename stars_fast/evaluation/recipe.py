"""What is evaluated on what: the options of ``stars-fast eval``, which a YAML file may set by name."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stars_fast.report.files import read_yaml


@dataclass(frozen=True)
class Recipe:
    """One task. Models and prompts are folders, files or hub ids.

    Parameters
    ----------
    policy, guide, judge : str, optional
        The model that writes; the reward that methods follow; the reward that decides who wins.
    aligned, draft, probe : str, optional
        Models that some methods want: a causal LM that was aligned, of which TreeBoN takes the log-ratio to the policy;
        RSD's draft model; MARA's network, as safetensors.
    prompts : str
        JSON Lines, ``.xz`` or plain, or a hub id with the split after a colon: ``stanfordnlp/imdb:test``.
    field, words : str, int
        What to read of each row, and how many words of it (None: all).
    template : str
        What the policy is given, ``{}`` standing for the field.
    where : dict, optional
        Rows to keep: values of other fields.
    count : int
        Prompts.
    methods : tuple of str
        The baseline runs in any case.
    budgets : tuple of float
        As in :func:`stars_fast.evaluation.cells.cells`.
    settings : dict, optional
        Fields of StarsConfig for all methods.
    parameters : dict, optional
        By method, its own parameters.
    batch_size, seed : int
    """

    policy: str | None = None
    guide: str | None = None
    judge: str | None = None
    aligned: str | None = None
    draft: str | None = None
    probe: str | None = None
    prompts: str | None = None
    field: str = "prompt"
    words: int | None = None
    template: str = "{}"
    where: dict[str, Any] | None = None
    count: int = 100
    methods: tuple[str, ...] = ("stars", "best_of_n")
    budgets: tuple[float, ...] = (2, 4, 8)
    settings: dict[str, Any] | None = None
    parameters: dict[str, dict[str, Any]] | None = None
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

"""What is evaluated on what: the options of ``stars-fast eval``, which a YAML file may set by name."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


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
    prompts, field, words, template, where
        As in :class:`stars_fast.evaluation.prompts.PromptSource`.
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
    values = {} if path is None else _read_file(path)
    values |= {name: value for name, value in given.items() if value is not None}
    for name in ("methods", "budgets"):
        if isinstance(values.get(name), str):
            values[name] = values[name].split(",")
    recipe = dataclasses.replace(Recipe(), **values)
    return dataclasses.replace(recipe, methods=tuple(recipe.methods), budgets=tuple(map(_number, recipe.budgets)))


def _read_file(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}: write one `name: value` a line")
    known = [one.name for one in dataclasses.fields(Recipe)]
    unknown = sorted(set(map(str, values)) - set(known))
    if unknown:
        raise ValueError(f"{path}: unknown {', '.join(map(repr, unknown))}; known are {', '.join(known)}")
    return values


def _number(budget: Any) -> float:
    try:
        return float(budget)
    except (TypeError, ValueError) as error:
        raise ValueError(f"budgets: {budget!r} is no number") from error

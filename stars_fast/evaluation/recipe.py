"""What is evaluated on what: the options of ``stars-fast eval``, which a YAML file may set by name."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from stars_fast.report.files import read_yaml


class Asked(NamedTuple):
    """A method, or one of the ways to use it, and its own budgets where it has any."""

    name: str
    budgets: tuple[float, ...] | None = None


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
    field: str | None = None  # of each row, what to read: "prompt", or else "messages", a chat
    words: int | None = None  # only the first ones of the field
    template: str = "{}"  # what the policy is given, with the field in the braces
    where: dict[str, Any] | None = None  # rows to keep: values of other fields
    count: int = 100  # prompts
    # Names as in stars_fast.evaluation.cells.cells, or a name with its budgets, as in `stars+fit: [2, 4]`; the baseline
    # runs in any case.
    methods: tuple[Asked, ...] = (Asked("stars"), Asked("best_of_n"))
    budgets: tuple[float, ...] = (2, 4, 8)  # of methods without their own
    settings: dict[str, Any] | None = None  # fields of StarsConfig, for all methods
    parameters: dict[str, dict[str, Any]] | None = None  # by name, its own
    fit: int = 0  # further prompts from which a fit is learned, once, for the methods "+fit"
    pairs: tuple[tuple[str, str], ...] = ()  # of methods that are compared at equal tokens and at equal budgets
    batch_size: int = 16
    seed: int = 0
    repeats: int = 1  # answers to each prompt under each method: the random numbers are those of seed, seed + 1, ...

    @property
    def asked(self) -> list[Asked]:
        """The methods, each with its budgets."""
        return [Asked(name, self.budgets if budgets is None else budgets) for name, budgets in self.methods]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the methods, as in ``stars_fast.methods.METHODS``."""
        return tuple(dict.fromkeys(name.partition("+")[0] for name, _ in self.methods))


def read_recipe(path: Path | None, given: dict[str, Any]) -> Recipe:
    """The file's values, and what is given over them where it is not None.

    Raises
    ------
    OSError, ValueError
        For a file that cannot be read, a key that is not known, a budget that is no finite number, a template that has
        other places to fill than the field's.
    """
    values = {} if path is None else read_yaml(path, [field.name for field in dataclasses.fields(Recipe)])
    values |= {name: value for name, value in given.items() if value is not None}
    for name in ("methods", "budgets"):
        if isinstance(values.get(name), str):
            values[name] = values[name].split(",")
    recipe = dataclasses.replace(Recipe(), **values)
    _check_template(recipe.template)
    methods = tuple(map(_asked, recipe.methods))
    budgets, pairs = tuple(map(_number, recipe.budgets)), tuple(map(_pair, recipe.pairs))
    return dataclasses.replace(recipe, methods=methods, budgets=budgets, pairs=pairs)


def _check_template(template: Any) -> None:
    try:
        has_place = "\0" in template.format("\0")  # which raises for any further place
    except (AttributeError, LookupError, TypeError, ValueError):
        has_place = False
    if not has_place:
        raise ValueError(
            f"template={template!r} must have {{}} where the field stands, and no other braces ({{{{ and }}}} are text)"
        )


def _asked(entry: Any) -> Asked:
    if isinstance(entry, (str, Asked)):
        return Asked(entry) if isinstance(entry, str) else entry
    if not isinstance(entry, dict) or len(entry) != 1 or not isinstance(budgets := next(iter(entry.values())), list):
        raise ValueError(f"methods: {entry!r} is neither a name nor `name: [budget, ...]`")
    return Asked(str(next(iter(entry))), tuple(map(_number, budgets)))


def _pair(entry: Any) -> tuple[str, str]:
    if not isinstance(entry, (list, tuple)) or len(entry) != 2:
        raise ValueError(f"pairs: {entry!r} is not two methods")
    return str(entry[0]), str(entry[1])


def _number(budget: Any) -> float:
    try:
        number = float(budget)
    except (TypeError, ValueError) as error:
        raise ValueError(f"budgets: {budget!r} is no number") from error
    if not math.isfinite(number):
        raise ValueError(f"budgets: {budget!r} is not finite")
    return number

"""Methods at budgets: which setting scales what a method spends, so that methods can be compared at equal compute."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stars_fast.config import StarsConfig


@dataclass(frozen=True)
class Cell:
    """One method at one budget."""

    method: str
    budget: float | None  # None where nothing scales the method's compute
    config: StarsConfig
    acceptance: float | None = None  # expected share of candidates accepted, which one target for all prompts gives

    @property
    def name(self) -> str:
        return self.method if self.budget is None else f"{self.method}@{self.budget:g}"


def cells(methods: Sequence[str], budgets: Sequence[float], config: StarsConfig) -> list[Cell]:
    """Every method at every budget, the baseline first.

    Raises
    ------
    ValueError
        For a method that is not known, or a budget below 1.
    """
    bad = [budget for budget in budgets if not budget >= 1]
    if bad:
        raise ValueError(f"budgets: {bad[0]:g} is below 1, the compute of one unguided response")
    made = []
    for method in dict.fromkeys(("vanilla", *methods)):
        if method not in _SCALES:
            raise ValueError(f"methods: {method!r} is unknown; known are {', '.join(_SCALES)}")
        scale = _SCALES[method]
        made += [scale(method, budget, config) for budget in (budgets if scale is not _fixed else [math.nan])]
    return made


def _fixed(method: str, budget: float, config: StarsConfig) -> Cell:
    return Cell(method, None, config.replace(target_reward=-math.inf, max_attempts=1, candidates=1))


def _best_of_n(method: str, budget: float, config: StarsConfig) -> Cell:
    whole = config.replace(target_reward=math.inf, max_attempts=int(budget), segment_length=config.max_new_tokens)
    return Cell(method, budget, whole)


def _blockwise(method: str, budget: float, config: StarsConfig) -> Cell:
    return Cell(method, budget, config.replace(target_reward=math.inf, max_attempts=int(budget)))


def _by_acceptance(method: str, budget: float, config: StarsConfig) -> Cell:
    return Cell(method, budget, config, acceptance=1 / budget)


_SCALES: dict[str, Callable[[str, float, StarsConfig], Cell]] = {
    "vanilla": _fixed,
    "best_of_n": _best_of_n,
    "blockwise_best_of_n": _blockwise,
    "stars": _by_acceptance,
}

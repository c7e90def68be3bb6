"""Methods at budgets: which setting scales what a method spends, so that methods can be compared at equal compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stars_fast.config import StarsConfig
from stars_fast.methods import METHODS, Method

BASELINE = "vanilla"
# Parameter that a budget sets: candidates side by side, or tokens looked at.
_COUNTED = {
    "best_of_n": "n",
    "blockwise_best_of_n": "n",
    "treebon": "n",
    "particle_filter": "particles",
    "args": "top_k",
}
# A budget of B is an expected acceptance of 1 / B.
_ACCEPTING = ("stars", "cards", "rejection_sampling")
_STOPPING = "optimal_stopping"  # a budget of B is one of B candidates a segment
_BRANCHING = 4  # TreeBoN's, where the budget has room for it


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


def cells(
    methods: Sequence[str],
    budgets: Sequence[float],
    config: StarsConfig,
    parameters: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Cell]:
    """Every method at every budget, the baseline first.

    A budget of B is about B unguided responses' worth of policy tokens: N of best-of-N, blockwise best-of-N and
    TreeBoN, the particles of a particle filter, the tokens ARGS scores per position, optimal stopping's candidates a
    segment; for methods that accept or reject, an expected acceptance of 1 / B. Methods that nothing scales have one
    cell.

    Parameters
    ----------
    methods : sequence of str
        Names in ``stars_fast.methods.METHODS``.
    budgets : sequence of float
    config : StarsConfig
        For all cells; its method is replaced.
    parameters : mapping, optional
        By a method's name, its further parameters.

    Raises
    ------
    ValueError
        For a method that is not known, or a budget below 1 or not whole where it counts something.
    """
    parameters = parameters or {}
    unknown = [name for name in (*methods, *parameters) if name not in METHODS]
    if unknown:
        raise ValueError(f"methods: {unknown[0]!r} is unknown; known are {', '.join(METHODS)}")
    made = []
    for name in dict.fromkeys((BASELINE, *methods)):
        own = dict(parameters.get(name, {}))
        scaled = name in _COUNTED or name in _ACCEPTING or name == _STOPPING
        made += [_cell(name, budget, config, own) for budget in (budgets if scaled else [None])]
    return made


def _cell(name: str, budget: float | None, config: StarsConfig, parameters: dict[str, Any]) -> Cell:
    if budget is not None and not budget >= 1:
        raise ValueError(f"budgets: {budget:g} is below 1, the compute of one unguided response")
    if budget is not None and name in _COUNTED:
        if budget != int(budget):
            raise ValueError(f"budgets: {budget:g} is not whole, and {name} counts {_COUNTED[name]} by it")
        parameters = {_COUNTED[name]: int(budget), **parameters}
        if name == "treebon":
            parameters.setdefault("branching", _BRANCHING if budget >= 2 * _BRANCHING else min(2, int(budget)))
    if budget is not None and name == _STOPPING:
        parameters = {"budget": budget, **parameters}
    method: Method = METHODS[name](**parameters)
    acceptance = 1 / budget if budget is not None and name in _ACCEPTING else None
    return Cell(name, budget, config.replace(method=method), acceptance)

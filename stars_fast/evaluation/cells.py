"""Methods at budgets: which setting scales what a method spends, so that methods can be compared at equal compute."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stars_fast.config import StarsConfig
from stars_fast.evaluation.recipe import Asked
from stars_fast.methods import METHODS, Method

BASELINE = "vanilla"
# Ways to use a method: with what is learned once, and with targets from pilot responses to each prompt.
FIT, PILOTS = "fit", "pilots"
# Parameter that a budget sets: candidates side by side, or tokens looked at.
_COUNTED = {
    "best_of_n": "n",
    "blockwise_best_of_n": "n",
    "treebon": "n",
    "particle_filter": "particles",
    "args": "top_k",
}
# A budget of B is an expected acceptance of 1 / B.
ACCEPTING = ("stars", "cards", "rejection_sampling")
_STOPPING = "optimal_stopping"  # a budget of B is one of B candidates a segment
_MOST_OVER = 4  # of B: where it has to end. With StarsConfig's own 20, a budget of 16 would leave it little to save
_CHAINS = ("metropolis_hastings", "power_sampling")  # a budget of B is as many steps as draw B answers' tokens
_BRANCHING = 4  # TreeBoN's, where the budget has room for it


@dataclass(frozen=True)
class Cell:
    """One method, used in one way, at one budget."""

    label: str  # as it was asked for: the method, "+" and the way
    budget: float | None  # None where nothing scales the method's compute
    config: StarsConfig
    acceptance: float | None = None  # expected share of candidates accepted, which one target for all prompts gives

    @property
    def name(self) -> str:
        return self.label if self.budget is None else f"{self.label}@{self.budget:g}"

    @property
    def method(self) -> str:
        return self.label.partition("+")[0]

    @property
    def way(self) -> str:
        return self.label.partition("+")[2]


def cells(
    asked: Sequence[Asked], config: StarsConfig, parameters: Mapping[str, Mapping[str, Any]] | None = None
) -> list[Cell]:
    """Every method at each of its budgets, the baseline first.

    A budget of B is about B unguided responses' worth of policy tokens: N of best-of-N, blockwise best-of-N and
    TreeBoN, the particles of a particle filter, the tokens ARGS scores per position, optimal stopping's candidates a
    segment, the steps of a Markov chain that redraw as much; for methods that accept or reject, an expected acceptance
    of 1 / B. Methods that nothing scales have one cell.

    Parameters
    ----------
    asked : sequence of Asked
        Names in ``stars_fast.methods.METHODS``, or a name, "+" and a way to use it. "fit" is with what is learned once,
        "pilots" (stars, cards, rejection_sampling) with a target for each prompt from pilot responses to it, whose
        tokens count; any other way is a name in ``parameters``. Each has its budgets.
    config : StarsConfig
        For all cells; its method is replaced.
    parameters : mapping, optional
        By a method's name, its further parameters, which its ways have, too; by a way's full name, its own.

    Raises
    ------
    ValueError
        For a method or way that is not known, or a budget below 1 or not whole where it counts something.
    """
    parameters = parameters or {}
    made: dict[str, Cell] = {}
    for label, budgets in (Asked(BASELINE), *asked):
        name, _, way = label.partition("+")
        _check(name, way, label, parameters)
        own = {**parameters.get(name, {}), **(parameters.get(label, {}) if way else {})}
        scaled = name in _COUNTED or name in ACCEPTING or name == _STOPPING or name in _CHAINS
        for budget in (budgets or ()) if scaled else [None]:
            cell = _cell(label, budget, config, own)
            made.setdefault(cell.name, cell)
    return list(made.values())


def share_a_target(asked: Sequence[Asked]) -> list[str]:
    """Those with one target for all prompts, which is solved for on prompts of its own."""
    parts = ((label, *label.partition("+")[::2], budgets) for label, budgets in asked)
    return [label for label, name, way, budgets in parts if name in ACCEPTING and way not in (FIT, PILOTS) and budgets]


def _check(name: str, way: str, label: str, parameters: Mapping[str, Any]) -> None:
    for one in (name, *(key.partition("+")[0] for key in parameters)):
        if one not in METHODS:
            raise ValueError(f"methods: {one!r} is unknown; known are {', '.join(METHODS)}")
    if way == FIT and not METHODS[name].uses_fit:
        able = ", ".join(method for method in METHODS if METHODS[method].uses_fit)
        raise ValueError(f"methods: {label!r}, but {name} has no use for a fit; {able} have")
    if way == PILOTS and name not in ACCEPTING:
        raise ValueError(f"methods: {label!r}, but {name} has no target; {', '.join(ACCEPTING)} have")
    if way and way not in (FIT, PILOTS) and label not in parameters:
        raise ValueError(f"methods: {label!r} is {FIT}, {PILOTS} or a name in parameters; {label!r} is in none")


def _cell(label: str, budget: float | None, config: StarsConfig, parameters: dict[str, Any]) -> Cell:
    name, _, way = label.partition("+")
    if budget is not None:
        if not budget >= 1:
            raise ValueError(f"budgets: {budget:g} is below 1, the compute of one unguided response")
        if budget == 1 and name in ACCEPTING and way in (FIT, PILOTS):
            raise ValueError(f"budgets: 1 leaves {label} nothing to reject; give more")
        parameters = {**_scaled(name, budget, config), **parameters}
        if name in _CHAINS and not parameters["steps"]:
            raise ValueError(f"budgets: {budget:g} leaves {label} no step behind the first answer; give more")
    method: Method = METHODS[name](**parameters)
    acceptance = 1 / budget if budget is not None and name in ACCEPTING else None
    if budget is not None and name == _STOPPING:
        config = config.replace(max_attempts=max(config.max_attempts, _MOST_OVER * math.ceil(budget)))
    if acceptance is not None and way in (FIT, PILOTS):
        return Cell(label, budget, config.replace(method=method, acceptance=acceptance))
    return Cell(label, budget, config.replace(method=method), acceptance)


def _scaled(name: str, budget: float, config: StarsConfig) -> dict[str, Any]:
    """The parameters that a budget sets."""
    if name == _STOPPING:
        return {"budget": budget}
    if name in _CHAINS:
        return {"steps": steps(budget, math.ceil(config.max_new_tokens / config.segment_length))}
    if name not in _COUNTED:
        return {}
    if budget != int(budget):
        raise ValueError(f"budgets: {budget:g} is not whole, and {name} counts {_COUNTED[name]} by it")
    counted = {_COUNTED[name]: int(budget)}
    if name == "treebon":
        counted["branching"] = _BRANCHING if budget >= 2 * _BRANCHING else min(2, int(budget))
    return counted


def steps(budget: float, segments: int) -> int:
    """Steps of a chain on answers of so many segments that draw, with the first answer, the tokens of ``budget`` ones.

    A step redraws what follows a cut that is uniform on the n segments' starts: ``(n + 1) / (2 n)`` of an answer.
    """
    return round((budget - 1) * 2 * segments / (segments + 1))

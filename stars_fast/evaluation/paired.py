"""Methods against each other on the same prompts: at equal policy tokens, at equal budgets and up to a yardstick."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from stars_fast.evaluation.cells import BASELINE
from stars_fast.evaluation.metrics import Interval, interval, resamples
from stars_fast.evaluation.tables import YARDSTICK, Row

SCORERS = ("guide", "judge")
YARDSTICK_BUDGET = 16


class Point(NamedTuple):
    """A method at a budget."""

    cost: float  # policy tokens of an answer, in an unguided one's
    rewards: np.ndarray  # [prompts]


class Reached(NamedTuple):
    """What a method costs where it reaches a reward."""

    cost: float  # policy tokens of an answer, in an unguided one's
    at_most: bool  # its smallest budget is beyond the reward


@dataclass(frozen=True)
class Comparison:
    """One method less another, on one scorer's rewards."""

    method: str
    other: str
    scorer: str
    budget: float | None  # of the method; of the other, too, where both are at the same
    cost: float  # policy tokens of an answer, in an unguided one's
    other_cost: float
    difference: Interval | None  # None at tokens that the other's budgets do not span
    ratio: Interval | None = None  # of what both gain on the baseline; at equal cost only


def cost_to_reach(points: Sequence[tuple[float, float]], reward: float) -> Reached | None:
    """Where rewards reach a height, linear in the log of the cost between budgets; None where none does.

    Parameters
    ----------
    points : sequence of (float, float)
        Cost and mean reward, of each budget.
    """
    below: tuple[float, float] | None = None
    for cost, value in sorted(points):
        if value >= reward:
            if below is None:
                return Reached(cost, at_most=True)
            share = (reward - below[1]) / (value - below[1])
            return Reached(below[0] * (cost / below[0]) ** share, at_most=False)
        below = cost, value
    return None


def to_reach(rows: Sequence[Row]) -> dict[str, dict[str, Reached | None]]:
    """By method and scorer, what it takes to reach the reward of best-of-16; empty where that was not run."""
    goal = next((row for row in rows if (row.method, row.budget) == (YARDSTICK, YARDSTICK_BUDGET)), None)
    if goal is None:
        return {}
    of = {name: [row for row in rows if row.method == name] for name in dict.fromkeys(row.method for row in rows)}
    return {
        name: {
            scorer: cost_to_reach(
                [(row.answers, getattr(row, scorer).value) for row in points], getattr(goal, scorer).value
            )
            for scorer in SCORERS
        }
        for name, points in of.items()
    }


def at_equal_tokens(point: Point, others: Sequence[Point], baseline: np.ndarray) -> tuple[Interval, Interval] | None:
    """A method less another one, and the ratio of what both gain on the baseline, at the method's policy tokens.

    The other's mean reward is linear in the log of the policy tokens between its budgets; the baseline is its budget
    of 1. Prompts are resampled for all of them together; tokens are taken as they are. None where the other has no
    budget as large.

    Parameters
    ----------
    point : Point
    others : sequence of Point
        The other method's budgets.
    baseline : ndarray
        Its rewards ``[prompts]``.
    """
    ladder = sorted([Point(1.0, baseline), *others], key=lambda one: one.cost)
    above = next((i for i, one in enumerate(ladder) if one.cost >= point.cost), None)
    if not above:
        return None
    low, high = ladder[above - 1], ladder[above]
    share = math.log(point.cost / low.cost) / math.log(high.cost / low.cost)
    other = (1 - share) * low.rewards + share * high.rewards  # of each prompt: means are linear in it
    mine, its, unguided = map(resamples, (point.rewards, other, baseline))
    difference = interval(float((point.rewards - other).mean()), mine - its)
    gain = float((point.rewards - baseline).mean() / (other - baseline).mean())
    return difference, interval(gain, (mine - unguided) / (its - unguided))


def compare(
    rows: Sequence[Row], rewards: Mapping[str, Mapping[str, Mapping[int, float]]], pairs: Sequence[Sequence[str]]
) -> tuple[list[Comparison], list[Comparison]]:
    """Pairs of methods at equal policy tokens, without a difference where the other has no budget as dear, and at equal
    budgets.

    Parameters
    ----------
    rows : sequence of Row
    rewards : mapping
        By scorer and cell, the mean reward of each prompt, by place; see :func:`stars_fast.evaluation.tables.rewards`.
    pairs : sequence of (str, str)
        Methods; those that were not run are left out.
    """
    equal_tokens, equal_budgets = [], []
    for method, other in pairs:
        mine, its = ([row for row in rows if row.method == name] for name in (method, other))
        first = next(row for row in rows if row.method == BASELINE)
        cells = [row.cell for row in (first, *mine, *its)]
        for scorer in SCORERS if mine and its else ():
            places = set.intersection(*(set(rewards[scorer][cell]) for cell in cells))
            values = {cell: np.array([rewards[scorer][cell][place] for place in sorted(places)]) for cell in cells}
            ladder = [Point(row.answers, values[row.cell]) for row in its]
            for row in mine:
                cost, here = row.answers, values[row.cell]
                found = at_equal_tokens(Point(cost, here), ladder, values[first.cell]) or (None, None)
                equal_tokens.append(Comparison(method, other, scorer, row.budget, cost, cost, *found))
                for same in (one for one in its if one.budget == row.budget):
                    off = here - values[same.cell]
                    difference = interval(float(off.mean()), resamples(off))
                    head = (method, other, scorer, row.budget, cost, same.answers)
                    equal_budgets.append(Comparison(*head, difference=difference))
    return equal_tokens, equal_budgets

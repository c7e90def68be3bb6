"""Optimal stopping: a segment's candidates are drawn until the best so far is worth more than drawing on."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np

from stars_fast.methods.base import Method, SettingsT
from stars_fast.methods.fit import Fit, SegmentLaw
from stars_fast.methods.numbers import real

# When a cost is solved for: simulated segments; most of them in an answer (later ones are like those before); orders of
# the candidates of a prefix that was met.
_SIMULATED, _LONGEST, _ORDERS = 1600, 32, 4
# Degrees of freedom that the expected spread of a prefix is worth, and candidates that the fit's shape is worth: half
# and twice as many are as good (docs/findings/optimal-stopping.md).
_SPREAD_WORTH, _SHAPE_WORTH = 12.0, 8.0
# Candidates that the reward of the prefix is worth as a forecast of their mean, where no fit says it.
_PREFIX_WORTH = 3.0


class Shape:
    """A law of mean 0 and spread 1, given by atoms of equal weight, ascending, and what is to be gained from it."""

    def __init__(self, atoms: Sequence[float]) -> None:
        z, left = np.array(atoms), len(atoms) - np.arange(len(atoms))
        gains = (np.cumsum(z[::-1])[::-1] - left * z) / len(z)  # E (Z - u)^+ at each atom; linear in between
        self._atoms, self._losses = z, -gains
        self._falling, self._points = (-gains).tolist(), z.tolist()

    def reservation(self, cost: float) -> float:
        """The u with ``E (Z - u)^+ = cost``; inf where it costs nothing to draw on."""
        if cost == 0.0:
            return math.inf
        falling, z = self._falling, self._points
        i = bisect_left(falling, -cost)
        if i == 0:
            return z[0] - cost - falling[0]
        if i == len(z):
            return z[-1]
        return z[i - 1] + (z[i] - z[i - 1]) * (falling[i - 1] + cost) / (falling[i - 1] - falling[i])

    def reservations(self, costs: np.ndarray) -> np.ndarray:
        """The same of positive costs."""
        below = self._atoms[0] - costs - self._losses[0]
        return np.where(-costs <= self._losses[0], below, np.interp(-costs, self._losses, self._atoms))


@lru_cache(maxsize=8)
def _shape(atoms: tuple[float, ...]) -> Shape:
    return Shape(atoms)


NORMAL = tuple(NormalDist().inv_cdf((i + 0.5) / 400) for i in range(400))


class Search(Protocol):
    """One segment's search after the other, by what is expected of the next candidate."""

    def begin(self, segment: int, before: float | None) -> None:
        """A segment begins, or begins anew, behind a prefix with this reward; None at the first."""

    def see(self, reward: float) -> None:
        """A further candidate."""

    @property
    def threshold(self) -> float:
        """What the best of those seen has to reach; inf where there is nothing to go by yet."""

    def worth(self, final: float) -> float:
        """Of a candidate that ends the answer, beside those that do not: the reward of one of these that is as good."""


class Seen:
    """Candidates of a segment, by their sums around a centre."""

    def __init__(self, centre: float) -> None:
        self.centre, self.count, self.total, self.squares = centre, 0, 0.0, 0.0

    def see(self, reward: float) -> None:
        self.count += 1
        self.total += reward - self.centre
        self.squares += (reward - self.centre) ** 2

    @property
    def within(self) -> float:
        """Squares around the mean of those seen."""
        return _within(self.count, self.total, self.squares) if self.count else 0.0


def _within(count: Any, total: Any, squares: Any) -> Any:
    return abs(squares - total * total / count)  # rounding may leave less than nothing


class Prior(NamedTuple):
    """Of the candidates behind a prefix, before one is seen; numbers, or arrays of them."""

    centre: Any
    variance: Any  # within the prefix
    worth: Any  # candidates, the centre is

    def enough(self, seen: Any, total: Any, squares: Any, cost: Any, reservation: Callable[[Any], Any]) -> Any:
        """See :class:`Forecast`; of ``seen`` candidates, by their sums around the centre."""
        within = _within(seen, total, squares)
        variance = (_SPREAD_WORTH * self.variance + within) / (_SPREAD_WORTH + seen - 1)
        spread = (variance * (1 + 1 / (self.worth + seen))) ** 0.5
        expected = self.centre + total / (self.worth + seen)
        return expected + spread * reservation(cost * (_SHAPE_WORTH + seen) / _SHAPE_WORTH / spread)


def prior(law: SegmentLaw, before: float) -> Prior:
    variance = law.variance(before)
    return Prior(law.centre(before), variance, variance / law.between**2)


class Forecast:
    """By a fit, and by the segment's own candidates: enough is where a further one, V, gains over the best so far, b,
    what it costs (Weitzman 1979; of a law that is being learned: Rothschild 1974).

    The mean of V has the posterior of a normal mean under the fit's law; its spread is shrunk to the expected one,
    which is worth twelve degrees of freedom; its shape is the fit's. That shape is worth eight candidates (a Dirichlet
    prior): as those seen are at most b, ``E (V - b)^+ = 8 / (8 + seen) * E_shape (V - b)^+``.

    Parameters
    ----------
    fit : Fit
    cost : float
        Of a candidate, in the reward's units.
    budget : float
        Candidates a segment with which answers go on.
    """

    def __init__(self, fit: Fit, cost: float, budget: float) -> None:
        self.fit, self.cost, self.budget = fit, cost, budget
        self._shape = _shape(fit.levels)
        self.begin(0, None)

    def begin(self, segment: int, before: float | None) -> None:
        self._law = self.fit.law(segment)
        self._prior = prior(self._law, before or 0.0)
        self._seen = Seen(self._prior.centre)

    def see(self, reward: float) -> None:
        self._seen.see(reward)

    @property
    def threshold(self) -> float:
        seen = self._seen
        return float(
            self._prior.enough(seen.count, seen.total, seen.squares, self.cost, self._shape.reservation)
            if seen.count
            else math.inf
        )

    def worth(self, final: float) -> float:
        return self._law.unfinished(final, self.budget)


class Experience:
    """By the request's own candidates alone, their law being taken for normal: Weitzman's rule (1979), stop once the
    best reaches ``mean + spread * u`` with ``E (Z - u)^+ = cost``.

    The mean is that of the segment's candidates and of the prefix's reward, which is worth three of them, unless that
    is -inf; the spread is that within all segments so far.

    Parameters
    ----------
    cost : float
        Of a candidate, in standard deviations of a segment's candidates.
    budget : float
        Candidates of a segment before rewards that do not vary say anything. Of twice as many, less one, the best is
        enough: a request that misjudges the spread would overspend.
    """

    def __init__(self, cost: float, budget: float) -> None:
        self.cost, self.least, self.most = cost, round(budget), math.ceil(2 * budget - 1)
        self._segment, self._seen = -1, Seen(0.0)
        self._past, self._degrees = 0.0, 0  # squares within the segments before, and their degrees of freedom

    def begin(self, segment: int, before: float | None) -> None:
        if segment != self._segment and self._seen.count:
            self._past, self._degrees = self._past + self._seen.within, self._degrees + self._seen.count - 1
        before = None if before == -math.inf else before
        self._segment, self._seen = segment, Seen(before or 0.0)
        self._worth = _PREFIX_WORTH * (before is not None)

    def see(self, reward: float) -> None:
        self._seen.see(reward)

    @property
    def threshold(self) -> float:
        seen = self._seen.count
        if seen >= self.most:
            return -math.inf
        degrees = self._degrees + seen - 1
        spread = math.sqrt((self._past + self._seen.within) / degrees) if degrees > 0 else 0.0
        nothing_known = self._worth + seen == 0 or (spread == 0.0 and seen < max(self.least, 2))
        if nothing_known or self.cost == 0.0:  # which may be 0 times infinity
            return math.inf
        widened = math.sqrt(1 + 1 / (self._worth + seen))  # by what is not known of the mean
        mean = self._seen.centre + self._seen.total / (self._worth + seen)
        return mean + spread * widened * _shape(NORMAL).reservation(self.cost / widened)

    def worth(self, final: float) -> float:
        return final


def replayed(fit: Fit, attempts: int, segments: int) -> Callable[[float], float]:
    """By cost, the candidates a segment in answers of so many segments, at the prefixes that the fit has met: each with
    its own candidates in some orders, and beyond those with any of them again. The same orders for all costs.
    """
    random, weights, looks = np.random.default_rng(0), [], []
    for segment, met in enumerate(fit.prefixes[:segments]):
        priors = [prior(fit.laws[segment], one.before) for one in met for _ in range(_ORDERS)]
        of = Prior(*(np.array(column)[:, None] for column in zip(*priors, strict=True)))  # [n, 1]
        rewards = np.array([_some(one.rewards, attempts, random) for one in met for _ in range(_ORDERS)])  # [n, m]
        looks.append((of, *_sums(rewards - of.centre), np.maximum.accumulate(rewards, 1)))
        weights.append(1)
    weights[-1] += segments - len(weights)  # later ones are like the last
    shape = _shape(fit.levels)

    def expected(cost: float) -> float:
        counts = [
            _first(best >= of.enough(seen, total, squares, cost, shape.reservations)).mean()
            for of, seen, total, squares, best in looks
        ]
        return float(np.average(counts, weights=weights))

    return expected


def _some(rewards: Sequence[float], count: int, random: np.random.Generator) -> np.ndarray:
    """So many of a prefix's candidates: those that were drawn in some order, then any of them."""
    drawn = random.permutation(rewards)[:count]
    return np.concatenate([drawn, random.choice(rewards, size=count - len(drawn))])


def _sums(off: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How many, their sum and their squares, of the first ones of each row ``[n, m]``, for each m."""
    return np.arange(1, off.shape[1] + 1.0), np.cumsum(off, 1), np.cumsum(off**2, 1)


def _first(enough: np.ndarray) -> np.ndarray:
    """How many are looked at in each row, all where it is never enough."""
    return np.where(enough.any(1), enough.argmax(1) + 1, enough.shape[1])


def simulated(budget: float, attempts: int, segments: int) -> Callable[[float], float]:
    """By cost, the candidates a segment without a fit: rewards are normal, and means of prefixes vary."""
    one = Experience(0.0, budget)
    requests, most = max(_SIMULATED // segments, 1), min(attempts, one.most)
    random = np.random.default_rng(0)
    means = _PREFIX_WORTH**-0.5 * random.standard_normal((segments, requests, 1))
    noise = means + random.standard_normal((segments, requests, most))  # around the reward of the prefix
    rows = np.arange(requests)

    def expected(cost: float) -> float:
        past = degrees = np.zeros(requests)
        looked, known = 0.0, 0.0
        for off in noise:
            seen, total, squares = _sums(off)
            free = degrees[:, None] + seen - 1
            spread = np.sqrt((past[:, None] + _within(seen, total, squares)) / np.maximum(free, 1))
            widened = np.sqrt(1 + 1 / (known + seen))
            threshold = total / (known + seen) + spread * widened * _shape(NORMAL).reservations(cost / widened)
            counts = _first((np.maximum.accumulate(off, 1) >= threshold) & (free > 0))
            past = past + _within(seen, total, squares)[rows, counts - 1]
            degrees, known = degrees + counts - 1, _PREFIX_WORTH
            looked += counts.mean()
        return float(looked / segments)

    return expected


@lru_cache(maxsize=256)
def cost_for(budget: float, attempts: int, segments: int, fit: Fit | None) -> float:
    """The cost at which so many candidates a segment are to be expected in answers of so many segments, by bisection of
    its logarithm. Early segments take more of them.
    """
    if budget >= attempts:
        return 0.0
    attempts = min(attempts, max(32, 4 * math.ceil(budget)))  # further ones are hardly ever reached
    segments = min(segments, _LONGEST)
    expected = simulated(budget, attempts, segments) if fit is None else replayed(fit, attempts, segments)
    scale = 1.0 if fit is None else max(math.sqrt(law.variance(law.lowest)) for law in fit.laws)
    low, high = 1e-5 * scale, 10 * scale
    while high > 1.02 * low:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if expected(middle) > budget else (low, middle)
    return min(low, high, key=lambda one: abs(math.log(expected(one) / budget)))


@dataclass(frozen=True)
class OptimalStopping(Method):
    """Segments by optimal stopping: candidates are drawn until the best of them is worth more than drawing on.

    A candidate costs as much reward as makes ``budget`` of them the expected number a segment; drawing goes on while
    the best so far is below the reservation value (Weitzman 1979, "Optimal search for the best alternative"; for whole
    answers: arXiv 2510.01394). Which rewards to expect says ``StarsConfig(fit=...)``; without a fit the request's own
    candidates do (docs/methods.md). The best is committed, not the last. It is a search: no law of the text is
    promised, but the text of a seed does not depend on ``candidates``, batch or neighbours.

    Parameters
    ----------
    budget : float
        Expected candidates a segment, from 1 (plain sampling) to 256. Where it is ``StarsConfig.max_attempts`` or more,
        all of these are looked at, and near it little is left to save: ``max_attempts`` of four budgets leaves it free.
        Without a fit no segment takes twice as many. A fit knows ``samples`` candidates of a prefix; budgets beyond
        half of them may be missed by more than a fifth.
    """

    name: ClassVar[str] = "optimal_stopping"
    loop: ClassVar[str] = "stopping"
    has_target: ClassVar[bool] = False
    uses_fit: ClassVar[bool] = True
    budget: float = 4.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", real("optimal_stopping: budget", self.budget, 1.0, 256.0))

    def rule(self, config: SettingsT) -> SettingsT:
        return config.replace(target_reward=0.0, base_reward=0.0)  # which nothing is tested against

    @property
    def expected_acceptance(self) -> float:
        return 1 / self.budget

    def search(self, fit: Fit | None, attempts: int, segments: int) -> Search:
        """A request's, for an answer of so many segments, at the cost that spends the budget."""
        cost = cost_for(self.budget, attempts, segments, fit)
        return Experience(cost, self.budget) if fit is None else Forecast(fit, cost, self.budget)

"""Optimal stopping: a segment's candidates are drawn until the best so far is worth more than drawing on."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist, fmean
from typing import ClassVar, Protocol

import numpy as np

from stars_fast.methods.base import Method, SettingsT
from stars_fast.methods.fit import Fit
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
        self.atoms, self._falling, self._points = z, (-gains).tolist(), z.tolist()

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

    def mean(self, worth: float) -> float:
        """Of those seen and of the centre, which counts as so many."""
        return self.centre + self.total / (worth + self.count)

    @property
    def within(self) -> float:
        """Squares around the mean of those seen."""
        return max(self.squares - self.total**2 / self.count, 0.0) if self.count else 0.0


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
        self._variance = self._law.variance(before or 0.0)
        self._worth = self._variance / self._law.between**2  # candidates, the forecast of the mean is
        self._seen = Seen(self._law.centre(before or 0.0))

    def see(self, reward: float) -> None:
        self._seen.see(reward)

    @property
    def threshold(self) -> float:
        seen = self._seen.count
        variance = (_SPREAD_WORTH * self._variance + self._seen.within) / (_SPREAD_WORTH + max(seen - 1, 0))
        spread = math.sqrt(variance * (1 + 1 / (self._worth + seen)))
        cost = self.cost * (_SHAPE_WORTH + seen) / _SHAPE_WORTH
        return self._seen.mean(self._worth) + spread * self._shape.reservation(cost / spread)

    def worth(self, final: float) -> float:
        return self._law.unfinished(final, self.budget)


class Experience:
    """By the request's own candidates alone, their law being taken for normal: Weitzman's rule (1979), stop once the
    best reaches ``mean + spread * u`` with ``E (Z - u)^+ = cost``.

    The mean is that of the segment's candidates and of the prefix's reward, which is worth three of them; the spread is
    that within all segments so far.

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
        if spread == 0.0 and seen < max(self.least, 2):
            return math.inf
        widened = math.sqrt(1 + 1 / (self._worth + seen))  # by what is not known of the mean
        return self._seen.mean(self._worth) + spread * widened * _shape(NORMAL).reservation(self.cost / widened)

    def worth(self, final: float) -> float:
        return final


def expected_candidates(search: Search, fit: Fit | None, attempts: int, segments: int) -> float:
    """Candidates a segment, in answers of so many segments: with a fit, at the prefixes that it has met, each with its
    own candidates in some order; without one, where rewards are normal, and means of prefixes vary.

    The same random numbers in each call, so that costs can be compared.
    """
    random = np.random.default_rng(0)
    if fit is None:
        return _at_normal_prefixes(search, attempts, segments, random)
    counts = [
        fmean(_looked_at(search, k, one.before, _some(one.rewards, attempts, random))[0] for one in met * _ORDERS)
        for k, met in enumerate(fit.prefixes[:segments])
    ]
    return fmean([*counts, *counts[-1:] * (segments - len(counts))])


def _some(rewards: Sequence[float], count: int, random: np.random.Generator) -> list[float]:
    """So many of a prefix's candidates: those that were drawn in some order, then any of them."""
    drawn: list[float] = random.permutation(rewards)[:count].tolist()
    return drawn + random.choice(rewards, size=count - len(drawn)).tolist()


def _at_normal_prefixes(search: Search, attempts: int, segments: int, random: np.random.Generator) -> float:
    looked, requests = 0, max(_SIMULATED // segments, 1)
    for _ in range(requests):
        before = None
        for segment in range(segments):
            mean = (before or 0.0) + _PREFIX_WORTH**-0.5 * random.standard_normal()
            count, before = _looked_at(search, segment, before, mean + random.standard_normal(attempts))
            looked += count
    return looked / requests / segments


def _looked_at(search: Search, segment: int, before: float | None, rewards: Iterable[float]) -> tuple[int, float]:
    """How many of a segment's candidates, and the best of them."""
    search.begin(segment, before)
    count, best = 0, -math.inf
    for reward in rewards:
        count, best = count + 1, max(best, float(reward))
        search.see(float(reward))
        if best >= search.threshold:
            break
    return count, best


@lru_cache(maxsize=64)
def cost_for(budget: float, attempts: int, segments: int, fit: Fit | None) -> float:
    """The cost at which so many candidates a segment are to be expected in answers of so many segments, by bisection of
    its logarithm. Early segments take more of them.
    """
    if budget >= attempts:
        return 0.0
    attempts = min(attempts, max(32, 4 * math.ceil(budget)))  # further ones are hardly ever reached
    segments = min(segments, _LONGEST)

    def expected(log_cost: float) -> float:
        return expected_candidates(search(math.exp(log_cost), budget, fit), fit, attempts, segments)

    scale = 1.0 if fit is None else max(math.sqrt(law.variance(law.lowest)) for law in fit.laws)
    low, high = math.log(1e-5 * scale), math.log(10 * scale)
    while high - low > 0.02:
        middle = (low + high) / 2
        low, high = (middle, high) if expected(middle) > budget else (low, middle)
    return math.exp(min(low, high, key=lambda one: abs(math.log(expected(one) / budget))))


def search(cost: float, budget: float, fit: Fit | None) -> Search:
    """By what there is to go by."""
    return Experience(cost, budget) if fit is None else Forecast(fit, cost, budget)


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
        all of these are looked at. Without a fit no segment takes twice as many.
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

    def search(self, fit: Fit | None, attempts: int, segments: int) -> Search:
        """A request's, for an answer of so many segments, at the cost that spends the budget."""
        return search(cost_for(self.budget, attempts, segments, fit), self.budget, fit)

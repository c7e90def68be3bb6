"""Optimal stopping: a segment's candidates are drawn until the best so far is worth more than drawing on."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import ClassVar, NamedTuple

import numpy as np

from stars_fast.methods.base import Method, SettingsT
from stars_fast.methods.fit import Fit
from stars_fast.methods.numbers import real

# Simulated requests, and segments of each where no fit says how many, when a cost is solved for.
_REQUESTS, _SEGMENTS = 200, 8
# Candidates that the reward of the prefix is worth as a forecast, where no fit says it.
_WORTH = 3.0
# Candidates a segment where no fit says what to expect, in budgets.
_FARTHEST = 2.0


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


_NORMAL = tuple(NormalDist().inv_cdf((i + 0.5) / 400) for i in range(400))


class Prior(NamedTuple):
    """What is expected of a segment's candidates before one of them is seen."""

    mean: float  # of them
    variance: float  # of them, within this prefix
    weight: float  # degrees of freedom that this variance is worth
    between: float | None  # standard deviation of their mean among such prefixes; None where no fit says it
    known: bool = True  # whether there is a mean to expect; else the candidates alone say it


NOTHING = Prior(0.0, 1.0, 0.0, None, known=False)


class Rule:
    """Weitzman's rule (1979) for candidates of one law that is being learned: stop once the best so far reaches
    ``mean + spread * u`` with ``E (Z - u)^+ = cost / spread``.

    Parameters
    ----------
    fit : Fit, optional
        None: a request learns from its own candidates alone, their spread being unknown at first and the reward of the
        prefix being worth three of them.
    cost : float
        Of a candidate: in the reward's units with a fit, in spreads of the candidates without one.
    budget : float
        Candidates a segment with which answers go on.
    """

    def __init__(self, fit: Fit | None, cost: float, budget: float = 1.0) -> None:
        self.fit, self.cost, self.budget = fit, cost, budget
        self._shape = _shape(_NORMAL if fit is None else fit.residuals)

    def prior(self, segment: int, before: float | None) -> Prior:
        """Of a segment behind a prefix with this reward; None at the first."""
        if self.fit is None:
            return Prior(before or 0.0, 1.0, 0.0, None, before is not None)
        law = self.fit.law(segment)
        return Prior(law.prior(before or 0.0), law.variance(before or 0.0), self.fit.weight, law.between)

    def worth(self, segment: int, final: float) -> float:
        """Of a candidate that ends the answer, beside those that do not: the reward of one of these that is as good."""
        return final if self.fit is None else self.fit.law(segment).unfinished(final, self.budget)

    def threshold(self, mean: float, spread: float, within: float) -> float:
        """The reservation value under :meth:`Belief.forecast`."""
        if spread == 0.0:
            return mean
        cost = self.cost if self.fit is not None else self.cost * within
        return mean + spread * self._shape.reservation(cost / spread)


@dataclass
class Belief:
    """What a request's own candidates say, in index order: of this segment, and of the spread in those before."""

    rule: Rule
    segment: int = -1  # none yet
    prior: Prior = NOTHING
    count: int = 0
    total: float = 0.0  # of rewards less the prior mean
    squares: float = 0.0
    past: float = 0.0  # squares within earlier segments, in units of the variance expected there
    degrees: int = 0  # of freedom, of those

    def begin(self, segment: int, before: float | None) -> None:
        """A segment begins, or begins anew, behind a prefix with this reward; None at the first."""
        if segment != self.segment and self.count:
            self.past += self._within / self.prior.variance
            self.degrees += self.count - 1
        self.segment, self.prior = segment, self.rule.prior(segment, before)
        self.count, self.total, self.squares = 0, 0.0, 0.0

    def see(self, reward: float) -> None:
        """A further candidate."""
        self.count += 1
        self.total += reward - self.prior.mean
        self.squares += (reward - self.prior.mean) ** 2

    @property
    def threshold(self) -> float:
        """What the best of those seen has to reach; inf where there is nothing to go by yet."""
        if self.prior.weight + self.degrees + self.count <= 1:
            return math.inf
        return self.rule.threshold(*self.forecast())

    @property
    def _within(self) -> float:
        """Squares around the mean of those seen."""
        return max(self.squares - self.total**2 / self.count, 0.0) if self.count else 0.0

    def forecast(self) -> tuple[float, float, float]:
        """Mean of the next candidate, its standard deviation, and that of candidates within the prefix.

        Normal means under a normal prior, a variance shrunk to the expected one: conjugate updates of both.
        """
        prior = self.prior
        degrees = prior.weight + self.degrees + self.count - 1
        variance = (prior.variance * (prior.weight + self.past) + self._within) / degrees
        worth = _WORTH if prior.between is None else variance / prior.between**2  # candidates, the prior mean is
        seen = worth * prior.known + self.count
        mean = prior.mean + self.total / max(seen, 1e-9)
        return mean, math.sqrt(variance * (1 + 1 / max(seen, 1e-9))), math.sqrt(variance)


class Outcome(NamedTuple):
    """Of a simulation: means over its requests."""

    candidates: float  # a segment
    reward: float  # of finished answers


def simulate(fit: Fit | None, cost: float, attempts: int) -> Outcome:
    """What the rule does where rewards are as the fit says; without one, normal, and those of prefixes as varied.

    The same random numbers in each call, so that costs can be compared.
    """
    rule, random = Rule(fit, cost), np.random.default_rng(0)
    segments = _SEGMENTS if fit is None else len(fit.laws)
    shape = _shape(_NORMAL if fit is None else fit.residuals).atoms
    noise = shape[random.integers(len(shape), size=(_REQUESTS, segments, attempts))].tolist()
    levels = random.standard_normal((_REQUESTS, segments)).tolist()
    weight = 1e9 if fit is None else fit.weight
    scales = np.sqrt(weight / random.chisquare(weight, (_REQUESTS, segments))).tolist()
    looked, rewards = 0, 0.0
    for request in range(_REQUESTS):
        before, belief = None, Belief(rule)
        for segment in range(segments):
            belief.begin(segment, before)
            prior = belief.prior
            between = _WORTH**-0.5 if prior.between is None else prior.between
            mean = prior.mean + between * levels[request][segment]
            spread = math.sqrt(prior.variance) * scales[request][segment]
            best = -math.inf
            for one in noise[request][segment]:
                looked += 1
                reward = mean + spread * one
                belief.see(reward)
                best = max(best, reward)
                if best >= belief.threshold:
                    break
            before = best
        rewards += best
    return Outcome(looked / _REQUESTS / segments, rewards / _REQUESTS)


@lru_cache(maxsize=64)
def cost_for(budget: float, attempts: int, fit: Fit | None) -> float:
    """The cost at which so many candidates a segment are to be expected, by bisection of its logarithm."""
    if budget >= attempts:
        return 0.0
    budget = budget if fit is None else fit.asking(budget)
    attempts = min(attempts, max(32, 4 * math.ceil(budget)))  # further ones are hardly ever reached
    scale = 1.0 if fit is None else max(math.sqrt(law.variance(law.lowest)) for law in fit.laws)
    low, high = math.log(1e-5 * scale), math.log(10 * scale)
    while high - low > 0.02:
        middle = (low + high) / 2
        low, high = (middle, high) if simulate(fit, math.exp(middle), attempts).candidates > budget else (low, middle)
    return math.exp(middle)


@dataclass(frozen=True)
class OptimalStopping(Method):
    """Segments by optimal stopping: candidates are drawn until the best of them is worth more than drawing on.

    A candidate costs as much reward as makes ``budget`` of them the expected number a segment; drawing goes on while
    the best so far is below the reservation value (Weitzman 1979, "Optimal search for the best alternative"; for whole
    answers: arXiv 2510.01394). Which rewards to expect says ``StarsConfig(fit=...)``, updated by the request's own
    candidates; without a fit these alone do. The best is committed, not the last. It is a search: no law of the text is
    promised, but the text of a seed does not depend on ``candidates``, batch or neighbours.

    Parameters
    ----------
    budget : float
        Expected candidates a segment, from 1 (plain sampling) to 256. Where it is ``StarsConfig.max_attempts`` or more,
        all of these are looked at.
    """

    name: ClassVar[str] = "optimal_stopping"
    loop: ClassVar[str] = "stopping"
    has_target: ClassVar[bool] = False
    uses_fit: ClassVar[bool] = True
    budget: float = 4.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", real("optimal_stopping: budget", self.budget, 1.0, 256.0))

    def rule(self, config: SettingsT) -> SettingsT:
        most = config.max_attempts
        if config.known is None:  # whose spread a request misjudges, it would overspend
            most = min(most, math.ceil(_FARTHEST * self.budget))
        return config.replace(target_reward=0.0, base_reward=0.0, max_attempts=most)  # nothing is tested against them

    def belief(self, fit: Fit | None, attempts: int) -> Belief:
        """A request's, under the rule whose cost spends the budget."""
        return Belief(Rule(fit, cost_for(self.budget, attempts, fit), self.budget))

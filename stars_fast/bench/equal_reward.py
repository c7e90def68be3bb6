"""How many texts best-of-N must draw to be as good as the engine: the practical competitor at equal mean reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import comb
from statistics import fmean
from typing import NamedTuple


class EqualReward(NamedTuple):
    """The smallest N found, and the mean rewards that were compared."""

    n: int
    reached: bool  # False: not even n are enough
    reward: float  # expected of the best of n
    wanted: float
    error: float  # standard, of wanted
    between: float  # n, were it no integer: between n - 1 and n the reward is taken to grow linearly


def expected_best(rewards: Sequence[float], n: int) -> float:
    """Expected maximum of ``n`` of these P rewards drawn without replacement.

    ``sum_i r_(i) C(i - 1, n - 1) / C(P, n)`` over the sorted rewards: for independent ones an unbiased estimate of the
    expected best of n.

    Raises
    ------
    ValueError
        For n outside 1 to P.
    """
    if not 1 <= n <= len(rewards):
        raise ValueError(f"n={n}: must lie in 1 to {len(rewards)}, the number of rewards")
    weights = (comb(i, n - 1) for i in range(len(rewards)))
    total = sum(reward * weight for reward, weight in zip(sorted(rewards), weights, strict=True))
    return total / comb(len(rewards), n)


def smallest_n(wanted: float, error: float, draw: Callable[[int], list[list[float]]], most: int = 64) -> EqualReward:
    """The smallest N whose best text has a mean reward of at least ``wanted``.

    Parameters
    ----------
    wanted, error : float
        Mean reward to be reached, and its standard error.
    draw : callable
        ``draw(k)`` gives the rewards of k independent texts for each prompt.
    most : int
        Texts per prompt, and the largest N. Among few texts even a small N scatters widely.
    """
    pools = draw(most)
    means = [fmean(expected_best(pool, n) for pool in pools) for n in range(1, most + 1)]
    enough = next((n for n, mean in enumerate(means, 1) if mean >= wanted), None)
    n = enough or most
    between = float(n)
    if enough is not None and n > 1:
        between -= (means[n - 1] - wanted) / (means[n - 1] - means[n - 2])
    return EqualReward(n, enough is not None, means[n - 1], wanted, error, between)

"""How many candidates are scored before somebody looks: those behind an accepted one need no reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Pass(NamedTuple):
    """What a scoring pass costs, in tokens of a large one."""

    least: int  # smaller ones take as long as this many: they wait for the weights to be read
    launch: int  # beside its tokens, with the look at what came of it

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """Cost of a pass of so many tokens ``[...]``."""
        return np.maximum(tokens, self.least) + self.launch

    @property
    def undivided(self) -> int:
        """Tokens up to which two passes are never cheaper than one."""
        return 2 * self.least + self.launch


PASS = Pass(least=32, launch=96)
PASS_OF_GPUS = Pass(least=512, launch=128)


def first_stage(sizes: Sequence[int], tokens: Sequence[int], acceptance: Sequence[float], cost: Pass) -> int:
    """How many candidates of each request are scored next, by the cheapest plan of passes.

    A request goes on to its next candidates with probability ``(1 - a)^d`` after d of them. With ``T(d, e)`` the
    expected tokens of the candidates from the d-th up to the e-th, of those requests that are open at d, and C the cost
    of a pass::

        V(d) = min over e > d of C(T(d, e)) + V(e),    V(most) = 0

    Parameters
    ----------
    sizes : sequence of int
        Candidates of each request, at least 1.
    tokens : sequence of int
        Of a candidate of each.
    acceptance : sequence of float
        P(accept) of a candidate of each, in (0, 1].
    cost : Pass

    Returns
    -------
    int
        From 1 to the most that any has.
    """
    most = max(sizes)
    if most == 1 or sum(size * each for size, each in zip(sizes, tokens, strict=True)) <= cost.undivided:
        return most
    at = np.arange(most + 1)
    still = (1 - np.asarray(acceptance))[:, None] ** at[:-1] * np.asarray(tokens)[:, None]  # [requests, d]
    there = np.minimum(at, np.asarray(sizes)[:, None])  # [requests, e]
    expected = still.T @ there - (still * there[:, :-1]).sum(0)[:, None]  # [d, e]
    to_go, stop = np.zeros(most + 1), most
    for first in range(most - 1, -1, -1):
        ways = cost(expected[first, first + 1 :]) + to_go[first + 1 :]
        to_go[first], stop = ways.min(), first + 1 + int(ways.argmin())
    return stop

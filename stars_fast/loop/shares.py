"""Rows for whom they save most: what a further candidate is worth to a request, and who gets the next one."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

# Acceptances and costs within a tenth of each other share a table.
_GRID = 0.1
# Beyond so many candidates, those that are reached more seldom than this are left out: tables stay short.
_SHORT, _NEVER = 64, 1e-4


def row_values(acceptance: float, left: int, fixed: float) -> tuple[float, ...]:
    """What each further candidate of a request saves, in costs of a row: the second, the third, up to all attempts.

    A segment is a small decision problem. With ``left`` attempts before the best one is taken, m candidates now and the
    least cost from then on, its expected cost is::

        V(left) = min over m of fixed + m + (1 - acceptance)^m V(left - m),    V(0) = 0

    and the next candidate saves ``(1 - a)^m V(left - m) - (1 - a)^(m + 1) V(left - m - 1)``. So a request that is
    seldom accepted gets more rows: it will hold its place for long. Where the last attempts save more than those before
    them (after them the segment ends whatever they are), a run of candidates has its mean value each, so that values
    never grow and rows can be dealt out one by one.

    Parameters
    ----------
    acceptance : float
        P(accept) of a candidate, in (0, 1].
    left : int
        Attempts left.
    fixed : float
        The request's share of what a heartbeat costs without rows, in costs of a row.

    Returns
    -------
    tuple of float
        ``left - 1`` values; fewer where further candidates would hardly ever be looked at.
    """
    nearest = round(math.log(acceptance) / _GRID)
    most = _candidates_that_matter(nearest)
    # With more attempts than twice those, what is left after any of them costs the same.
    return _row_values(nearest, min(left, 2 * most), round(math.log(fixed) / _GRID))


def _rejected(acceptance: int) -> float:
    return 1 - math.exp(_GRID * acceptance)


@lru_cache(maxsize=1 << 8)
def _candidates_that_matter(acceptance: int) -> int:
    rejected = _rejected(acceptance)
    return max(_SHORT, math.ceil(math.log(_NEVER) / math.log(rejected))) if rejected > 0 else _SHORT


@lru_cache(maxsize=1 << 12)
def _row_values(acceptance: int, left: int, fixed: int) -> tuple[float, ...]:
    most = _candidates_that_matter(acceptance)
    candidates = np.arange(1, min(left, most) + 1)
    to_go = _costs_to_go(acceptance, fixed)[np.minimum(left - candidates, most)]
    after = _rejected(acceptance) ** candidates * to_go  # of so many candidates
    values: list[float] = []
    while len(values) < len(after) - 1:
        here = len(values)
        means = (after[here] - after[here + 1 :]) / np.arange(1, len(after) - here)
        run = int(means.argmax()) + 1
        values += [float(means[run - 1])] * run
    return tuple(values)


@lru_cache(maxsize=1 << 10)
def _costs_to_go(acceptance: int, fixed: int) -> np.ndarray:
    """V of the docstring above ``[most + 1]``."""
    most, share = _candidates_that_matter(acceptance), math.exp(_GRID * fixed)
    still = _rejected(acceptance) ** np.arange(most + 1)
    cost = share + np.arange(most + 1)
    to_go = np.zeros(most + 1)
    for left in range(1, most + 1):
        to_go[left] = (cost[1 : left + 1] + still[1 : left + 1] * to_go[left - 1 :: -1]).min()
    return to_go


def share_rows(values: Sequence[Sequence[float]], costs: np.ndarray) -> list[int]:
    """Give each request one row, then row after row to whoever gains most, while that is worth its cost.

    Parameters
    ----------
    values : sequence of sequences of float
        Per request what each further row saves; none grows.
    costs : np.ndarray
        Of a heartbeat with as many rows as requests, one more, and so on, in the units of ``values``; as many rows are
        shared out as it has entries. Steps in it are fine: a bucket whose padding costs the same is filled.

    Returns
    -------
    list of int
        Rows per request.
    """
    least = float(np.diff(costs).min(initial=np.inf))  # that one row adds
    gains = [(-value[0], i) for i, value in enumerate(values) if value]
    heapq.heapify(gains)
    taken, shares = list[int](), [1] * len(values)
    saved, best, most = 0.0, 0, 0.0
    for number, cost in enumerate((costs[1:] - costs[0]).tolist(), 1):
        # Later rows gain no more than this one, and cost no less than the least.
        if not gains or -gains[0][0] <= least:
            break
        gain, i = gains[0]
        shares[i] += 1
        if shares[i] <= len(values[i]):
            heapq.heapreplace(gains, (-values[i][shares[i] - 1], i))
        else:
            heapq.heappop(gains)
        taken.append(i)
        saved -= gain
        if saved - cost > most:
            best, most = number, saved - cost
    for i in taken[best:]:
        shares[i] -= 1
    return shares


def share_evenly(limits: Sequence[int], rows: int) -> list[int]:
    """Give each request one row, then another to all in turn, until their limits or the rows are used up."""
    most = min(max(limits), max(rows, 1))
    allowed = np.asarray(limits)[:, None] > np.arange(1, most)  # [requests, most - 1]
    further = np.nonzero(allowed.T)[1][: max(rows - len(limits), 0)]  # whose row is next, all second ones first
    shares: list[int] = (1 + np.bincount(further, minlength=len(limits))).tolist()
    return shares

"""Regression limits: ratios of two things that are measured alternately in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

_ROUNDS = 15


class Limit(NamedTuple):
    """How many times as long the slower one takes, and what it must be at least."""

    faster: str
    slower: str
    ratio: float
    at_least: float
    seconds: float  # of the faster one

    def __str__(self) -> str:
        met = "ok" if self.ratio >= self.at_least else "BROKEN"
        return (
            f"{self.faster} ({self.seconds * 1e6:,.1f} us) is {self.ratio:.2f}x as fast as {self.slower}; "
            f"at least {self.at_least:g}x: {met}"
        )


def clocked(call: Callable[[], Any], calls: int = 1) -> Callable[[], float]:
    """A function that returns the seconds of one of ``calls`` calls."""

    def seconds() -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls

    return seconds


def alternating(
    faster: tuple[str, Callable[[], float]],
    slower: tuple[str, Callable[[], float]],
    at_least: float,
    rounds: int = _ROUNDS,
) -> Limit:
    """Medians over rounds in which the two take turns, after one that is not counted.

    Each is a name and a function that returns its own seconds, so that what prepares it need not count.
    """
    taken: list[tuple[float, float]] = []
    for _ in range(rounds + 1):
        taken.append((faster[1](), slower[1]()))
    ours, theirs = (statistics.median(column) for column in zip(*taken[1:], strict=True))
    return Limit(faster[0], slower[0], theirs / ours, at_least, ours)

"""Rounds in which the contestants alternate, and what is said of them: ratios of the same rounds first."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch

from stars_fast.bench.contestants import BESIDE, Contestant, Outcome, Point
from stars_fast.bench.models import Pair, counting
from stars_fast.bench.yardsticks import synchronize


class Run(NamedTuple):
    """One run of one contestant."""

    seconds: float
    outcome: Outcome
    bytes: int  # of weights that forward passes read
    operations: int  # of matrix products with weights

    @property
    def speed(self) -> float:
        """Accepted tokens per second."""
        return self.outcome.tokens / self.seconds


def measure(
    pair: Pair, points: Sequence[Point], rounds: int, done: Callable[[], None] = lambda: None
) -> list[dict[str, list[Run]]]:
    """Run every contestant of every point once a round, after each has run once uncounted: pools grow, and on CUDA
    devices graphs are captured.

    All of a round stands close together in time, so that what else the machine does meets all alike; each round begins
    with another contestant. ``done`` is called after every run.
    """
    for point in points:
        for contestant in point.contestants.values():
            timed(pair, contestant, 0)
            done()
    found: list[dict[str, list[Run]]] = [{name: [] for name in point.contestants} for point in points]
    for number in range(1, rounds + 1):
        for runs, point in zip(found, points, strict=True):
            names = list(point.contestants)
            start = (number - 1) % len(names)
            for name in names[start:] + names[:start]:
                runs[name].append(timed(pair, point.contestants[name], number))
                done()
    return found


def timed(pair: Pair, contestant: Contestant, seed: int) -> Run:
    """One run."""
    torch.manual_seed(seed)
    with counting(pair) as passes:
        synchronize(pair.device)
        started = time.perf_counter()
        outcome = contestant(seed)
        synchronize(pair.device)
        seconds = time.perf_counter() - started
    return Run(seconds, outcome, passes.bytes, passes.operations)


def summary(runs: dict[str, list[Run]], graphed: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """Per contestant: how many times as fast the engine is, in the same rounds, then the contestant's own figures.

    ``ratio.all_rounds`` is of all tokens over all seconds: with few prompts the attempts of one round vary too much to
    stand alone. ``ratio.per_attempt`` is of candidates looked at per second: the ratio at equal luck, where a method's
    time is proportional to its attempts (None where there are none). Of ``graphed`` contestants not all forward passes
    are seen: their rates of bytes and operations are None.
    """
    told = {name: {"ratio": _ratio(runs[BESIDE[name]], own), **_figures(own)} for name, own in runs.items()}
    for name in set(graphed) & set(told):
        told[name] |= {"weight_bytes_per_second": None, "operations_per_second": None}
    return told


def _ratio(engine: Sequence[Run], other: Sequence[Run]) -> dict[str, float | None]:
    per_attempt = None
    if _total(engine).attempts and _total(other).attempts:
        per_attempt = _per_second(engine, "attempts") / _per_second(other, "attempts")
    return {
        **_spread([ours.speed / theirs.speed for ours, theirs in zip(engine, other, strict=True)]),
        "all_rounds": _per_second(engine, "tokens") / _per_second(other, "tokens"),
        "per_attempt": per_attempt,
    }


def _figures(runs: Sequence[Run]) -> dict[str, Any]:
    total, seconds = _total(runs), sum(run.seconds for run in runs)
    rewards = [run.outcome.reward for run in runs]
    return {
        "tokens_per_second": {**_spread([run.speed for run in runs]), "all_rounds": total.tokens / seconds},
        "seconds": _spread([run.seconds for run in runs]),
        "texts": total.texts,
        "attempts_per_segment": total.attempts / total.segments if total.segments else None,
        "mean_reward": None if any(map(math.isnan, rewards)) else statistics.fmean(rewards),
        "weight_bytes_per_second": sum(run.bytes for run in runs) / seconds,
        "operations_per_second": sum(run.operations for run in runs) / seconds,
    }


def _total(runs: Sequence[Run]) -> Outcome:
    tokens, texts, segments, attempts = (sum(count) for count in zip(*(run.outcome[:4] for run in runs), strict=True))
    return Outcome(tokens, texts, segments, attempts, math.nan)


def _per_second(runs: Sequence[Run], what: str) -> float:
    return float(getattr(_total(runs), what)) / sum(run.seconds for run in runs)


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}

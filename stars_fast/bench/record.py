"""A whole benchmark: prepared, measured, and written down as plain values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from stars_fast.bench.contestants import GRAPHED, Point, point
from stars_fast.bench.measure import measure, summary
from stars_fast.bench.models import Pair
from stars_fast.bench.sweeps import SIDE_BY_SIDE, sweep_named
from stars_fast.bench.workload import Pilots, Workload
from stars_fast.bench.yardsticks import rates
from stars_fast.engine import StarsEngine

Series = tuple[str | None, Sequence[Workload], Sequence[str]]  # name of the sweep, points, contestants


def side_by_side(base: Sequence[Workload]) -> list[Series]:
    """Every contestant at each of these workloads."""
    return [(None, base, SIDE_BY_SIDE)]


def swept(base: Workload, names: Sequence[str]) -> list[Series]:
    """The sweeps of these names around a workload. Raises ValueError for a name that is not there."""
    series: list[Series] = []
    for name in names:
        sweep = sweep_named(name)
        loads = [replace(base, **{**sweep.fixed, sweep.field: value}) for value in sweep.values]
        series.append((name, loads, sweep.contestants))
    return series


def steps(series: Sequence[Series], rounds: int) -> int:
    """How often :func:`run` calls ``done``."""
    return sum(len(loads) * (1 + len(names) * (1 + rounds)) for _, loads, names in series)


def run(pair: Pair, series: Sequence[Series], rounds: int, done: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Measure everything.

    Returns
    -------
    dict
        ``models``, ``random`` (untrained), ``weight_bytes``, ``dtype``, ``device``, ``threads``, ``rounds``;
        ``yardsticks``, what a copy and a large product reach here; ``sweeps``, which field each varies; ``points``,
        each with ``sweep``, ``workload``, ``target_reward`` (one per prompt), ``beta``, ``equal_reward`` and
        ``contestants``, as :func:`stars_fast.bench.measure.summary` describes them.

    Raises
    ------
    ValueError
        For a workload that the engine refuses, before anything is measured.
    """
    engine = StarsEngine(pair.policy, pair.reward, reward_tokenizer="policy")
    # All of them first: what the engine refuses must not cost what has been measured.
    ready = [(sweep, _points(pair, engine, loads, names, done)) for sweep, loads, names in series]
    reached = rates(pair.device, pair.policy.dtype)
    return {
        "models": pair.name,
        "random": pair.random,
        "weight_bytes": {role: weights.bytes for role, weights in pair.weights.items()},
        "dtype": str(pair.policy.dtype).removeprefix("torch."),
        "device": str(pair.device),
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "yardsticks": {"copy_bytes_per_second": reached.copy, "product_operations_per_second": reached.matrix},
        "sweeps": {name: sweep_named(name).field for name, _, _ in series if name is not None},
        "points": [point for sweep, points in ready for point in _measured(pair, sweep, points, rounds, done)],
    }


def _points(
    pair: Pair, engine: StarsEngine, loads: Sequence[Workload], names: Sequence[str], done: Callable[[], None]
) -> list[Point]:
    """Ready to be measured: targets set, N found. Fewer candidates than a workload says would be measured otherwise."""
    pilots, points = Pilots(pair, engine), list[Point]()
    for load in loads:
        rows = load.batch * load.candidates if isinstance(load.candidates, int) else 0
        if rows > engine.max_rows:
            raise ValueError(
                f"batch={load.batch} with candidates={load.candidates} takes {rows} rows, more than the engine's "
                f"max_rows={engine.max_rows}"
            )
        points.append(point(pair, engine, load, pilots.config(load), names))
        done()
    return points


def _measured(
    pair: Pair, sweep: str | None, points: Sequence[Point], rounds: int, done: Callable[[], None]
) -> list[dict[str, Any]]:
    graphed = GRAPHED if pair.device.type == "cuda" else ()
    return [
        {
            "sweep": sweep,
            "workload": asdict(point.workload),
            "target_reward": point.config.target_reward,
            "beta": point.config.beta,
            "equal_reward": point.equal_reward._asdict() if point.equal_reward else None,
            "contestants": summary(runs, graphed),
        }
        for point, runs in zip(points, measure(pair, points, rounds, done), strict=True)
    ]

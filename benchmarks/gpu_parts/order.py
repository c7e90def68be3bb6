"""What the order of work brings: scoring in order, and the next extension launched ahead; alternately in one engine."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

from benchmarks.gpu_parts.heartbeats import REPEATS, figures, run_engine, workload
from benchmarks.gpu_parts.models import pilots
from benchmarks.gpu_parts.runner import Runner
from stars_fast.bench.workload import Workload


def compare_orders(runner: Runner) -> None:
    """Candidates scored in order, each only where none before it was accepted, against all of them at once."""
    for acceptance, candidates in ((0.3, 3),) if runner.tiny else ((0.3, 3), (0.5, 2), (0.15, 3)):
        load = workload(runner, 16 if runner.tiny else 64, acceptance)
        # Passes of the later stages have many sizes: most are to be captured before anything is measured.
        pairs = _with_and_without(runner, "in_order", load, candidates, first=1 if runner.tiny else 16)
        if pairs is None:
            return
        runner.add(
            "order",
            batch=load.batch,
            wanted=acceptance,
            candidates=candidates,
            saved_milliseconds=[whole["milliseconds"] - ordered["milliseconds"] for ordered, whole in pairs],
            token_share=[ordered["scored"] / whole["scored"] for ordered, whole in pairs],
            in_order=[ordered for ordered, _ in pairs],
            at_once=[whole for _, whole in pairs],
        )


def compare_extensions(runner: Runner) -> None:
    """The next heartbeat's extension launched before the host counts and tells callers, against behind it."""
    for batch, candidates in ((16, 3),) if runner.tiny else ((64, 3), (1, 11)):
        load = workload(runner, batch, 0.3)
        pairs = _with_and_without(runner, "ahead", load, candidates, first=1 if runner.tiny else 6)
        if pairs is None:
            return
        runner.add(
            "ahead",
            batch=batch,
            candidates=candidates,
            saved_milliseconds=[behind["milliseconds"] - ahead["milliseconds"] for ahead, behind in pairs],
            ahead=[ahead for ahead, _ in pairs],
            behind=[behind for _, behind in pairs],
        )


def _with_and_without(
    runner: Runner, switch: str, load: Workload, candidates: int, first: int
) -> Sequence[tuple[dict[str, Any], dict[str, Any]]] | None:
    """Figures of runs with a switch of the core's, and without, in turns; those where both had steady heartbeats.

    None where there is no time.
    """
    if not runner.time_for(8):
        return None
    driven = pilots(runner)
    prompts, config = driven.pair.prompts(load.batch, load.prompt_length), driven.config(load)
    run_engine(runner, prompts, config, candidates, first, 6.0)
    pairs = list[tuple[dict[str, Any], dict[str, Any]]]()
    for _ in range(REPEATS):
        found = list[dict[str, Any]]()
        for on in (True, False):
            with patch.object(driven.engine.core, switch, on):
                watch = run_engine(runner, prompts, config, candidates, 2 if runner.tiny else 6, 4.0)
            told = figures(watch, load)
            told["scored"] = statistics.fmean(beat.scored for beat in watch.steady) if watch.steady else None
            found.append({name: value for name, value in told.items() if name != "all_beats"})
        if all(one["beats"] for one in found):
            pairs.append((found[0], found[1]))
    return pairs

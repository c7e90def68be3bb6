"""The order in which candidates are scored: alternately in one warm engine."""

from __future__ import annotations

import statistics
from typing import Any
from unittest.mock import patch

from benchmarks.gpu_parts.heartbeats import REPEATS, figures, run_engine, workload
from benchmarks.gpu_parts.models import pilots
from benchmarks.gpu_parts.runner import Runner


def compare_orders(runner: Runner) -> None:
    """Candidates scored in order, each only where none before it was accepted, against all of them at once."""
    driven = pilots(runner)
    if not hasattr(driven.engine.core, "in_order"):
        runner.add("absent", what="scoring in order")
        return
    for acceptance, candidates in ((0.3, 3),) if runner.tiny else ((0.3, 3), (0.5, 2), (0.15, 3)):
        load = workload(runner, 16 if runner.tiny else 64, acceptance)
        if not runner.time_for(8):
            return
        prompts, config = driven.pair.prompts(load.batch, load.prompt_length), driven.config(load)
        # Passes of the later stages have many sizes: most are to be captured before anything is measured.
        run_engine(runner, prompts, config, candidates, 1 if runner.tiny else 16, 6.0)
        found: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
        for _ in range(REPEATS):
            for order, runs in found.items():
                with patch.object(driven.engine.core, "in_order", order):
                    watch = run_engine(runner, prompts, config, candidates, 2 if runner.tiny else 6, 4.0)
                told = figures(watch, load)
                told["scored"] = statistics.fmean(beat.scored for beat in watch.steady) if watch.steady else None
                runs.append({name: value for name, value in told.items() if name != "all_beats"})
        pairs = [
            (ordered, whole)
            for ordered, whole in zip(found[True], found[False], strict=True)
            if ordered["beats"] and whole["beats"]
        ]
        runner.add(
            "order",
            batch=load.batch,
            wanted=acceptance,
            candidates=candidates,
            saved_milliseconds=[whole["milliseconds"] - ordered["milliseconds"] for ordered, whole in pairs],
            token_share=[ordered["scored"] / whole["scored"] for ordered, whole in pairs],
            in_order=found[True],
            at_once=found[False],
        )

"""Whole calls with all that they meet: captures, prompts let in, and the last requests running alone."""

from __future__ import annotations

import statistics
import time
from typing import Any

from benchmarks.gpu_parts.expected import expectation
from benchmarks.gpu_parts.heartbeats import REPEATS, Watch, watching, workload
from benchmarks.gpu_parts.models import costs, machine, pair, pilots
from benchmarks.gpu_parts.runner import Runner
from stars_fast.bench.workload import Workload
from stars_fast.bench.yardsticks import synchronize


def measure_throughput(runner: Runner) -> None:
    """Whole calls of 192 requests, 30 % accepted, from the first one on: what a user gets."""
    machine(runner)
    started = time.perf_counter()
    models = pair(runner)
    synchronize(runner.device)
    made, driven = time.perf_counter(), pilots(runner)
    load = workload(runner, 6 if runner.tiny else 192, 0.3, prompt=192, response=128)
    prompts, config = models.prompts(load.batch, load.prompt_length), driven.config(load)
    ready = time.perf_counter()
    longest = load.prompt_length + load.max_new_tokens
    told = driven.engine.warm_up(config, requests=load.batch, max_model_len=longest)
    begun = {"models_seconds": made - started, "calibration_seconds": ready - made}
    runner.add("start", **begun, warm_up_seconds=told.seconds, warm_up_graphs=told.graphs, remark=told.remark)
    calls = []
    for seed in range(REPEATS):
        if not runner.time_for(8):
            break
        with watching(driven.engine, prompts) as watch:
            watch.begin()
            begun = time.perf_counter()
            out = driven.engine.generate(prompts, config, seed=seed, on_error="raise")
            seconds = time.perf_counter() - begun
            watch.end()
        calls.append(_whole_call(runner, load, watch, out.stats["committed_tokens"], seconds))
    later = calls[1:]
    runner.add(
        "throughput",
        calls=calls,
        share_of_warm=[one["tokens_per_second"] / one["warm_tokens_per_second"] for one in later if one["warm_beats"]],
        first_over_later=[calls[0]["seconds"] / one["seconds"] for one in later],
        later_tokens_per_second=statistics.fmean(one["tokens_per_second"] for one in later) if later else None,
    )


def _whole_call(runner: Runner, load: Workload, watch: Watch, tokens: int, seconds: float) -> dict[str, Any]:
    """A call, and the rate of its warm heartbeats with as many requests as it could run at a time, prompts included."""
    most = max(beat.requests for beat in watch.beats)
    warm = [beat for beat in watch.beats if beat.warm and beat.requests > 0.9 * most]
    rows = statistics.median(beat.drawn / load.segment_length / beat.requests for beat in watch.beats)
    context = watch.length + load.max_new_tokens / 2
    in_order = pilots(runner).engine.core.in_order
    work = most, load.segment_length, load.acceptance, context, rows, load.max_new_tokens, in_order
    expected = expectation(costs(runner), machine(runner), *work)
    spent = sum(beat.seconds for beat in warm)
    return {
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "warm_beats": len(warm),
        "warm_tokens_per_second": sum(beat.committed for beat in warm) / spent if warm else None,
        "expected_tokens_per_second": expected["tokens_per_second"],
        "requests": most,
        "median_candidates": rows,
        "beats": len(watch.beats),
        "refilled_beats": sum(beat.refilled for beat in watch.beats),
        **{f"{name}_passes": count for name, count in watch.passes.items()},
    }

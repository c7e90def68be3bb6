"""A decode step against its floor, and where the time of a heartbeat goes."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from benchmarks.gpu_parts.compare import compare_engine, expectation, machine
from benchmarks.gpu_parts.heartbeats import pilots, run_engine, workload
from benchmarks.gpu_parts.models import costs, pair
from benchmarks.gpu_parts.runner import Runner
from benchmarks.roofline import decode_step
from stars_fast.bench.models import Pair
from stars_fast.bench.yardsticks import synchronize
from stars_fast.loop.row_cost import Heartbeat
from stars_fast.policy.leaf import Leaf, Sampling
from stars_fast.policy.policy import Policy
from stars_fast.tree.attention import plugged

# Requests and candidates of each: 1, 8, 64, 128, 192 and 256 rows.
ROWS = ((1, 1), (1, 8), (16, 4), (64, 2), (64, 3), (64, 4))
MODES = ("compiled", "captured", "launched")  # compiled layers in graphs; graphs alone; neither
_CONTEXT, _LONGEST = 256, 33  # tokens of a trunk; of a segment


def time_modes(runner: Runner, name: str) -> None:
    """The decode steps of a policy in each mode that this device has."""
    models = pair(runner, name)
    for mode in MODES if runner.on_gpu else ("launched",):
        shapes = ROWS if mode == "compiled" else ROWS[::2]
        with runner.guarded(f"{name}, {mode}"):
            time_steps(runner, models, ((1, 1), (2, 2)) if runner.tiny else shapes, mode)


def time_steps(runner: Runner, models: Pair, shapes: tuple[tuple[int, int], ...], mode: str) -> None:
    """One decode step in each shape: what a long proposal takes longer than a short one, per step."""
    context, longest = (8, 5) if runner.tiny else (_CONTEXT, _LONGEST)
    runner.shared.pop("pilots", None)  # the pools of both would not fit beside two 7B models in 80 GB
    policy = Policy(models.policy, cuda_graphs=mode != "launched", torch_compile=mode == "compiled")
    groups = max(groups for groups, _ in shapes)
    rows = max(groups * candidates for groups, candidates in shapes)
    with plugged(policy.model), torch.no_grad():
        policy.begin(groups * context + rows * longest + 256, context, longest)
        nodes, logits = policy.prefill([-1] * groups, models.prompts(groups, context))
        for groups, candidates in shapes:
            if not runner.time_for(2):
                return
            chosen = list(zip(nodes, logits, strict=True))[:groups]

            def propose(length: int, chosen: list[Any] = chosen, candidates: int = candidates) -> float:
                leaves = [
                    Leaf(node, row, Sampling(), i, segment=0, first_attempt=0, candidates=candidates, length=length)
                    for i, (node, row) in enumerate(chosen)
                ]
                synchronize(runner.device)
                started = time.perf_counter()
                draws = policy.propose(leaves)
                synchronize(runner.device)
                taken = time.perf_counter() - started
                for draw in (draw for group in draws for draw in group):
                    policy.tree.release(draw.node)
                return taken

            propose(longest)  # compiles and captures
            short, long = ([propose(length) for _ in range(3)] for length in (2, longest))
            seconds = (statistics.median(long) - statistics.median(short)) / (longest - 2)
            runner.add("step", **_against_floor(runner, models, groups, candidates, context, longest, mode, seconds))


def _against_floor(
    runner: Runner, models: Pair, groups: int, candidates: int, context: int, longest: int, mode: str, seconds: float
) -> dict[str, Any]:
    rows = groups * candidates
    ideal = decode_step(costs(models)[0], rows, groups, context, longest / 2, machine(runner))
    return {
        "pair": models.name,
        "mode": mode,
        "rows": rows,
        "groups": groups,
        "milliseconds": seconds * 1e3,
        "floor_milliseconds": ideal.floor_s * 1e3,
        "expected_milliseconds": ideal.achievable_s * 1e3,
        "over_floor": seconds / ideal.floor_s if ideal.floor_s else None,
        "gigabytes_per_second": ideal.bytes / seconds / 1e9,
    }


def time_uncompiled(runner: Runner) -> None:
    """Heartbeats in which no layer is compiled, against those of the other parts."""
    models = pair(runner, "llama-2-7b")
    batch, segment = (4, 4) if runner.tiny else (64, 16)
    runner.shared.pop("pilots", None)
    try:
        pilots(runner, models, torch_compile=False)
        compare_engine(runner, models, workload(runner, batch, segment, 0.3), 8.0, remark=", unc.")
    finally:
        runner.shared.pop("pilots", None)


def split_batches(runner: Runner) -> None:
    """:func:`split` of large and small batches."""
    for batch in (4, 1) if runner.tiny else (64, 1):
        with runner.guarded(f"split, batch {batch}"):
            split(runner, "llama-2-7b", batch, 4 if runner.tiny else 16, 0.3)


def split(runner: Runner, name: str, batch: int, segment: int, acceptance: float) -> None:
    """How long proposals and scoring take in a heartbeat; then which kernels run in one, and for how long."""
    models, load = pair(runner, name), workload(runner, batch, segment, acceptance)
    driven, prompts = pilots(runner, models), models.prompts(batch, load.prompt_length)
    config, wanted = driven.config(load), 2 if runner.tiny else 6
    best = expectation(runner, models, load, acceptance, load.prompt_length + load.max_new_tokens / 2, None)
    watch = run_engine(runner, driven.engine, prompts, config, best["candidates"], wanted, 8.0)
    if watch.steady:
        propose, score, whole = (
            statistics.median(seconds) * 1e3
            for seconds in zip(*((beat.propose, beat.score, beat.seconds) for beat in watch.steady), strict=True)
        )
        runner.add(
            "split",
            pair=name,
            batch=batch,
            segment=segment,
            acceptance=watch.acceptance,
            candidates=best["candidates"],
            heartbeat_milliseconds=whole,
            stages_milliseconds={"propose": propose, "score": score},
            expected=best,
        )
    if runner.time_for(8):
        profile(runner, models, prompts, config, best["candidates"])


def profile(runner: Runner, models: Pair, prompts: list[list[int]], config: Any, candidates: int) -> None:
    """The kernels of one steady heartbeat, by the time they take; the rest of it the device waits for the host."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    clock: list[float] = []

    def on_heartbeat(one: Heartbeat) -> None:
        """Profile from the end of the third steady one to the end of the next."""
        if one.requests < len(prompts) or one.timing.encoded or len(clock) > 3:
            return
        synchronize(runner.device)
        if len(clock) == 3:
            profiler.stop()
        clock.append(time.perf_counter())
        if len(clock) == 3:
            profiler.start()
            clock[-1] = time.perf_counter()

    # The heartbeat that is profiled replays graphs: the same run has just captured them.
    activity = ProfilerActivity.CUDA if runner.on_gpu else ProfilerActivity.CPU
    profiler = torch.profiler.profile(activities=[activity])
    engine = pilots(runner, models).engine
    engine.on_heartbeat = on_heartbeat
    try:
        events = engine.stream(prompts, config, candidates=candidates, seed=0, on_error="raise")
        for _ in events:
            if len(clock) > 3:
                break
        events.close()
    finally:
        engine.on_heartbeat = None
    if len(clock) < 4:
        if len(clock) == 3:
            profiler.stop()
        raise RuntimeError(f"only {len(clock)} steady heartbeats: too few to profile one")
    # Calls that launch kernels are listed too, some with the time of what they launched.
    kernels = [one for one in profiler.key_averages() if one.device_type == DeviceType.CUDA]
    kernels.sort(key=lambda kernel: -kernel.device_time_total)
    busy, wall = sum(kernel.device_time_total for kernel in kernels) / 1e3, (clock[3] - clock[2]) * 1e3  # us, s -> ms
    runner.add(
        "kernels",
        pair=models.name,
        batch=len(prompts),
        milliseconds=wall,
        busy_milliseconds=busy,
        launches=sum(kernel.count for kernel in kernels),
        top=[
            {"name": kernel.key[:120], "milliseconds": kernel.device_time_total / 1e3, "count": kernel.count}
            for kernel in kernels[:25]
        ],
    )

"""A decode step against its floor, and where the time of a heartbeat goes."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gpu_parts.compare import REACHABLE, compare_engine, expectation, machine
from gpu_parts.heartbeats import PROMPT, RESPONSE, engine, guided, pilot, run_engine, synchronize
from gpu_parts.models import Pair, pair
from gpu_parts.runner import Runner
from stars_fast.loop.heartbeat import Generation
from stars_fast.policy.policy import Policy
from stars_fast.policy.steps import Leaf, Sampling
from stars_fast.roofline import decode_step
from stars_fast.tree.attention import plugged

# Requests and candidates of each: 1, 8, 64, 128, 192 and 256 rows.
ROWS = ((1, 1), (1, 8), (16, 4), (64, 2), (64, 3), (64, 4))
MODES = ("compiled", "captured", "launched")  # compiled layers in graphs; graphs alone; neither
_CONTEXT, _LONGEST = 256, 33  # tokens of a trunk; of a segment
STAGES = ("admit", "extend", "set_base_rewards", "propose", "score", "select_and_commit")


def time_steps(runner: Runner, models: Pair, shapes: tuple[tuple[int, int], ...], mode: str) -> None:
    """One decode step in each shape: what a long proposal takes longer than a short one, per step."""
    context, longest = (8, 5) if runner.tiny else (_CONTEXT, _LONGEST)
    runner.shared.pop("engine", None)  # the pools of both would not fit beside two 7B models in 80 GB
    policy = Policy(models.policy, cuda_graphs=mode != "launched", torch_compile=mode == "compiled")
    groups = max(groups for groups, _ in shapes)
    rows = max(groups * candidates for groups, candidates in shapes)
    with plugged(policy.model), torch.no_grad():
        policy.begin(groups * context + rows * longest + 256, context, longest)
        nodes, logits = policy.prefill([-1] * groups, models.prompts(groups, context))
        for groups, candidates in shapes:
            if not runner.time_for(0 if runner.tiny else 2):
                return
            chosen = list(zip(nodes, logits, strict=True))[:groups]

            def propose(length: int, chosen: list[Any] = chosen, candidates: int = candidates) -> float:
                leaves = [
                    Leaf(node, row, i, segment=0, first_attempt=0, candidates=candidates, length=length)
                    for i, (node, row) in enumerate(chosen)
                ]
                synchronize(runner)
                started = time.perf_counter()
                draws = policy.propose(leaves, Sampling())
                synchronize(runner)
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
    ideal = decode_step(models.policy_cost, rows, groups, context, longest / 2, machine(runner), REACHABLE)
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


def time_uncompiled(runner: Runner, name: str, batch: int, segment: int, acceptance: float) -> None:
    """Heartbeats in which no layer is compiled, against those of the other parts."""
    models = pair(runner, name)
    runner.shared.pop("engine", None)
    try:
        rewards = pilot(engine(runner, models, torch_compile=False), models, segment, runner.tiny)
        compare_engine(runner, models, rewards, batch, segment, acceptance, 8.0, remark=", unc.")
    finally:
        runner.shared.pop("engine", None)


@contextmanager
def stopwatches(runner: Runner) -> Iterator[list[dict[str, float]]]:
    """Time the stages of every heartbeat inside, waiting for the device around each: the sum is longer than without."""
    beats: list[dict[str, float]] = []
    originals = {name: getattr(Generation, name) for name in STAGES if hasattr(Generation, name)}

    def timed(name: str) -> Any:
        def stage(self: Generation, *args: Any) -> Any:
            synchronize(runner)
            started = time.perf_counter()
            result = originals[name](self, *args)
            synchronize(runner)
            if name == "admit":
                beats.append(defaultdict(float))
            beats[-1][name] += time.perf_counter() - started
            return result

        return stage

    for name in originals:
        setattr(Generation, name, timed(name))
    try:
        yield beats
    finally:
        for name, original in originals.items():
            setattr(Generation, name, original)


def split(runner: Runner, name: str, batch: int, segment: int, acceptance: float) -> None:
    """A profiling pass: stages of a heartbeat with a wait around each, then which kernels ran, and for how long."""
    models = pair(runner, name)
    length, response = (8, 8 * segment) if runner.tiny else (PROMPT, RESPONSE)
    driven = engine(runner, models)
    config = guided(pilot(driven, models, segment, runner.tiny), acceptance, segment, response)
    best = expectation(runner, models, batch, segment, acceptance, length + response / 2, None)
    prompts, wanted = models.prompts(batch, length), 2 if runner.tiny else 6
    with stopwatches(runner) as beats:
        watch = run_engine(runner, driven, prompts, config, best["candidates"], wanted, 8.0)
    steady = [stages for stages, beat in zip(beats, watch.beats, strict=False) if beat.steady]
    if steady:
        runner.add(
            "split",
            pair=name,
            batch=batch,
            segment=segment,
            acceptance=watch.acceptance,
            candidates=best["candidates"],
            heartbeat_milliseconds=statistics.median(beat.seconds for beat in watch.steady) * 1e3,
            stages_milliseconds={
                stage: statistics.median(stages.get(stage, 0.0) for stages in steady) * 1e3 for stage in STAGES
            },
            expected=best,
        )
    if runner.time_for(0 if runner.tiny else 8):
        profile(runner, models, prompts, config, best["candidates"])


def profile(runner: Runner, models: Pair, prompts: list[list[int]], config: Any, candidates: int) -> None:
    """The kernels of one steady heartbeat, by the time they take; the rest of it the device waits for the host."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    seen: list[Any] = []

    def on_beat(generation: Generation) -> None:
        if generation.waiting or len(generation.running) < len(prompts):
            return
        seen.append(None)
        if len(seen) == 3:
            synchronize(runner)
            profiler.start()
            seen[-1] = time.perf_counter()
        elif len(seen) == 4:
            synchronize(runner)
            seen[-1] = time.perf_counter() - seen[2]
            profiler.stop()

    # The heartbeat that is profiled replays graphs: the same run has just captured them.
    activity = ProfilerActivity.CUDA if runner.on_gpu else ProfilerActivity.CPU
    profiler = torch.profiler.profile(activities=[activity])
    original = Generation.heartbeat

    def watched(self: Generation) -> Any:
        if len(seen) < 4:
            on_beat(self)
        return original(self)

    Generation.heartbeat = watched  # type: ignore[method-assign]
    try:
        events = engine(runner, models).stream(prompts, config, candidates=candidates, seed=0, on_error="raise")
        for _ in events:
            if len(seen) >= 4:
                break
        events.close()
    finally:
        Generation.heartbeat = original  # type: ignore[method-assign]
    if len(seen) < 4:
        if len(seen) == 3:
            profiler.stop()
        raise RuntimeError(f"only {len(seen)} steady heartbeats: too few to profile one")
    # Calls that launch kernels are listed too, some with the time of what they launched.
    kernels = [one for one in profiler.key_averages() if one.device_type == DeviceType.CUDA]
    kernels.sort(key=lambda kernel: -kernel.device_time_total)
    busy, wall = sum(kernel.device_time_total for kernel in kernels) / 1e3, seen[3] * 1e3  # us, s -> ms
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

"""Heartbeats under the profiler: where the device is idle, and in which stage the host is then."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any
from unittest.mock import patch

from benchmarks.gpu_parts.heartbeats import stream_until, workload
from benchmarks.gpu_parts.kernels import OTHER, Kernel, busy, marked, profiler_of, read
from benchmarks.gpu_parts.models import pilots
from benchmarks.gpu_parts.runner import Runner
from stars_fast.bench.yardsticks import synchronize
from stars_fast.loop.heartbeat import Loop
from stars_fast.loop.row_cost import Heartbeat
from stars_fast.loop.trunks import Trunks

_IDLE = 50.0  # microseconds; a shorter gap is the next kernel's launch
_HEARTBEATS = 5
_STAGES = ("make_room", "admit", "join", "set_base_rewards", "propose", "score", "judge", "drop_finished")


def measure_idle(runner: Runner) -> None:
    """Five heartbeats: where the device waits for the host, and what the host does in each stage beside its waits."""
    for groups, candidates in ((3, 2),) if runner.tiny else ((64, 3), (1, 11)):
        if runner.time_for(6):
            with runner.guarded(f"idle, {groups} x {candidates}"):
                _profile_heartbeats(runner, groups, candidates)


def _profile_heartbeats(runner: Runner, groups: int, candidates: int) -> None:
    driven, load = pilots(runner), workload(runner, groups, 0.3)
    prompts, config = driven.pair.prompts(groups, load.prompt_length), driven.config(load)
    profiler, seen = profiler_of(runner.device, host=True), 0
    first, count = (2, 2) if runner.tiny else (6, _HEARTBEATS)
    last = first + count + 1  # one more, with which the last one ends

    def on_heartbeat(one: Heartbeat) -> None:
        """The profiler starts and ends inside a heartbeat: of these two it sees a part, which does not count."""
        nonlocal seen
        if one.requests == groups and not one.timing.encoded and one.measured:
            seen += 1
            if seen == first:
                profiler.start()
            elif seen == last + 1:
                synchronize(runner.device)
                profiler.stop()

    driven.engine.on_heartbeat = on_heartbeat
    try:
        with stages_marked():
            for seed in range(4):
                stream_until(lambda: seen > last, driven.engine, prompts, config, candidates, seed)
    finally:
        driven.engine.on_heartbeat = None
        if first <= seen <= last:
            profiler.stop()
    found = read(profiler, runner.device)
    whole = [one for one in found.stages if one.name == "heartbeat"][-count - 1 :]
    spans = [one._replace(duration=after.start - one.start) for one, after in pairwise(whole)]  # to the next one
    idle, walls = list[float](), list[float]()
    host, by_stage = defaultdict[str, float](float), defaultdict[str, float](float)
    for span in spans:
        inside = [one for one in found.kernels if span.start <= one.start < span.end]
        edges = [Kernel("", span.start, 0.0), *inside, Kernel("", span.end, 0.0)]
        _, gaps = busy(edges, _IDLE)
        for gap in gaps:
            by_stage[_stage_at(found.stages, gap.start + gap.duration / 2)] += gap.duration / 1e3 / len(spans)
        idle.append(sum(gap.duration for gap in gaps) / 1e3)
        walls.append(span.duration / 1e3)
        for stage in found.stages:
            if stage.name != "heartbeat" and span.start <= stage.start < span.end:
                waited = sum(wait.duration for wait in found.waits if stage.start <= wait.start < stage.end)
                host[stage.name] += (stage.duration - waited) / 1e3 / len(spans)
    runner.add(
        "idle",
        pair=driven.pair.name,
        groups=groups,
        candidates=candidates,
        milliseconds=walls,
        idle_milliseconds=idle,
        idle_by_stage_milliseconds=dict(by_stage),
        host_milliseconds=dict(host),
    )


def _stage_at(stages: list[Kernel], at: float) -> str:
    """The innermost stage that the host was in."""
    inside = [one for one in stages if one.start <= at < one.end]
    name = min(inside, key=lambda one: one.duration, default=Kernel(OTHER, 0.0, 0.0)).name
    return "between stages" if name == "heartbeat" else name


@contextmanager
def stages_marked() -> Iterator[None]:
    """Mark the stages of heartbeats for the profiler."""
    with ExitStack() as stack:
        for owner, names in ((Loop, ("heartbeat", *_STAGES)), (Trunks, ("extend",))):
            for name in names:
                if hasattr(owner, name):
                    stack.enter_context(patch.object(owner, name, _marking(name, getattr(owner, name))))
        yield


def _marking(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **keywords: Any) -> Any:
        with marked(name):
            return method(*arguments, **keywords)

    return call

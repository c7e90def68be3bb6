"""What a heartbeat costs the host: CPU seconds of this thread outside both models' forward passes and the draws.

python -m benchmarks.micro.host            # --profile prints where they go
"""

from __future__ import annotations

import cProfile
import pstats
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
import typer

from stars_fast import StarsEngine
from stars_fast.bench.models import random_pair
from stars_fast.loop.heartbeat import Loop
from stars_fast.loop.queue import Queue
from stars_fast.loop.row_cost import Heartbeat
from stars_fast.loop.trunks import Trunks
from stars_fast.policy.steps import Steps
from stars_fast.tree.model import TreeModel

STAGES = {
    "extend": (Trunks, "extend"),
    "propose": (Loop, "propose"),
    "score": (Loop, "score"),
    "judge": (Loop, "judge"),
}


class Clock:
    """CPU seconds of a heartbeat, by stage, in :attr:`beats`; what runs on the device elsewhere is left out."""

    def __init__(self) -> None:
        self.inside = 0.0  # forward passes and draws, so far
        self.now: dict[str, float] = defaultdict(float)
        self.beats: list[dict[str, float]] = []

    def stop(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that does not count."""

        def uncounted(*args: Any, **kwargs: Any) -> Any:
            started, before = time.thread_time(), self.inside
            try:
                return function(*args, **kwargs)
            finally:
                self.inside = before + time.thread_time() - started

        return uncounted

    def of(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function whose seconds are those of a stage."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            started, before = time.thread_time(), self.inside
            try:
                return function(*args, **kwargs)
            finally:
                self.now[stage] += time.thread_time() - started - (self.inside - before)

        return counted

    def beat(self, _: Heartbeat) -> None:
        """A heartbeat is over."""
        self.beats.append(dict(self.now))
        self.now.clear()


@contextmanager
def watched(clock: Clock) -> Iterator[None]:
    """Heartbeats inside are timed."""
    places: list[tuple[Any, str, Callable[..., Any]]] = [
        (TreeModel, "forward", clock.stop(TreeModel.forward)),
        (Steps, "run", clock.stop(Steps.run)),
        (Steps, "draw", clock.stop(Steps.draw)),
        (Queue, "admit", clock.of("admit", Queue.admit)),
    ]
    places += [(owner, name, clock.of(stage, getattr(owner, name))) for stage, (owner, name) in STAGES.items()]
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    for owner, name, function in places:
        setattr(owner, name, function)
    try:
        yield
    finally:
        for owner, name, function in kept:
            setattr(owner, name, function)


def engine_for(requests: int, candidates: Any, tokens: int = 64) -> tuple[StarsEngine, Callable[[int], Any]]:
    """A small pair, and a call in which all requests draw so many candidates for eight heartbeats or more."""
    pair = random_pair("1m", torch.float32, torch.device("cpu"))
    one = StarsEngine(pair.policy, pair.reward, reward_tokenizer="policy", max_rows=512, kv_cache_tokens=60_000)
    prompts = pair.prompts(requests, 64)
    fields = {"target_reward": 0.0, "beta": 1.0, "alpha": 1.0, "max_new_tokens": tokens, "ignore_eos": True}
    return one, lambda seed: one.generate(prompts, seed=seed, candidates=candidates, segment_length=16, **fields)


def host_seconds(requests: int, candidates: int, calls: int = 3) -> dict[str, float]:
    """CPU seconds of a heartbeat in which all requests draw, by stage: medians over the heartbeats of some calls."""
    torch.set_num_threads(1)
    one, call = engine_for(requests, candidates)
    call(0)
    clock, full = Clock(), list[int]()
    with watched(clock):
        one.on_heartbeat = lambda beat: (clock.beat(beat), full.append(beat.requests))[0]
        for seed in range(1, calls + 1):
            call(seed)
    beats = [beat for beat, drew in zip(clock.beats, full, strict=True) if drew == requests]
    found = {stage: statistics.median(beat.get(stage, 0.0) for beat in beats) for stage in (*STAGES, "admit")}
    return {**found, "all": statistics.median(sum(beat.values()) for beat in beats)}


def run(
    requests: Annotated[int, typer.Option(help="Requests.")] = 64,
    candidates: Annotated[int, typer.Option(help="Candidates of each.")] = 3,
    calls: Annotated[int, typer.Option(help="Calls, of four segments a request.")] = 3,
    profile: Annotated[bool, typer.Option(help="Print where the time goes.")] = False,
) -> None:
    """Print milliseconds of the host, by stage."""
    if profile:
        torch.set_num_threads(1)
        _, call = engine_for(requests, candidates)
        call(0)
        profiler = cProfile.Profile(time.thread_time)
        profiler.runcall(call, 1)
        pstats.Stats(profiler).sort_stats("tottime").print_stats("stars_fast|Tensor|torch.tensor", 45)
    for stage, seconds in host_seconds(requests, candidates, calls).items():
        print(f"{stage:8} {seconds * 1e3:6.2f} ms")


if __name__ == "__main__":
    typer.run(run)

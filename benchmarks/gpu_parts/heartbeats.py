"""Whole heartbeats of the engine in a steady state, and what the baselines do in that time."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from gpu_parts.models import Pair
from gpu_parts.runner import Runner
from stars_fast import StarsConfig, StarsEngine
from stars_fast.loop.heartbeat import Generation
from stars_fast.methods.stars import acceptance_probability
from stars_fast.tree.graphs import Graphs

PROMPT, RESPONSE = 128, 256  # tokens: a mean context of 256, and time for a steady state
_BETA = 0.5  # standard deviations of the rewards


class Beat(NamedTuple):
    """One heartbeat, from outside."""

    seconds: float
    committed: int  # tokens
    drawn: int  # tokens
    context: float  # mean tokens of prompt and accepted text
    steady: bool  # all requests ran, nothing was prefilled, no graph was captured


@dataclass
class Watch:
    """What :func:`watching` has seen of one run."""

    beats: list[Beat] = field(default_factory=list)
    acceptance: float = math.nan  # mean acceptance probability of all candidates scored
    on_beat: Callable[[Generation], Any] | None = None  # before each

    @property
    def steady(self) -> list[Beat]:
        return [beat for beat in self.beats if beat.steady]


@contextmanager
def watching(batch: int) -> Iterator[Watch]:
    """Note every heartbeat inside: a clock, and no wait, as a heartbeat ends when the host has its verdicts."""
    watch, beat = Watch(), Generation.heartbeat
    requests: dict[int, Any] = {}

    def watched(self: Generation) -> Any:
        full = not self.waiting and len(self.running) == batch
        requests.update((id(request), request) for request in self.running)
        context = statistics.fmean(len(r.prompt.ids) + len(r.tokens) for r in self.running) if self.running else 0.0
        prepared, committed, drawn = Graphs.prepared_by_all, self.stats.committed_tokens, self.stats.policy_tokens
        if watch.on_beat is not None:
            watch.on_beat(self)
        started = time.perf_counter()
        changed = beat(self)
        seconds = time.perf_counter() - started
        steady = full and prepared == Graphs.prepared_by_all
        watch.beats.append(
            Beat(seconds, self.stats.committed_tokens - committed, self.stats.policy_tokens - drawn, context, steady)
        )
        return changed

    Generation.heartbeat = watched  # type: ignore[method-assign]
    try:
        yield watch
    finally:
        Generation.heartbeat = beat  # type: ignore[method-assign]
        scored = sum(request.scored for request in requests.values())
        if scored:
            watch.acceptance = sum(request.acceptance_sum for request in requests.values()) / scored


def engine(runner: Runner, pair: Pair, torch_compile: bool = True) -> StarsEngine:
    """An engine on these models whose trees keep their size, so that graphs serve all calls."""
    kept = runner.shared.get("engine")
    if kept is None or kept.policy.model is not pair.policy:
        slots = 2_000 if runner.tiny else 30_000
        runner.shared["engine"] = kept = StarsEngine(
            pair.policy,
            pair.reward,
            kv_cache_tokens=slots,
            torch_compile=torch_compile,
        )
    return kept


def pilot(engine: StarsEngine, pair: Pair, segment: int, tiny: bool, prompts: int = 64) -> list[float]:
    """Rewards of unguided segments after the first of the pair's prompts, as many for one prompt as for 64."""
    config = StarsConfig(target_reward=-math.inf, max_attempts=1, segment_length=segment, ignore_eos=True)
    out = engine.generate(
        pair.prompts(prompts, 8 if tiny else PROMPT),
        config,
        seed=0,
        max_new_tokens=2 * segment,
        num_return_sequences=64 // prompts,
        on_error="raise",
    )
    return [one.reward for row in out.segments for one in row]


def guided(rewards: list[float], acceptance: float, segment: int, response: int) -> StarsConfig:
    """A config whose threshold, the same at every length, accepts these rewards with that probability."""
    beta = _BETA * statistics.pstdev(rewards) or 1.0
    low, high = min(rewards) - 40 * beta, max(rewards) + 40 * beta
    for _ in range(60):
        middle = (low + high) / 2
        expected = statistics.fmean(acceptance_probability(reward, middle, beta) for reward in rewards)
        low, high = (middle, high) if expected > acceptance else (low, middle)
    return StarsConfig(
        segment_length=segment,
        max_new_tokens=response,
        target_reward=low,
        alpha=1.0,
        beta=beta,
        ignore_eos=True,
    )


def run_engine(
    runner: Runner,
    engine: StarsEngine,
    prompts: list[list[int]],
    config: StarsConfig,
    candidates: int | str,
    wanted: int,
    seconds: float,
) -> Watch:
    """Run until so many steady heartbeats are seen, or the time is up; a stream closed early leaves nothing behind."""
    ends = time.time() + min(seconds, max(runner.left(), 1.0))
    with watching(len(prompts)) as watch:
        seed = 0
        while len(watch.steady) < wanted and time.time() < ends:
            events = engine.stream(prompts, config, candidates=candidates, seed=seed, on_error="raise")
            for _ in events:
                if len(watch.steady) >= wanted or time.time() >= ends:
                    break
            events.close()
            seed += 1
    return watch


def figures(watch: Watch, batch: int, segment: int) -> dict[str, Any]:
    """What the steady heartbeats say.

    ``tokens_per_second`` is batch x K x P(commit) over the mean heartbeat, where P(commit) = 1 - (1 - a)^M with the
    mean acceptance ``a`` of all candidates scored and M the candidates per request: of a few heartbeats it is far more
    exact than what they happened to commit, which ``counted_tokens_per_second`` is.
    """
    beats = watch.steady
    if beats:  # a kernel may have been compiled in one of them
        longest = 3 * statistics.median(beat.seconds for beat in beats)
        beats = [beat for beat in beats if beat.seconds <= longest]
    else:
        return {"beats": 0, "all_beats": [beat._asdict() for beat in watch.beats]}
    mean = statistics.fmean(beat.seconds for beat in beats)
    rows = statistics.fmean(beat.drawn for beat in beats) / segment
    commit = statistics.fmean(1 - (1 - watch.acceptance) ** (beat.drawn / segment / batch) for beat in beats)
    return {
        "acceptance": watch.acceptance,
        "rows": rows,
        "beats": len(beats),
        "outliers": len(watch.steady) - len(beats),
        "milliseconds": mean * 1e3,
        "median_milliseconds": statistics.median(beat.seconds for beat in beats) * 1e3,
        "tokens_per_second": batch * segment * commit / mean,
        "counted_tokens_per_second": sum(beat.committed for beat in beats) / sum(beat.seconds for beat in beats),
        "context": statistics.fmean(beat.context for beat in beats),
        "all_beats": [beat._asdict() for beat in watch.beats],
    }


def synchronize(runner: Runner) -> None:
    if runner.on_gpu:
        torch.cuda.synchronize()

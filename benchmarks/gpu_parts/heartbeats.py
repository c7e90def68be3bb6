"""Whole heartbeats of the engine in a steady state."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from benchmarks.gpu_parts.runner import Runner
from stars_fast import StarsConfig, StarsEngine
from stars_fast.bench.models import Pair
from stars_fast.bench.workload import Pilots, Workload
from stars_fast.loop.row_cost import Heartbeat

PROMPT, RESPONSE = 128, 256  # tokens: a mean context of 256, and time for a steady state


class Beat(NamedTuple):
    """One heartbeat."""

    propose: float  # seconds from its start until candidates were drawn
    score: float  # seconds from then on
    committed: int  # tokens
    drawn: int  # tokens
    context: float  # mean tokens of prompt and accepted text
    steady: bool  # all requests ran, nothing was prefilled, no graph was captured

    @property
    def seconds(self) -> float:
        return self.propose + self.score


@dataclass
class Watch:
    """What an engine tells of its heartbeats with these prompts, call after call."""

    prompts: list[list[int]]
    beats: list[Beat] = field(default_factory=list)
    calls: list[Heartbeat] = field(default_factory=list)  # the last one of each
    context: float = math.nan

    def begin(self) -> None:
        """The next call starts."""
        self.context = statistics.fmean(map(len, self.prompts))

    def __call__(self, one: Heartbeat) -> None:
        timing, batch = one.timing, len(self.prompts)
        steady = one.measured and one.requests == batch and not timing.encoded
        work = (one.committed, one.drawn, self.context, steady)
        self.beats.append(Beat(timing.propose_seconds, timing.score_seconds, *work))
        self.context += one.committed / batch
        self.last = one

    def end(self) -> None:
        """The call has ended."""
        self.calls.append(self.last)

    @property
    def steady(self) -> list[Beat]:
        return [beat for beat in self.beats if beat.steady]

    @property
    def acceptance(self) -> float:
        """Mean acceptance probability of all candidates scored."""
        return sum(one.accepted for one in self.calls) / sum(one.tested for one in self.calls)


def workload(runner: Runner, batch: int, segment: int, acceptance: float) -> Workload:
    """Requests that are long enough for a steady state."""
    length, response = (8, 8 * segment) if runner.tiny else (PROMPT, max(RESPONSE, 4 * segment))
    return Workload(batch, length, response, segment, acceptance, top_k=0)


def pilots(runner: Runner, pair: Pair, torch_compile: bool = True) -> Pilots:
    """An engine on these models whose trees keep their size, so that graphs serve all calls, and its targets."""
    kept = runner.shared.get("pilots")
    if kept is None or kept.pair is not pair:
        slots = 4_000 if runner.tiny else 30_000
        engine = StarsEngine(
            pair.policy, pair.reward, reward_tokenizer="policy", kv_cache_tokens=slots, torch_compile=torch_compile
        )
        runner.shared["pilots"] = kept = Pilots(pair, engine)
    return kept


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
    engine.on_heartbeat = watch = Watch(prompts)
    try:
        while len(watch.steady) < wanted and time.time() < ends:
            watch.begin()
            events = engine.stream(prompts, config, candidates=candidates, seed=len(watch.calls), on_error="raise")
            for _ in events:
                if len(watch.steady) >= wanted or time.time() >= ends:
                    break
            events.close()
            watch.end()
    finally:
        engine.on_heartbeat = None
    return watch


def figures(watch: Watch, segment: int) -> dict[str, Any]:
    """What the steady heartbeats say.

    ``tokens_per_second`` is batch x K x P(commit) over the mean heartbeat, where P(commit) = 1 - (1 - a)^M with the
    mean acceptance ``a`` of all candidates scored and M the candidates per request: of a few heartbeats it is far more
    exact than what they happened to commit, which ``counted_tokens_per_second`` is.
    """
    beats, batch = watch.steady, len(watch.prompts)
    told = [{"seconds": beat.seconds, **beat._asdict()} for beat in watch.beats]
    if not beats:
        return {"beats": 0, "all_beats": told}
    longest = 3 * statistics.median(beat.seconds for beat in beats)  # a kernel may have been compiled in one of them
    beats = [beat for beat in beats if beat.seconds <= longest]
    mean = statistics.fmean(beat.seconds for beat in beats)
    commit = statistics.fmean(1 - (1 - watch.acceptance) ** (beat.drawn / segment / batch) for beat in beats)
    return {
        "acceptance": watch.acceptance,
        "rows": statistics.fmean(beat.drawn for beat in beats) / segment,
        "beats": len(beats),
        "outliers": len(watch.steady) - len(beats),
        "milliseconds": mean * 1e3,
        "median_milliseconds": statistics.median(beat.seconds for beat in beats) * 1e3,
        "tokens_per_second": batch * segment * commit / mean,
        "counted_tokens_per_second": sum(beat.committed for beat in beats) / sum(beat.seconds for beat in beats),
        "context": statistics.fmean(beat.context for beat in beats),
        "all_beats": told,
    }

"""Heartbeats of the engine, and the steady ones at three acceptances and batch sizes.

A heartbeat is *warm* where all its passes had been met before: nothing was compiled or captured in it, and nothing
launched for want of a graph. It is *steady* where it is warm, all requests of the batch drew, and no prompt was let in.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

from benchmarks.gpu_parts.expected import expectation
from benchmarks.gpu_parts.models import costs, machine, pilots
from benchmarks.gpu_parts.runner import Runner
from stars_fast import StarsConfig, StarsEngine
from stars_fast.bench.workload import Workload
from stars_fast.loop.row_cost import Heartbeat
from stars_fast.tree.graphs import Captured
from stars_fast.tree.model import TreeModel

PROMPT, RESPONSE = 128, 256  # tokens: a mean context of 256, and time for a steady state
BEATS = 16  # steady ones that a figure rests on, at least
REPEATS = 3


class Beat(NamedTuple):
    """One heartbeat."""

    seconds: float  # since the one before
    committed: int  # tokens
    drawn: int  # tokens
    scored: int  # tokens that the reward model read, prompts included
    requests: int
    context: float  # mean tokens of prompt and accepted text, where requests are not replaced
    refilled: bool  # a prompt was let in
    warm: bool
    steady: bool


class Watch:
    """What an engine tells of its heartbeats with these prompts, call after call."""

    def __init__(self, engine: StarsEngine, prompts: Sequence[list[int]]) -> None:
        self.engine, self.batch = engine, len(prompts)
        self.length = statistics.fmean(map(len, prompts))
        self.beats: list[Beat] = []
        self.passes: Counter[str] = Counter()
        self.last: list[Heartbeat] = []  # of each call

    def begin(self) -> None:
        """The next call starts."""
        self._context, self._scored, self._launched = self.length, self.engine.reward.tokens, self.passes["launched"]
        self._one: Heartbeat | None = None
        self._at = time.perf_counter()

    def __call__(self, one: Heartbeat) -> None:
        scored, launched, at = self.engine.reward.tokens, self.passes["launched"], time.perf_counter()
        refilled, warm = one.timing.encoded > 0, one.measured and launched == self._launched
        self.beats.append(
            Beat(
                seconds=at - self._at,
                committed=one.committed,
                drawn=one.drawn,
                scored=scored - self._scored,
                requests=one.requests,
                context=self._context,
                refilled=refilled,
                warm=warm,
                steady=warm and one.requests == self.batch and not refilled,
            )
        )
        self._context += one.committed / self.batch
        self._scored, self._launched, self._one, self._at = scored, launched, one, at

    def end(self) -> None:
        """The call has ended."""
        self.last += [self._one] if self._one else []

    @property
    def steady(self) -> list[Beat]:
        return [beat for beat in self.beats if beat.steady]

    @property
    def acceptance(self) -> float:
        """Mean acceptance probability of all candidates looked at."""
        return sum(one.accepted for one in self.last) / sum(one.tested for one in self.last)


@contextmanager
def counting_passes(counts: Counter[str]) -> Iterator[None]:
    """Count, on a GPU, the decode steps and small passes that replay a graph, those launched for want of one, and the
    passes of more tokens than are captured.
    """
    run, small_pass = Captured.run, TreeModel._small_pass

    def counted(work: Captured) -> None:
        if work.model.device.type == "cuda":
            counts["launched" if work.graph is None else "replayed"] += 1
        run(work)

    def asked(model: TreeModel, *arguments: Any) -> Any:
        small = small_pass(model, *arguments)
        if small is None and model.device.type == "cuda":
            counts["large"] += 1
        return small

    with patch.object(Captured, "run", counted), patch.object(TreeModel, "_small_pass", asked):
        yield


@contextmanager
def watching(engine: StarsEngine, prompts: Sequence[list[int]]) -> Iterator[Watch]:
    """Look on while the engine runs inside."""
    engine.on_heartbeat = watch = Watch(engine, prompts)
    try:
        with counting_passes(watch.passes):
            yield watch
    finally:
        engine.on_heartbeat = None


def workload(runner: Runner, batch: int, acceptance: float, prompt: int = PROMPT, response: int = RESPONSE) -> Workload:
    """Requests that are long enough for a steady state."""
    length, response, segment = (8, 32, 4) if runner.tiny else (prompt, response, 16)
    return Workload(batch, length, response, segment, acceptance, top_k=0)


def run_engine(
    runner: Runner, prompts: list[list[int]], config: StarsConfig, candidates: int | str, wanted: int, seconds: float
) -> Watch:
    """Run until so many steady heartbeats are seen, or the time is up."""
    engine, ends = pilots(runner).engine, time.time() + min(seconds, max(runner.left(), 1.0))
    with watching(engine, prompts) as watch:
        while len(watch.steady) < wanted and time.time() < ends:
            watch.begin()
            seed = len(watch.last)
            stream_until(
                lambda: len(watch.steady) >= wanted or time.time() >= ends, engine, prompts, config, candidates, seed
            )
            watch.end()
    return watch


def stream_until(
    enough: Callable[[], bool],
    engine: StarsEngine,
    prompts: list[list[int]],
    config: StarsConfig,
    candidates: int | str,
    seed: int,
) -> None:
    """Run one call to its end, or until there is enough; a stream closed early leaves nothing behind."""
    events = engine.stream(prompts, config, candidates=candidates, seed=seed, on_error="raise")
    with closing(events):  # type: ignore[type-var]
        for _ in events:
            if enough():
                break


def figures(watch: Watch, load: Workload) -> dict[str, Any]:
    """What the steady heartbeats say.

    ``tokens_per_second`` is batch x K x P(commit) over the mean heartbeat, where P(commit) = 1 - (1 - a)^M with the
    wanted acceptance ``a`` and M the candidates per request: of a few heartbeats it is far more exact than what they
    happened to commit.
    """
    beats = watch.steady
    told: dict[str, Any] = {"beats": len(beats), "all_beats": [beat._asdict() for beat in watch.beats]}
    if not beats:
        return told
    seconds = [beat.seconds for beat in beats]
    mean, rows = statistics.fmean(seconds), statistics.fmean(beat.drawn for beat in beats) / load.segment_length
    commit = 1 - (1 - load.acceptance) ** (rows / load.batch)
    error = statistics.stdev(seconds) / math.sqrt(len(beats)) if len(beats) > 1 else None
    return told | {
        "acceptance": watch.acceptance,
        "rows": rows,
        "milliseconds": mean * 1e3,
        "standard_error_milliseconds": error and error * 1e3,
        "median_milliseconds": statistics.median(seconds) * 1e3,
        "repeats_milliseconds": [part * 1e3 for part in thirds(seconds)],
        "tokens_per_second": load.batch * load.segment_length * commit / mean,
        "context": statistics.fmean(beat.context for beat in beats),
    }


def thirds(seconds: Sequence[float]) -> list[float]:
    """Means of the first, the next and the last third, or of what there is."""
    size = math.ceil(len(seconds) / REPEATS)
    return [statistics.fmean(seconds[at : at + size]) for at in range(0, len(seconds), size)]


def measure_engine(
    runner: Runner,
    load: Workload,
    candidates: int | str,
    seconds: float,
    beats: int = BEATS,
    kind: str = "engine",
    **about: Any,
) -> dict[str, Any] | None:
    """Steady heartbeats of one workload, beside what the roofline expects of as many candidates. The row; None where
    there was no time, or an error.
    """
    if not runner.time_for(0.5 * seconds):
        return None
    driven = pilots(runner)
    with runner.guarded(f"engine, batch {load.batch}, {load.acceptance:.0%} wanted, candidates {candidates}"):
        prompts, config = driven.pair.prompts(load.batch, load.prompt_length), driven.config(load)
        watch = run_engine(runner, prompts, config, candidates, 3 if runner.tiny else beats, seconds)
        row: dict[str, Any] = {"pair": driven.pair.name, **about, "batch": load.batch, "segment": load.segment_length}
        row |= {"wanted": load.acceptance, "candidates": candidates, **figures(watch, load)}
        if row["beats"]:
            work = load.batch, load.segment_length, load.acceptance, row["context"], row["rows"] / load.batch
            row["expected"] = expectation(costs(runner), machine(runner), *work, in_order=driven.engine.core.in_order)
            row["of_expected"] = [row["expected"]["milliseconds"] / one for one in row["repeats_milliseconds"]]
        return runner.add(kind, **row)
    return None


def measure_acceptances(runner: Runner) -> None:
    """Steady heartbeats of batch 64: 30, 15 and 50 % accepted, as the engine chooses and with one candidate."""
    for candidates in ("auto", 1):
        for acceptance in (0.3,) if runner.tiny else (0.3, 0.15, 0.5):
            measure_engine(runner, workload(runner, 4 if runner.tiny else 64, acceptance), candidates, 9.0)


def measure_small_batches(runner: Runner) -> None:
    """Steady heartbeats of batch 1 and 16, 30 % accepted."""
    for batch in (1, 2) if runner.tiny else (1, 16):
        measure_engine(runner, workload(runner, batch, 0.3), "auto", 8.0, 2 * BEATS)

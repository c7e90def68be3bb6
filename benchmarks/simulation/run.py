"""Requests through the engine's own scheduler, heartbeat by heartbeat."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.simulation.acceptance import Course
from benchmarks.simulation.machine import Machine
from stars_fast.config import StarsConfig
from stars_fast.loop.in_order import PASS_OF_GPUS, Pass, first_stage
from stars_fast.loop.one_answer import OneAnswer
from stars_fast.loop.queue import Queue
from stars_fast.loop.request import PromptNode, Request, Terms
from stars_fast.loop.row_cost import Timing
from stars_fast.loop.scheduler import Scheduler
from stars_fast.methods import Stars
from stars_fast.outputs import Stats
from stars_fast.policy.leaf import Sampling
from stars_fast.rewards import RewardPrompt

_AMPLE = 1 << 40  # slots
# Disturbances of what the scheduler learns, left out of what is compared: standard deviation of the logarithm of the
# seconds, and the share of heartbeats that seem to take five times as long.
_SCATTER, _STALLS = 0.03, 0.01


@dataclass(frozen=True)
class Work:
    """What is asked of the simulated engine. ValueError for a batch that ``max_rows`` does not hold."""

    courses: list[Course]  # one per request; all wait from the start
    batch: int = 64  # most running requests
    segment: int = 16
    max_attempts: int = 20
    prompt: int = 192  # tokens
    max_rows: int = 256  # most candidates in one heartbeat
    in_order: bool = False  # whether candidates are scored in stages, those behind an accepted one never

    def __post_init__(self) -> None:
        if not 1 <= self.batch <= self.max_rows:
            raise ValueError(f"batch={self.batch}: at least 1, and at most max_rows={self.max_rows}")


@dataclass(frozen=True)
class Outcome:
    """What a schedule made of the work."""

    name: str
    heartbeats: int
    seconds: float  # of the simulated machine
    committed: int  # tokens
    drawn: int  # tokens
    rows: float  # mean candidates of a heartbeat
    host_us: float  # microseconds of processor time that the scheduler itself took per heartbeat, here and now

    @property
    def tokens_per_second(self) -> float:
        """Committed ones."""
        return self.committed / self.seconds

    @property
    def waste(self) -> float:
        """Tokens discarded per token committed."""
        return self.drawn / self.committed - 1


class Informed(Scheduler):
    """Knows each request's acceptance, and what heartbeats cost on average."""

    def __init__(self, work: Work, machine: Machine) -> None:
        super().__init__(work.max_rows, _AMPLE, scoring=_scoring(work))
        self.work, self.machine, self._requests = work, machine, 1

    def acceptance(self, running: Sequence[Request]) -> list[float]:
        return [self.work.courses[request.index].acceptance for request in running]

    def costs(self, rows: np.ndarray, together: int) -> np.ndarray:
        requests = int(rows[0])
        return np.array([self._seconds(n, requests, together) for n in rows.tolist()])

    def shares(
        self, acceptance: Sequence[float], limits: Sequence[int], rows: int, together: int | None = None
    ) -> list[int]:
        self._requests = len(limits)
        return super().shares(acceptance, limits, rows, together)

    def row_price(self, in_order: bool) -> tuple[float, float]:
        """Of the chord up to four rows a request: a straight line does not describe buckets."""
        requests = self._requests
        most = max(min(4 * requests, self.work.max_rows), requests + 1)
        one = self._seconds(requests, requests)
        row = (self._seconds(most, requests, requests if in_order else most) - one) / (most - requests)
        return one - row * requests, row

    def _seconds(self, rows: int, requests: int, together: int | None = None) -> float:
        scored = [(rows if together is None else min(rows, together), requests)]
        return sum(self.machine.heartbeat(rows, requests, self.work.segment, 0, scored))


def simulate(work: Work, machine: Machine, schedule: str | int = "auto", seed: int = 0) -> Outcome:
    """Run all requests.

    The schedule is "auto", the engine's adaptive candidates; "oracle", the same with acceptance and costs known;
    "barrier", one candidate at a time with everybody waiting at the end of each segment for the slowest; or a fixed
    number of candidates. ValueError for another. The seed is of the machine's noise: which candidates are accepted is
    the work's, so all schedules commit the same.
    """
    return _Run(work, machine, schedule, seed).outcome()


def _terms(work: Work, candidates: str | int) -> Terms:
    longest, method = max(sum(course.tokens) for course in work.courses), Stars()
    config = StarsConfig(
        segment_length=work.segment, max_attempts=work.max_attempts, max_new_tokens=longest, candidates=candidates
    )
    return Terms(config, method, method.segments(), Sampling(), Stats())


def _scheduler(work: Work, machine: Machine, schedule: str | int) -> Scheduler:
    if schedule == "oracle":
        return Informed(work, machine)
    if schedule != "auto" and schedule != "barrier" and not isinstance(schedule, int):
        raise ValueError(f"schedule={schedule!r}: 'auto', 'oracle', 'barrier' or a number of candidates")
    return Scheduler(work.max_rows, _AMPLE, padded=machine.padded, scoring=_scoring(work))


def _scoring(work: Work) -> Pass | None:
    return PASS_OF_GPUS if work.in_order else None


class _Run:
    def __init__(self, work: Work, machine: Machine, schedule: str | int, seed: int) -> None:
        self.work, self.machine, self.schedule = work, machine, schedule
        self.scheduler = _scheduler(work, machine, schedule)
        self.rng = np.random.default_rng(seed)
        self.queue = Queue(None, None, self.scheduler, None)  # type: ignore[arg-type]  # there are no models
        self.strategy = OneAnswer(self.queue)
        terms = _terms(work, "auto" if schedule == "oracle" else 1 if schedule == "barrier" else schedule)
        self.queue.submit([_request(i, work, terms, self.strategy) for i in range(len(work.courses))])
        self.behind: list[Request] = []  # of the running ones, those that draw: with a barrier, some wait
        self.heartbeats = self.committed = self.drawn = self.rows = 0
        self.seconds = self.host_seconds = 0.0

    def outcome(self) -> Outcome:
        while self.queue.waiting or self.queue.running:
            self._heartbeat()
        return Outcome(
            str(self.schedule),
            self.heartbeats,
            self.seconds,
            self.committed,
            self.drawn,
            self.rows / self.heartbeats,
            1e6 * self.host_seconds / self.heartbeats,
        )

    def _heartbeat(self) -> None:
        queue, started = self.queue, time.thread_time()
        admitted = 0
        if not self.behind or self.schedule != "barrier":
            free = self.work.batch - len(queue.running)
            admitted = self.scheduler.admit(queue.waiting[:free], queue.running) if free else 0
            queue.running += queue.waiting[:admitted]
            del queue.waiting[:admitted]
            self.behind = queue.running
        shares = [count for _, count in self.strategy.asks(self.behind, self.scheduler.max_rows)]
        self.host_seconds += time.thread_time() - started
        drawing, lengths = self.behind, [self._length(request) for request in self.behind]
        timing = self._time(shares, max(lengths), admitted, self._stages(drawing, shares, lengths))
        started = time.thread_time()
        self.scheduler.observe(timing)
        self.host_seconds += time.thread_time() - started
        moved = {
            request
            for request, share, length in zip(drawing, shares, lengths, strict=True)
            if self._judge(request, share, length)
        }
        queue.drop_finished()
        self.behind = queue.running
        if self.schedule == "barrier":
            self.behind = [request for request in drawing if request not in moved]
        self.heartbeats += 1
        self.rows += timing.rows

    def _length(self, request: Request) -> int:
        return self.work.courses[request.index].tokens[len(request.segments)]

    def _stages(
        self, drawing: Sequence[Request], shares: Sequence[int], lengths: Sequence[int]
    ) -> list[tuple[int, int]]:
        """Candidates and requests of each scoring pass."""
        if self.scheduler.scoring is None:
            return [(sum(shares), len(shares))]
        courses = [self.work.courses[request.index] for request in drawing]
        until = [course.winners[len(r.segments)] - r.attempts for course, r in zip(courses, drawing, strict=True)]
        left, acceptance = list(range(len(drawing))), self.scheduler.acceptance(drawing)
        stages, looked_at = list[tuple[int, int]](), 0
        while left:
            sizes = [shares[i] - looked_at for i in left]
            some = [lengths[i] for i in left], [acceptance[i] for i in left]
            width = first_stage(sizes, *some, self.scheduler.scoring)
            stages.append((sum(min(width, size) for size in sizes), len(left)))
            looked_at += width
            left = [i for i in left if shares[i] > looked_at and until[i] > looked_at]
        return stages

    def _time(self, shares: Sequence[int], steps: int, prompts: int, scored: Sequence[tuple[int, int]]) -> Timing:
        rows = sum(shares)
        noise = float(np.exp(_SCATTER * self.rng.standard_normal()))
        if self.rng.random() < _STALLS:
            noise *= 5
        propose, score = self.machine.heartbeat(rows, len(shares), steps, prompts, scored)
        self.seconds += propose + score
        encoded = prompts * self.work.prompt
        return Timing(
            rows, steps, encoded, encoded, noise * propose, noise * score, sum(looked for looked, _ in scored)
        )

    def _judge(self, request: Request, share: int, length: int) -> bool:
        """Whether the request commits, with this many more candidates."""
        course = self.work.courses[request.index]
        winner = course.winners[len(request.segments)]
        # The least informative evidence: as if each candidate's acceptance probability were 0 or 1.
        left = winner - request.attempts  # candidates until the winner
        accepted = 0
        if left <= share:
            accepted = 1 + (int(self.rng.binomial(share - left, course.acceptance)) if share > left else 0)
        request.acceptance_sum += accepted
        request.scored += share
        request.attempts += share
        self.drawn += share * length
        if left > share and request.attempts < self.work.max_attempts:
            return False
        self._commit(request, length, len(course.tokens))
        return True

    def _commit(self, request: Request, length: int, segments: int) -> None:
        request.tokens.extend([0] * length)
        request.segments.append(None)  # type: ignore[arg-type]  # only counted
        request.attempts = 0
        self.committed += length
        if len(request.segments) == segments:
            request.finish_reason = "length"
            self.scheduler.retire(request)


def _request(index: int, work: Work, terms: Terms, strategy: OneAnswer) -> Request:
    ids = [0] * work.prompt
    node = PromptNode(ids, RewardPrompt(index, ids, ids))
    request = Request(terms, node, index, target=0.0, base=0.0, beta=1.0, index=index)
    request.strategy = strategy
    return request

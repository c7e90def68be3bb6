"""A day of a service on many replicas: routing, kept beginnings, in-order scoring, candidates that follow load.

All replicas are rows of arrays, so that a million requests take a minute or two of one core. For that, the engine's
scheduler is replaced by what it tends to: each of n running requests draws as many candidates as are best where n run.
:mod:`benchmarks.simulation.run` has the scheduler itself, for one replica; ``tests/test_simulation.py`` compares them.
Times are right to 50 ms: so often the router looks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from benchmarks.roofline import Gpu, ModelCost, Workload, heartbeat, prefill

Routing = Literal["random", "two", "prefix"]

_WINDOW = 0.05  # seconds: how old what the router knows of the replicas is
_AT_ONCE = 4  # requests that a replica admits in a heartbeat, at most
_MOST_ENCODED = 4096  # tokens in a heartbeat, as in stars_fast.loop.scheduler
_PATIENCE = 1.25  # a request leaves its home where that holds so many times the mean load
_BUSY = 0.9  # share of a GPU's memory that is used


@dataclass(frozen=True)
class Replica:
    """What one costs, in seconds, as functions of arrays."""

    seats: int  # most running requests
    kept: int  # shared beginnings that it can keep beside them
    candidates: np.ndarray  # [seats + 1]: of each request, where so many run
    seconds: np.ndarray  # [seats + 1]: of a heartbeat with them, without prompts
    token: float  # of a prompt's token, by both models
    segment: int
    max_attempts: int

    @classmethod
    def modelled(
        cls,
        policy: ModelCost,
        reward: ModelCost,
        gpu: Gpu,
        workload: Workload,
        seats: int,
        shared: float,
        slowdown: float = 1.0,
    ) -> Replica:
        """By the roofline, both models on one device.

        ``shared`` are the tokens of a shared beginning; ``slowdown`` is what a heartbeat was measured to take, over
        what was expected. ValueError where so many requests do not fit beside the weights.
        """
        most = _most_requests(policy, reward, gpu, workload)
        if seats > most:
            raise ValueError(f"seats={seats}: the memory of {gpu.name} holds {most} requests of {workload.context:g}")
        rows = range(1, seats + 1)
        best = [_best(policy, reward, replace(workload, batch=n), gpu) for n in rows]
        spare = (most - seats) * (workload.context + workload.response / 2)
        prompt = (
            prefill(policy, 1, workload.prompt, gpu).achievable_s
            + prefill(reward, 1, workload.prompt, gpu).achievable_s
        )
        return cls(
            seats,
            int(spare / shared) if shared else 0,
            np.array([0, *(m for m, _ in best)]),
            slowdown * np.array([0.0, *(seconds for _, seconds in best)]),
            slowdown * prompt / workload.prompt,
            workload.segment,
            workload.max_attempts,
        )


def _most_requests(policy: ModelCost, reward: ModelCost, gpu: Gpu, workload: Workload) -> int:
    """That fit beside the weights, each with a whole answer and some candidates of a segment."""
    free = _BUSY * gpu.memory - sum(one.parameters * one.dtype.itemsize for one in (policy, reward))
    tokens = workload.prompt + workload.response + 4 * workload.segment
    return max(int(free / (policy.kv_bytes_per_token + reward.kv_bytes_per_token) / tokens), 0)


def _best(policy: ModelCost, reward: ModelCost, workload: Workload, gpu: Gpu) -> tuple[int, float]:
    """Candidates with the most committed tokens a second, prompts aside, and the seconds of their heartbeat."""
    beats = [heartbeat(policy, reward, workload, m, gpu) for m in range(1, workload.max_attempts + 1)]
    told = [(beat, sum(stage.achievable_s for stage in beat.stages if stage.name != "refill")) for beat in beats]
    beat, seconds = max(told, key=lambda one: one[0].committed_tokens / one[1])
    return beat.candidates, seconds


@dataclass(frozen=True)
class Requests:
    """Arrays ``[requests]``, in order of arrival."""

    arrival: np.ndarray  # seconds
    prompt: np.ndarray  # tokens
    shared: np.ndarray  # of these, tokens that all of its group begin with
    answer: np.ndarray  # tokens
    acceptance: np.ndarray  # P(accept) of a candidate
    group: np.ndarray  # whose beginning it shares


@dataclass(frozen=True)
class Served:
    """What became of them."""

    first: np.ndarray  # [requests] seconds from arrival to the first committed segment
    whole: np.ndarray  # [requests] seconds from arrival to the end
    seconds: float  # from the first arrival to the last end
    busy: float  # share of that time in which the mean replica had work
    encoding: float  # share of the busy time that went to prompts
    hits: float  # share of the requests whose shared beginning was kept
    drawn: int  # tokens
    committed: int  # tokens
    beats: np.ndarray  # [heartbeats, 4]: when, running requests, candidates of each, seconds; of one replica in ten


def serve(requests: Requests, replica: Replica, replicas: int, routing: Routing = "prefix", seed: int = 0) -> Served:
    """Answer them all on so many replicas. The seed is of choices of the router, and of what is accepted."""
    if routing not in ("random", "two", "prefix"):
        raise ValueError(f"routing={routing!r}: 'random', 'two' (the less loaded of two) or 'prefix'")
    return _Fleet(requests, replica, replicas, routing, seed).served()


class _Fleet:
    """Replicas are rows; the requests that a replica runs are columns, its seats."""

    def __init__(self, requests: Requests, replica: Replica, replicas: int, routing: Routing, seed: int) -> None:
        shape, count = (replicas, replica.seats), len(requests.arrival)
        self.requests, self.replica, self.replicas, self.routing = requests, replica, replicas, routing
        self.rng = np.random.default_rng(seed)
        self.who = np.full(shape, -1)  # request, or none
        self.seated = np.zeros(shape)  # when
        self.left = np.zeros(shape)  # tokens of its prompt to encode
        self.tokens = np.zeros(shape, np.int64)  # of its answer, to come
        self.tried = np.zeros(shape, np.int64)  # candidates of this segment
        self.clock = np.zeros(replicas)  # when its heartbeat ends
        self.worked = np.zeros(replicas)  # seconds
        self.head, self.tail = np.full(replicas, -1), np.full(replicas, -1)  # of its queue
        self.behind = np.full(count, -1)  # in the queue
        self.waiting = np.zeros(replicas, np.int64)
        groups = int(requests.group.max()) + 1
        self.used = np.full((replicas, groups), -np.inf, np.float32)  # when the beginning was last used there
        self.oldest = np.full(replicas, -np.inf)  # older ones are gone
        self.looked = 0.0  # when that was found
        self.first, self.end = np.full(count, np.nan), np.full(count, np.nan)
        self.ended = self.drawn = self.hits = 0
        self.encoded = 0.0
        self.beats: list[np.ndarray] = []

    def served(self) -> Served:
        requests, now, come = self.requests, 0.0, 0
        while self.ended < len(requests.arrival):
            now += _WINDOW
            until = int(np.searchsorted(requests.arrival, now))
            if until > come:
                self._queue(np.arange(come, until))
                come = until
            self._heartbeats(now)
        seconds = float(self.end.max() - requests.arrival[0])
        return Served(
            first=self.first - requests.arrival,
            whole=self.end - requests.arrival,
            seconds=seconds,
            busy=float(self.worked.mean() / seconds),
            encoding=float(self.encoded * self.replica.token / self.worked.sum()),
            hits=self.hits / len(requests.arrival),
            drawn=self.drawn,
            committed=int(requests.answer.sum()),
            beats=np.concatenate(self.beats),
        )

    # Routing

    def _queue(self, ids: np.ndarray) -> None:
        where = self._routed(ids)
        order = np.argsort(where, kind="stable")
        ids, where = ids[order], where[order]
        same = where[1:] == where[:-1]
        self.behind[ids[:-1][same]] = ids[1:][same]
        first, last = np.concatenate([[True], ~same]), np.concatenate([~same, [True]])
        empty = self.head[where[first]] < 0
        self.head[where[first][empty]] = ids[first][empty]
        self.behind[self.tail[where[first][~empty]]] = ids[first][~empty]
        self.tail[where[last]] = ids[last]
        np.add.at(self.waiting, where, 1)

    def _routed(self, ids: np.ndarray) -> np.ndarray:
        """Replicas ``[n]``, by what they held when the window began."""
        load = (self.who >= 0).sum(1) + self.waiting
        one, other = self.rng.integers(0, self.replicas, (2, len(ids)))
        if self.routing == "random":
            return one
        lesser = np.where(load[one] <= load[other], one, other)
        if self.routing == "two":
            return lesser
        home = self.requests.group[ids] * 2654435761 % self.replicas
        return np.where(load[home] > max(_PATIENCE * load.mean(), self.replica.seats / 4), lesser, home)

    # A heartbeat of all replicas whose last one is over

    def _heartbeats(self, now: float) -> None:
        if now > self.looked + 2:
            self._forget(now)
        due = np.flatnonzero(self.clock <= now)
        empty = (self.who[due] < 0).all(1)
        self.clock[due[empty]] = now
        due = due[~empty | (self.waiting[due] > 0)]
        if not len(due):
            return
        self._admit(due)
        who = self.who[due]
        running = (who >= 0) & (self.left[due] <= 0)
        count = running.sum(1)
        candidates, seconds = self.replica.candidates[count], self.replica.seconds[count]
        encoded = self._encode(due, who, count, seconds)
        seconds = seconds + encoded * self.replica.token
        ends = self.clock[due] + seconds
        self._commit(due, who, running, candidates, ends)
        sample = due % 10 == 0
        self.beats.append(np.stack([self.clock[due], count, candidates, seconds], 1)[sample])
        self.clock[due] = ends
        self.worked[due] += seconds

    def _admit(self, due: np.ndarray) -> None:
        requests = self.requests
        for _ in range(_AT_ONCE):
            full = (self.who[due] >= 0).all(1) | (self.left[due].sum(1) >= _MOST_ENCODED)
            due = due[(self.head[due] >= 0) & ~full]
            if not len(due):
                return
            ids, seat = self.head[due], (self.who[due] < 0).argmax(1)
            self.head[due] = self.behind[ids]
            self.waiting[due] -= 1
            kept = self.used[due, requests.group[ids]] > self.oldest[due]
            self.used[due, requests.group[ids]] = self.clock[due]
            self.hits += int(kept.sum())
            self.who[due, seat] = ids
            self.seated[due, seat] = self.clock[due]
            self.left[due, seat] = requests.prompt[ids] - kept * requests.shared[ids]
            self.tokens[due, seat] = requests.answer[ids]
            self.tried[due, seat] = 0

    def _encode(self, due: np.ndarray, who: np.ndarray, count: np.ndarray, seconds: np.ndarray) -> np.ndarray:
        """Tokens of prompts ``[due]`` that share the heartbeat: as many as take the time of decoding."""
        left = self.left[due]
        encoding = (left > 0).sum(1)
        worth = seconds / self.replica.token * np.maximum(1, encoding / np.maximum(count, 1))
        most = np.where(count > 0, np.clip(worth, 1, _MOST_ENCODED), _MOST_ENCODED)
        order = np.argsort(np.where(left > 0, self.seated[due], np.inf), axis=1, kind="stable")
        left = np.take_along_axis(left, order, 1)
        done = np.clip(most[:, None] - (left.cumsum(1) - left), 0, left)
        rest = np.empty_like(left)
        np.put_along_axis(rest, order, left - done, 1)
        self.left[due] = rest
        encoded = done.sum(1)
        self.encoded += float(encoded.sum())
        return encoded

    def _commit(
        self, due: np.ndarray, who: np.ndarray, running: np.ndarray, candidates: np.ndarray, ends: np.ndarray
    ) -> None:
        requests, replica = self.requests, self.replica
        tried, tokens = self.tried[due], self.tokens[due]
        drawn = np.minimum(candidates[:, None], replica.max_attempts - tried) * running
        length = np.minimum(tokens, replica.segment)
        self.drawn += int((drawn * length).sum())
        rejected = (1 - requests.acceptance[who]) ** drawn
        tried = tried + drawn
        commits = running & ((self.rng.random(who.shape) >= rejected) | (tried >= replica.max_attempts))
        self.tried[due] = np.where(commits, 0, tried)
        self.tokens[due] = tokens = tokens - np.where(commits, length, 0)
        when = np.broadcast_to(ends[:, None], who.shape)
        fresh = commits & np.isnan(self.first[who])
        self.first[who[fresh]] = when[fresh]
        over = commits & (tokens <= 0)
        self.end[who[over]] = when[over]
        self.ended += int(over.sum())
        self.who[due] = np.where(over, -1, who)

    def _forget(self, now: float) -> None:
        """What was not used for longest goes, where there is room for so many."""
        self.looked, kept, groups = now, self.replica.kept, self.used.shape[1]
        if not kept:
            self.oldest[:] = np.inf
        elif kept < groups:
            self.oldest = np.partition(self.used, groups - kept, axis=1)[:, groups - kept].astype(float)

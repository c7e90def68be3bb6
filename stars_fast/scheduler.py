"""Which requests run in the next heartbeat, and with how many candidates each."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

import numpy as np

from stars_fast.config import StarsConfig
from stars_fast.decode import bucket
from stars_fast.request import PromptNode, Request
from stars_fast.row_cost import HeartbeatCost, Timing

# Acceptance of a request is shrunk to the batch's by this many imaginary candidates.
_PRIOR_WEIGHT = 4.0
_PRIOR_ACCEPTANCE = 0.3
# Tokens to encode of requests admitted in one heartbeat, so that prefill does not stall the requests that decode.
_PREFILL_TOKENS = 4096
# Share of the slots that admission leaves free for the requests that run to grow into.
_WATERMARK = 0.01


class Scheduler:
    """Divides rows and slots among requests. Nothing it decides can change a text.

    Admission counts what requests hold now, not how long they may become: more of them run, and where they outgrow the
    slots, the youngest has to give way. Further candidates use what is left.

    Parameters
    ----------
    config : StarsConfig
    max_rows : int
        Most candidates in one heartbeat, and most running requests.
    kv_cache_tokens : int
        Slots of the policy's tree. One request alone always fits (:func:`response_slots`).
    cost : HeartbeatCost, optional
        What is known of this machine and pair of models; goes on learning. Default: nothing yet.
    padded : bool
        Whether decode steps run in buckets of rows (:func:`stars_fast.decode.bucket`).
    """

    def __init__(
        self,
        config: StarsConfig,
        max_rows: int,
        kv_cache_tokens: int,
        cost: HeartbeatCost | None = None,
        padded: bool = False,
    ) -> None:
        self.config = config
        self.max_rows = max_rows
        self.kv_cache_tokens = kv_cache_tokens
        self.cost = cost or HeartbeatCost()
        self.padded = padded
        self.prefill_tokens = _PREFILL_TOKENS
        self.packed = 0  # tokens of the forward pass that runs

    def held(self, running: Iterable[Request]) -> int:
        """Slots of what is committed, each prompt once, and of waiting best candidates."""
        running = list(running)
        prompts = {request.prompt for request in running}
        best = sum(self.branch_slots(r) for r in running if r.best is not None and r.best.draw.node >= 0)
        return sum(len(prompt.ids) for prompt in prompts) + sum(len(r.tokens) for r in running) + best

    def branch_slots(self, request: Request) -> int:
        """Slots of one candidate. Its last token is encoded once it is committed."""
        return min(self.config.segment_length, self.config.max_new_tokens - len(request.tokens)) - 1

    def spare(self, running: Sequence[Request]) -> int:
        """Slots left in this heartbeat when each running request draws one candidate; negative where they lack."""
        return self.kv_cache_tokens - self.held(running) - sum(map(self.branch_slots, running))

    def admit(self, waiting: Sequence[Request], running: Sequence[Request]) -> int:
        """How many of the waiting requests, from the first, may join the running ones.

        They may if the next heartbeat will fit too, whether this one's candidates are committed or wait as the best.
        """
        prompts: Counter[PromptNode] = Counter(request.prompt for request in running)
        wanted = sum(len(prompt.ids) for prompt in prompts) + sum(map(self._two_heartbeats, running))
        prefill = 0
        for count, request in enumerate(waiting):
            fresh = 0 if prompts[request.prompt] else len(request.prompt.ids)
            wanted += fresh + self._two_heartbeats(request)
            prefill += fresh + len(request.tokens)
            joins = len(running) + count
            spared = int(_WATERMARK * self.kv_cache_tokens) if joins else 0
            too_long = prefill > self.prefill_tokens and count > 0
            if joins >= self.max_rows or wanted + spared > self.kv_cache_tokens or too_long:
                return count
            prompts[request.prompt] += 1
        return len(waiting)

    def _two_heartbeats(self, request: Request) -> int:
        return len(request.tokens) + 2 * self.branch_slots(request) + 1

    def candidates(self, running: Sequence[Request]) -> list[int]:
        """Candidates per request: at least 1, at most the attempts left; rows and slots are shared out by value."""
        further = max(self.spare(running), 0) // candidate_slots(self.config)
        rows = min(self.max_rows, len(running) + further)
        limits = [self.config.max_attempts - request.attempts for request in running]
        if self.config.candidates != "auto":
            limits = [min(limit, int(self.config.candidates)) for limit in limits]
        if self.config.candidates != "auto":
            return share_rows([], limits, rows)
        return share_rows(self.acceptance(running), limits, rows, self._cost)

    def acceptance(self, running: Sequence[Request]) -> list[float]:
        """P(accept) of a candidate of each request, as far as is known."""
        return acceptance_estimates(running)

    def observe(self, timing: Timing) -> None:
        """Learn what rows cost. No text depends on it."""
        self.cost.observe(timing, bucket(timing.rows) if self.padded else timing.rows)

    def _cost(self, rows: np.ndarray) -> np.ndarray:
        return self.cost.per_token(_buckets(int(rows[-1]))[rows] if self.padded else rows, rows)

    def shrink(self, tokens: int) -> bool:
        """From now on no forward pass may take more than ``tokens`` tokens, or one. Returns whether that is news."""
        before = self.max_rows, self.prefill_tokens
        self.max_rows = min(self.max_rows, max(tokens, 1))
        self.prefill_tokens = min(self.prefill_tokens, max(tokens, 1))
        return (self.max_rows, self.prefill_tokens) != before


def response_slots(config: StarsConfig) -> int:
    """Most slots a response takes: its tokens, and a waiting best candidate beside the one being drawn."""
    return config.max_new_tokens + candidate_slots(config)


def candidate_slots(config: StarsConfig) -> int:
    """Slots a candidate may take."""
    return min(config.segment_length, config.max_new_tokens)


def acceptance_estimates(running: Sequence[Request]) -> list[float]:
    """P(accept) per request from all candidates it has scored, shrunk to the batch's mean."""
    scored = sum(request.scored for request in running)
    total = sum(request.acceptance_sum for request in running)
    mean = (total + _PRIOR_WEIGHT * _PRIOR_ACCEPTANCE) / (scored + _PRIOR_WEIGHT)
    estimates = [(r.acceptance_sum + _PRIOR_WEIGHT * mean) / (r.scored + _PRIOR_WEIGHT) for r in running]
    return [min(max(estimate, 0.02), 0.98) for estimate in estimates]


def share_rows(
    acceptance: Sequence[float],
    limits: Sequence[int],
    rows: int,
    cost: Callable[[np.ndarray], np.ndarray] | None = None,
) -> list[int]:
    """Give each request one row, then row after row to whoever gains most: the m-th further one is worth ``a (1-a)^m``.

    Parameters
    ----------
    acceptance : sequence of float
        P(accept) of a candidate of each request.
    limits : sequence of int
        Most rows of each.
    rows : int
        Most rows of all; each request has one even where they are fewer.
    cost : callable, optional
        Of a heartbeat, for each of several numbers of rows ``[n]``. Given, as many rows are shared out as bring most
        expected acceptances per cost: that fills a bucket whose padding would cost the same. Else all rows are, evenly.

    Returns
    -------
    list of int
        Rows per request.
    """
    if cost is None:
        return _share_evenly(limits, rows)
    rows = max(rows, len(limits))
    costs = cost(np.arange(len(limits), rows + 1))  # [1 + further rows]
    least = float(np.diff(costs).min(initial=np.inf))  # that one row adds
    gains = [(-a * (1 - a), i) for i, (a, limit) in enumerate(zip(acceptance, limits, strict=True)) if limit > 1]
    heapq.heapify(gains)
    taken, drawn, value = list[int](), [1] * len(limits), sum(acceptance)
    best, rate = 0, value / float(costs[0])
    for number, total in enumerate(costs[1:].tolist(), 1):
        # Later rows gain no more than this one, and cost no less than the least.
        if not gains or -gains[0][0] <= rate * least:
            break
        gain, i = gains[0]
        drawn[i] += 1
        if drawn[i] < limits[i]:
            heapq.heapreplace(gains, (gain * (1 - acceptance[i]), i))
        else:
            heapq.heappop(gains)
        taken.append(i)
        value -= gain
        if value > rate * total:
            best, rate = number, value / total
    shares = [1] * len(limits)
    for i in taken[:best]:
        shares[i] += 1
    return shares


def _share_evenly(limits: Sequence[int], rows: int) -> list[int]:
    allowed = np.asarray(limits)[:, None] > np.arange(1, max(limits))  # [requests, most - 1]
    further = np.nonzero(allowed.T)[1][: max(rows - len(limits), 0)]  # whose row is next, all second ones first
    return (1 + np.bincount(further, minlength=len(limits))).tolist()


@lru_cache(maxsize=8)
def _buckets(most: int) -> np.ndarray:
    """What each number of rows up to ``most`` is padded to."""
    return np.array([bucket(rows) for rows in range(most + 1)])

"""Which requests run in the next heartbeat, and with how many candidates each."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np

from stars_fast.config import StarsConfig
from stars_fast.loop.request import PromptNode, Request
from stars_fast.loop.row_cost import HeartbeatCost, Timing
from stars_fast.loop.shares import row_values, share_evenly, share_rows
from stars_fast.methods.base import Population
from stars_fast.tree.passes import bucket

# Acceptance of a request is shrunk to the batch's by this many imaginary candidates.
_PRIOR_WEIGHT = 4.0
_PRIOR_ACCEPTANCE = 0.3
# Most tokens to encode in one heartbeat, and of requests that are admitted in one.
_PREFILL_TOKENS = 4096
# What rows are taken to cost less than believed, where nothing but the prior says so.
_CURIOSITY = 8.0
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
    whole : bool
        Whether a candidate's last token is encoded with it.
    cost : HeartbeatCost, optional
        What is known of this machine and pair of models; goes on learning. Default: nothing yet.
    padded : bool
        Whether decode steps run in buckets of rows (:func:`stars_fast.policy.steps.bucket`).
    """

    def __init__(
        self,
        config: StarsConfig,
        max_rows: int,
        kv_cache_tokens: int,
        whole: bool = False,
        cost: HeartbeatCost | None = None,
        padded: bool = False,
    ) -> None:
        self.config = config
        self.whole = whole
        self.max_rows = max_rows
        self.kv_cache_tokens = kv_cache_tokens
        self.cost = cost or HeartbeatCost()
        self.padded = padded
        self.learns = True  # from measured times
        self.prefill_tokens = _PREFILL_TOKENS
        self.past = (0.0, 0)  # of requests that have ended: acceptance probabilities, added up, and candidates
        self.packed = 0  # tokens of the forward pass that runs

    def held(self, running: Iterable[Request]) -> int:
        """Slots of what is committed, each prompt once, and of waiting best candidates."""
        running = list(running)
        prompts = {prompt for request in running for prompt in request.prompts}
        best = sum(self.branch_slots(r) for r in running if r.best is not None and r.best.draw.node >= 0)
        own = sum(len(r.tokens) if r.reserve is None else r.reserve for r in running)
        return sum(len(prompt.ids) for prompt in prompts) + own + best

    def branch_slots(self, request: Request) -> int:
        """Slots of one candidate. Its last token is encoded once it is committed, unless its hidden state is needed."""
        if request.reserve is not None:
            return 0
        return min(self.config.segment_length, self.config.max_new_tokens - len(request.tokens)) - (not self.whole)

    def spare(self, running: Sequence[Request]) -> int:
        """Slots left in this heartbeat when each running request draws one candidate; negative where they lack."""
        return self.kv_cache_tokens - self.held(running) - sum(map(self.branch_slots, running))

    def admit(self, waiting: Sequence[Request], running: Sequence[Request]) -> int:
        """How many of the waiting requests, from the first, may join the running ones.

        They may if the next heartbeat will fit too, whether this one's candidates are committed or wait as the best.
        """
        prompts: Counter[PromptNode] = Counter(prompt for request in running for prompt in request.prompts)
        wanted = sum(len(prompt.ids) for prompt in prompts) + sum(map(self._two_heartbeats, running))
        rows = sum(request.width for request in running)
        prefill = 0
        for count, request in enumerate(waiting):
            fresh = sum(len(prompt.ids) for prompt in request.prompts if not prompts[prompt])
            wanted += fresh + self._two_heartbeats(request)
            prefill += fresh + len(request.tokens)
            joins = len(running) + count
            rows += request.width
            spared = int(_WATERMARK * self.kv_cache_tokens) if joins else 0
            too_long = prefill > self.prefill_tokens and count > 0
            if (joins and rows > self.max_rows) or wanted + spared > self.kv_cache_tokens or too_long:
                return count
            prompts.update(request.prompts)
        return len(waiting)

    def _two_heartbeats(self, request: Request) -> int:
        return len(request.tokens) + 2 * self.branch_slots(request) + 1 if request.reserve is None else request.reserve

    def candidates(self, running: Sequence[Request], encoding: Sequence[Request] = ()) -> list[int]:
        """Candidates per request: at least 1, at most the attempts left; rows and slots are shared out by value.

        What requests hold that are still being encoded is left to them.
        """
        further = max(self.spare([*running, *encoding]), 0) // candidate_slots(self.config)
        rows = min(self.max_rows - len(encoding), len(running) + further)
        limits = [most_attempts(request, self.config) - request.attempts for request in running]
        if self.config.candidates != "auto":
            limits = [min(limit, int(self.config.candidates)) for limit in limits]
            return share_evenly(limits, rows)
        if all(request.target == math.inf for request in running):
            return share_evenly(limits, rows)  # the best of all attempts: none ends a segment before its last
        return self.shares(self.acceptance(running), limits, rows)

    def shares(self, acceptance: Sequence[float], limits: Sequence[int], rows: int) -> list[int]:
        """Candidates per request, each at least 1 and at most its limit, that take least time in the long run."""
        requests = len(limits)
        fixed, row = self.row_price(requests)
        costs = self.costs(np.arange(requests, max(rows, requests) + 1))
        if self.cost.unvaried():  # a heartbeat with more rows now and then tells what they cost
            row /= _CURIOSITY
            costs = costs[0] + (costs - costs[0]) / _CURIOSITY
        costs /= row
        share = fixed / row / requests
        return share_rows([row_values(a, left, share) for a, left in zip(acceptance, limits, strict=True)], costs)

    def row_price(self, requests: int) -> tuple[float, float]:
        """What a heartbeat of so many requests costs without rows, and what a row adds."""
        return self.cost.line()

    def acceptance(self, running: Sequence[Request]) -> list[float]:
        """P(accept) of a candidate of each request, as far as is known."""
        return acceptance_estimates(running, self.past)

    def retire(self, request: Request) -> None:
        """The request has ended: what is known of its candidates is all that is known of those to come."""
        self.past = self.past[0] + request.acceptance_sum, self.past[1] + request.scored

    def encoding_tokens(self, running: int, encoding: int) -> int:
        """Tokens of admitted requests to encode in a heartbeat.

        As many as take the time that decoding takes; more where more requests encode than decode, so that all have an
        equal share of the time; and without bound but memory's where nobody decodes.
        """
        if not running:
            return self.prefill_tokens
        worth = self.cost.encoding_worth(running, self.config.segment_length) * max(1.0, encoding / running)
        return max(1, int(min(worth, self.prefill_tokens)))

    def observe(self, timing: Timing) -> None:
        """Learn what rows cost. No text depends on it."""
        if self.learns:
            self.cost.observe(timing, bucket(timing.rows) if self.padded else timing.rows)

    def costs(self, rows: np.ndarray) -> np.ndarray:
        """Of a heartbeat, for each of several numbers of rows ``[n]``, growing by one."""
        return self.cost.per_token(_buckets(int(rows[-1]))[rows] if self.padded else rows, rows)

    def shrink(self, tokens: int) -> bool:
        """From now on no forward pass may take more than ``tokens`` tokens, or one. Returns whether that is news."""
        before = self.max_rows, self.prefill_tokens
        self.max_rows = min(self.max_rows, max(tokens, 1))
        self.prefill_tokens = min(self.prefill_tokens, max(tokens, 1))
        return (self.max_rows, self.prefill_tokens) != before


def most_attempts(request: Request, config: StarsConfig) -> int:
    """Candidates of the segment being drawn, at most."""
    return config.max_attempts if request.limit is None else min(request.limit, config.max_attempts)


def response_slots(config: StarsConfig) -> int:
    """Most slots a response takes: its tokens, and a waiting best candidate beside the one being drawn.

    Of a population, all of its answers.
    """
    method = config.chosen_method
    if isinstance(method, Population):
        return method.slots(config)
    return config.max_new_tokens + candidate_slots(config)


def persona_slots(personas: Sequence[Sequence[int]], config: StarsConfig) -> int:
    """Most slots of a request with two prompts: these, the answer below each, and the block that is being drafted."""
    return sum(map(len, personas)) + 2 * config.max_new_tokens + config.segment_length


def candidate_slots(config: StarsConfig) -> int:
    """Slots a candidate may take."""
    return min(config.segment_length, config.max_new_tokens)


def acceptance_estimates(running: Sequence[Request], past: tuple[float, int] = (0.0, 0)) -> list[float]:
    """P(accept) per request from all candidates it has scored, shrunk to the mean of all.

    Parameters
    ----------
    running : sequence of Request
    past : (float, int)
        Sum of the acceptance probabilities of other requests' candidates, and how many these were.
    """
    total = past[0] + sum(request.acceptance_sum for request in running)
    scored = past[1] + sum(request.scored for request in running)
    mean = (total + _PRIOR_WEIGHT * _PRIOR_ACCEPTANCE) / (scored + _PRIOR_WEIGHT)
    estimates = [(r.acceptance_sum + _PRIOR_WEIGHT * mean) / (r.scored + _PRIOR_WEIGHT) for r in running]
    return [min(max(estimate, 0.02), 0.98) for estimate in estimates]


@lru_cache(maxsize=8)
def _buckets(most: int) -> np.ndarray:
    """What each number of rows up to ``most`` is padded to."""
    return np.array([bucket(rows) for rows in range(most + 1)])

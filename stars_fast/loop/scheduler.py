"""Which requests run in the next heartbeat, and with how many candidates each."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from statistics import fmean

import numpy as np

from stars_fast.loop.in_order import Pass, first_stage
from stars_fast.loop.request import Candidate, PromptNode, Request
from stars_fast.loop.row_cost import HeartbeatCost, Timing
from stars_fast.loop.shares import row_values, share_evenly, share_rows
from stars_fast.tree.passes import bucket

# Acceptance of a request is shrunk to the batch's by this many imaginary candidates.
_PRIOR_WEIGHT = 4.0
# Most tokens to encode in one heartbeat, and of requests that are admitted in one.
_PREFILL_TOKENS = 4096
# As many of an earlier call's candidates are remembered: its prompts and target may have been others.
_REMEMBERED = 16
# Heartbeats that fit, after which limits that memory once set are doubled.
_PATIENCE = 64
# What rows are taken to cost less than believed, where nothing but the prior says so.
_CURIOSITY = 8.0
# Share of the slots that admission leaves free for the requests that run to grow into.
_WATERMARK = 0.01


class Scheduler:
    """Divides rows and slots among requests. Nothing it decides can change a text.

    Admission counts what requests hold now, not how long they may become: more of them run, and where they outgrow the
    slots, the last in order have to give way. Further candidates use what is left.

    Parameters
    ----------
    max_rows : int
        Most candidates in one heartbeat, and most running requests.
    kv_cache_tokens : int
        Slots of the policy's tree. One request alone always fits (:meth:`stars_fast.methods.Method.slots`).
    cost : HeartbeatCost, optional
        What is known of this machine and pair of models; goes on learning. Default: nothing yet.
    padded : bool
        Whether decode steps run in buckets of rows (:func:`stars_fast.tree.passes.bucket`).
    scoring : Pass, optional
        What a scoring pass costs, where candidates are scored in the order in which they are looked at. Default: all
        are scored at once.
    before : (float, int)
        What an earlier one had to say of acceptance (:meth:`remembered`).
    """

    def __init__(
        self,
        max_rows: int,
        kv_cache_tokens: int,
        cost: HeartbeatCost | None = None,
        padded: bool = False,
        scoring: Pass | None = None,
        before: tuple[float, int] = (0.0, 0),
    ) -> None:
        self.max_rows = max_rows
        self.kv_cache_tokens = kv_cache_tokens
        self.cost = cost or HeartbeatCost()
        self.padded, self.scoring = padded, scoring
        self.learns = True  # from measured times
        self.prefill_tokens = _PREFILL_TOKENS
        self._most = (max_rows, _PREFILL_TOKENS)  # where memory does not lack
        self._whole_beats = 0  # heartbeats since it did
        self.seen = (0.0, 0)  # of requests that have ended: acceptance probabilities, added up, and candidates
        self.before = before

    def held(self, running: Iterable[Request]) -> int:
        """Slots of what is committed, each prompt once, and of waiting best candidates."""
        running = list(running)
        prompts = {prompt for request in running for prompt in request.strategy.prompts(request)}
        return sum(prompt.slots for prompt in prompts) + sum(r.strategy.held(r) * r.terms.copies for r in running)

    def spare(self, running: Sequence[Request]) -> int:
        """Slots left in this heartbeat when each running request draws one candidate; negative where they lack."""
        branches = sum(r.strategy.branch(r) * r.terms.copies for r in running)
        return self.kv_cache_tokens - self.held(running) - branches

    def answers(self, request: Request) -> int:
        """How many of the request's answers, of any length it may have, there are slots for beside its prompt."""
        longest = request.terms.config.max_new_tokens * request.terms.copies
        return (self.kv_cache_tokens - request.prompt.slots) // longest

    def admit(self, waiting: Sequence[Request], running: Sequence[Request]) -> int:
        """How many of the waiting requests, from the first, may join the running ones.

        They may if the next heartbeat will fit too, whether this one's candidates are committed or wait as the best.
        """
        if not waiting:
            return 0
        prompts: Counter[PromptNode] = Counter(p for request in running for p in request.strategy.prompts(request))
        wanted = sum(prompt.slots for prompt in prompts) + sum(r.strategy.peak(r) * r.terms.copies for r in running)
        rows = sum(request.strategy.rows(request) for request in running)
        prefill, batches = 0, set[int]()
        for count, request in enumerate(waiting):
            own = request.strategy.prompts(request)
            fresh = [prompt for prompt in own if not prompts[prompt]]
            wanted += sum(prompt.slots for prompt in fresh) + request.strategy.peak(request) * request.terms.copies
            read = [one for prompt in fresh for one in (prompt, *prompt.beside)]
            prefill += sum(_to_read(prompt, batches) for prompt in read) + len(request.tokens)
            joins = len(running) + count
            rows += request.strategy.rows(request)
            spared = int(_WATERMARK * self.kv_cache_tokens) if joins else 0
            too_long = prefill > self.prefill_tokens and count > 0
            if (joins and rows > self.max_rows) or wanted + spared > self.kv_cache_tokens or too_long:
                return count
            prompts.update(own)
        return len(waiting)

    def candidates(self, requests: Sequence[Request], limits: Sequence[int], rows: int, spare: int) -> list[int]:
        """Candidates of each of these requests, which compete for rows: at least 1, at most its limit.

        Parameters
        ----------
        requests : sequence of Request
        limits : sequence of int
            Attempts that each has left.
        rows : int
            What they share.
        spare : int
            Slots for candidates beyond the first of each.
        """
        lengths = (min(r.terms.config.segment_length, r.terms.config.max_new_tokens) for r in requests)
        largest = max(length * r.terms.copies for length, r in zip(lengths, requests, strict=True))
        rows = min(rows, len(requests) + max(spare, 0) // largest)
        chosen = [r.terms.config.candidates for r in requests]
        limits = [most if one == "auto" else min(most, int(one)) for most, one in zip(limits, chosen, strict=True)]
        # Of those that look at all their attempts, or were told how many, none gains more from a row than another.
        even = [i for i, r in enumerate(requests) if chosen[i] != "auto" or r.target == math.inf]
        free = [i for i, r in enumerate(requests) if chosen[i] == "auto" and math.isfinite(r.target)]
        shares = [1] * len(requests)
        if even:
            part = max(
                len(even), (rows - (len(requests) - len(even) - len(free))) * len(even) // (len(even) + len(free))
            )
            for i, share in zip(even, share_evenly([limits[i] for i in even], part), strict=True):
                shares[i] = share
        if free:
            acceptance = self.acceptance([requests[i] for i in free])
            left = rows - sum(shares) + len(free)
            together = self.looked_at_at_once(largest)
            for i, share in zip(free, self.shares(acceptance, [limits[i] for i in free], left, together), strict=True):
                shares[i] = share
        return shares

    def shares(
        self, acceptance: Sequence[float], limits: Sequence[int], rows: int, together: int | None = None
    ) -> list[int]:
        """Candidates per request, each at least 1 and at most its limit, that take least time in the long run.

        Of more rows than are scored ``together`` (default: any number) the further ones are scored when they are looked
        at. That would come later without them, so it is no part of their price.
        """
        requests = len(limits)
        together = rows if together is None else together
        fixed, row = self.row_price(in_order=requests >= together)
        costs = self.costs(np.arange(requests, max(rows, requests) + 1), max(together, requests))
        if self.cost.unvaried():  # a heartbeat with more rows now and then tells what they cost
            row /= _CURIOSITY
            costs = costs[0] + (costs - costs[0]) / _CURIOSITY
        costs /= row
        share = fixed / row / requests
        return share_rows([row_values(a, left, share) for a, left in zip(acceptance, limits, strict=True)], costs)

    def row_price(self, in_order: bool) -> tuple[float, float]:
        """What a heartbeat costs without rows, and what a row adds (:meth:`HeartbeatCost.line`)."""
        return self.cost.line(in_order)

    def looked_at_at_once(self, length: int) -> int | None:
        """Up to how many rows of so many tokens are all scored in one pass; None for any number."""
        return None if self.scoring is None else self.scoring.undivided // length

    def looked_at_together(self, requests: Sequence[Request], groups: Sequence[Sequence[Candidate]]) -> int:
        """How many candidates of each of these requests, which look at them in order, are scored next."""
        sizes = [len(group) for group in groups]
        if self.scoring is None or max(sizes, default=1) == 1:
            return max(sizes, default=1)
        tokens = [len(group[0].draw.tokens) for group in groups]  # about
        return first_stage(sizes, tokens, self.acceptance(requests), self.scoring)

    def acceptance(self, running: Sequence[Request]) -> list[float]:
        """P(accept) of a candidate of each request, as far as is known."""
        return acceptance_estimates(running, self._past())

    def remembered(self) -> tuple[float, int]:
        """For the next call: as :attr:`seen`, of few candidates with the mean of all."""
        total, scored = self._past()
        few = min(scored, _REMEMBERED)
        return (total * few / scored, few) if few else (0.0, 0)

    def _past(self) -> tuple[float, int]:
        return self.seen[0] + self.before[0], self.seen[1] + self.before[1]

    def retire(self, request: Request) -> None:
        """The request has ended: what is known of its candidates is all that is known of those to come."""
        if math.isfinite(request.target):
            self.seen = self.seen[0] + request.acceptance_sum, self.seen[1] + request.scored

    def encoding_tokens(self, running: int, encoding: int, segment_length: int) -> int:
        """Tokens of admitted requests to encode in a heartbeat of segments of this length.

        As many as take the time that decoding takes; more where more requests encode than decode, so that all have an
        equal share of the time; and without bound but memory's where nobody decodes.
        """
        if not running:
            return self.prefill_tokens
        worth = self.cost.encoding_worth(running, segment_length) * max(1.0, encoding / running)
        return max(1, int(min(worth, self.prefill_tokens)))

    def observe(self, timing: Timing) -> None:
        """Learn what rows cost. No text depends on it."""
        if self.learns:
            self.cost.observe(timing, bucket(timing.rows) if self.padded else timing.rows)

    def costs(self, rows: np.ndarray, together: int) -> np.ndarray:
        """Of a heartbeat, for each of several numbers of rows ``[n]``, growing by one, of which so many are scored."""
        return self.cost.per_token(_buckets(int(rows[-1]))[rows] if self.padded else rows, np.minimum(rows, together))

    def shrink(self, tokens: int, rows: int) -> bool:
        """After a pass that did not fit: at most half its tokens, or rows, or one. Returns whether that is news."""
        before, self._whole_beats = (self.max_rows, self.prefill_tokens), 0
        if rows:
            self.max_rows = min(self.max_rows, max(rows // 2, 1))
        if tokens:
            self.prefill_tokens = min(self.prefill_tokens, max(tokens // 2, 1))
        return (self.max_rows, self.prefill_tokens) != before

    def recover(self) -> None:
        """A heartbeat fitted, and committed something: after a good number of them, twice as much is tried again."""
        self._whole_beats += 1
        if self._whole_beats % _PATIENCE == 0:
            rows, tokens = self._most
            self.max_rows = min(2 * self.max_rows, rows)
            self.prefill_tokens = min(2 * self.prefill_tokens, tokens)


def _to_read(prompt: PromptNode, batches: set[int]) -> int:
    """Tokens of the passes that read a prompt; of one with pictures, those of its whole batch, which is then among
    ``batches`` and costs no other row of it anything.
    """
    if prompt.media is None:
        return len(prompt.ids)
    inputs = prompt.media.inputs
    if id(inputs) in batches:
        return 0
    batches.add(id(inputs))
    return int(inputs["input_ids"].numel())


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
    prior = fmean(request.terms.method.expected_acceptance for request in running)
    mean = (total + _PRIOR_WEIGHT * prior) / (scored + _PRIOR_WEIGHT)
    estimates = [(r.acceptance_sum + _PRIOR_WEIGHT * mean) / (r.scored + _PRIOR_WEIGHT) for r in running]
    return [min(max(estimate, 0.02), 0.98) for estimate in estimates]


@lru_cache(maxsize=8)
def _buckets(most: int) -> np.ndarray:
    """What each number of rows up to ``most`` is padded to."""
    return np.array([bucket(rows) for rows in range(most + 1)])

"""Which requests run in the next heartbeat, and with how many candidates each."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence

from stars_fast.config import StarsConfig
from stars_fast.request import PromptNode, Request

# Cost of one more row relative to the fixed cost of a heartbeat (measured: linear layers on a CPU, 1 to 64 rows).
_ROW_COST = 0.06
# Acceptance of a request is shrunk to the batch's by this many imaginary candidates.
_PRIOR_WEIGHT = 4.0
_PRIOR_ACCEPTANCE = 0.3
# Prompt tokens admitted in one heartbeat, so that prefill does not stall the requests that decode.
_PREFILL_TOKENS = 4096


class Scheduler:
    """Divides rows and slots among requests. Nothing it decides can change a text.

    Every running request has its whole future reserved (prompt, ``max_new_tokens``, and one segment for the best
    candidate so far), so it always goes on with at least one candidate; further candidates use what is left.

    Parameters
    ----------
    config : StarsConfig
    max_rows : int
        Most candidates in one heartbeat, and most running requests.
    kv_cache_tokens : int
        Slots of the policy's tree.
    """

    def __init__(self, config: StarsConfig, max_rows: int, kv_cache_tokens: int) -> None:
        self.config = config
        self.max_rows = max_rows
        self.kv_cache_tokens = kv_cache_tokens

    def reserved(self, running: Iterable[Request]) -> int:
        """Slots spoken for: each prompt once, and each request's response."""
        running = list(running)
        prompts = {request.prompt for request in running}
        return sum(len(prompt.ids) for prompt in prompts) + len(running) * response_slots(self.config)

    def admit(self, waiting: Sequence[Request], running: Sequence[Request]) -> int:
        """How many of the waiting requests, from the first, may join the running ones."""
        prompts: Counter[PromptNode] = Counter(request.prompt for request in running)
        reserved, prefill = self.reserved(running), 0
        for count, request in enumerate(waiting):
            fresh = 0 if prompts[request.prompt] else len(request.prompt.ids)
            reserved += fresh + response_slots(self.config)
            prefill += fresh
            too_long = prefill > _PREFILL_TOKENS and count > 0
            if len(running) + count >= self.max_rows or reserved > self.kv_cache_tokens or too_long:
                return count
            prompts[request.prompt] += 1
        return len(waiting)

    def candidates(self, running: Sequence[Request]) -> list[int]:
        """Candidates per request: at least 1, at most the attempts left; rows and slots are shared out by value."""
        spare = (self.kv_cache_tokens - self.reserved(running)) // candidate_slots(self.config)
        rows = min(self.max_rows, len(running) + max(spare, 0))
        limits = [self.config.max_attempts - request.attempts for request in running]
        if self.config.candidates != "auto":
            limits = [min(limit, int(self.config.candidates)) for limit in limits]
        return share_rows(acceptance_estimates(running), limits, rows, adaptive=self.config.candidates == "auto")


def response_slots(config: StarsConfig) -> int:
    """Slots a response may take: its tokens, and a waiting best candidate beside the one being drawn."""
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


def share_rows(acceptance: Sequence[float], limits: Sequence[int], rows: int, adaptive: bool) -> list[int]:
    """Give each request one row, then row after row to whoever gains most: the m-th is worth ``a (1 - a)^m``.

    With ``adaptive``, stop where a further row no longer raises expected acceptances per unit of cost
    ``1 + _ROW_COST * rows``; else go on until limits or rows are used up, evenly.
    """
    shares = [1] * len(limits)
    used = len(limits)
    value, cost = sum(acceptance), 1 + _ROW_COST * used
    gains = [
        (_gain(a, 1, adaptive), i) for i, (a, limit) in enumerate(zip(acceptance, limits, strict=True)) if limit > 1
    ]
    heapq.heapify(gains)
    while gains and used < rows:
        gain, i = heapq.heappop(gains)
        if adaptive and -gain / _ROW_COST <= value / cost:
            break
        shares[i] += 1
        used += 1
        value, cost = value - gain, cost + _ROW_COST
        if shares[i] < limits[i]:
            heapq.heappush(gains, (_gain(acceptance[i], shares[i], adaptive), i))
    return shares


def _gain(acceptance: float, rows: int, adaptive: bool) -> float:
    """Minus what the next row is worth (heapq pops the smallest); evenly, rows already had count instead."""
    return -(acceptance * (1 - acceptance) ** rows) if adaptive else float(rows)

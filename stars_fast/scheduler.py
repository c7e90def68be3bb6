"""Which requests run in the next heartbeat, and with how many candidates each."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence

from stars_fast.config import StarsConfig
from stars_fast.methods.base import Population
from stars_fast.request import PromptNode, Request

# Cost of one more row relative to the fixed cost of a heartbeat (measured: linear layers on a CPU, 1 to 64 rows).
_ROW_COST = 0.06
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
    whole : bool
        Whether a candidate's last token is encoded with it.
    """

    def __init__(self, config: StarsConfig, max_rows: int, kv_cache_tokens: int, whole: bool = False) -> None:
        self.config = config
        self.whole = whole
        self.max_rows = max_rows
        self.kv_cache_tokens = kv_cache_tokens
        self.prefill_tokens = _PREFILL_TOKENS
        self.packed = 0  # tokens of the forward pass that runs

    def held(self, running: Iterable[Request]) -> int:
        """Slots of what is committed, each prompt once, and of waiting best candidates."""
        running = list(running)
        prompts = {request.prompt for request in running}
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
        prompts: Counter[PromptNode] = Counter(request.prompt for request in running)
        wanted = sum(len(prompt.ids) for prompt in prompts) + sum(map(self._two_heartbeats, running))
        rows = sum(request.width for request in running)
        prefill = 0
        for count, request in enumerate(waiting):
            fresh = 0 if prompts[request.prompt] else len(request.prompt.ids)
            wanted += fresh + self._two_heartbeats(request)
            prefill += fresh + len(request.tokens)
            joins = len(running) + count
            rows += request.width
            spared = int(_WATERMARK * self.kv_cache_tokens) if joins else 0
            too_long = prefill > self.prefill_tokens and count > 0
            if (joins and rows > self.max_rows) or wanted + spared > self.kv_cache_tokens or too_long:
                return count
            prompts[request.prompt] += 1
        return len(waiting)

    def _two_heartbeats(self, request: Request) -> int:
        return len(request.tokens) + 2 * self.branch_slots(request) + 1 if request.reserve is None else request.reserve

    def candidates(self, running: Sequence[Request]) -> list[int]:
        """Candidates per request: at least 1, at most the attempts left; rows and slots are shared out by value."""
        further = max(self.spare(running), 0) // candidate_slots(self.config)
        rows = min(self.max_rows, len(running) + further)
        limits = [most_attempts(request, self.config) - request.attempts for request in running]
        if self.config.candidates != "auto":
            limits = [min(limit, int(self.config.candidates)) for limit in limits]
        return share_rows(acceptance_estimates(running), limits, rows, adaptive=self.config.candidates == "auto")

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

"""Optimal stopping: one answer grows, and the best candidate is committed once it is worth more than drawing on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch

from stars_fast.loop.one_answer import OneAnswer
from stars_fast.loop.request import Candidate, Request
from stars_fast.loop.selection import Verdict
from stars_fast.methods.stopping import OptimalStopping
from stars_fast.ops.select_and_commit import EARLIER, GOES_ON, INVALID, LENGTH, NONE, STOP
from stars_fast.outputs import Cause


class Stopping(OneAnswer):
    """What a request has seen of its own candidates hangs on it; nothing is shared."""

    judges_on_device = False

    def looks_in_order(self, answer: Request) -> bool:
        return cast(OptimalStopping, answer.terms.method).budget < answer.terms.config.max_attempts

    def verdicts(
        self, requests: Sequence[Request], groups: Sequence[Sequence[Candidate]], rewards: torch.Tensor | None
    ) -> list[Verdict]:
        verdicts = []
        for request, group in zip(requests, groups, strict=True):
            try:
                verdicts.append(_look(request, group))
            except Exception as error:  # of its own numbers
                group[0].error = Cause.of(error, "optimal stopping raised ")
                verdicts.append(Verdict(INVALID, False, request.attempts + 1, request.best_attempt, GOES_ON))
        return verdicts


def _look(request: Request, group: Sequence[Candidate]) -> Verdict:
    """Look at the candidates in index order until one of them ends the search."""
    config = request.terms.config
    if request.search is None:
        segments = -(-config.max_new_tokens // config.segment_length)
        request.search = cast(OptimalStopping, request.terms.method).search(config.known, config.max_attempts, segments)
    search = request.search
    if not request.attempts:
        search.begin(len(request.segments), request.segments[-1].reward if request.segments else None)
    last = len(request.tokens) + config.segment_length >= config.max_new_tokens
    attempts, best, best_attempt = request.attempts, request.best, request.best_attempt
    for one in group[: config.max_attempts - attempts]:
        attempts += 1
        if one.error is not None:
            return Verdict(INVALID, False, attempts, best_attempt, GOES_ON)
        if math.isfinite(one.score):
            search.see(one.score)
            if one.ended and not last:
                one.score = search.worth(one.score)
        one.threshold = search.threshold
        if best is None or one.score > best.score:
            best, best_attempt = one, attempts - 1
        stops = best.score >= one.threshold
        request.acceptance_sum, request.scored = request.acceptance_sum + stops, request.scored + 1
        if stops or attempts == config.max_attempts:
            length = len(request.tokens) + len(best.draw.tokens)
            finish = STOP if best.ended else LENGTH if length == config.max_new_tokens else GOES_ON
            winner = best_attempt - request.attempts if best_attempt >= request.attempts else EARLIER
            return Verdict(winner, stops, attempts, best_attempt, finish)
    return Verdict(NONE, False, attempts, best_attempt, GOES_ON)

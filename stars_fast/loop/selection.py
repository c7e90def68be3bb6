"""Which candidate of each request is committed: what the selection operator is asked, and what it says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from stars_fast.config import StarsConfig
from stars_fast.loop.scheduler import most_attempts
from stars_fast.methods.stars import acceptance_probability
from stars_fast.ops.select_and_commit import select_and_commit
from stars_fast.request import Candidate, Request


class Verdict(NamedTuple):
    """What the selection operator says of one request."""

    winner: int  # place in the request's group, or NONE, EARLIER, INVALID
    accepted: bool
    attempts: int
    best_attempt: int


def first_accepted(
    requests: Sequence[Request], candidates: Sequence[Sequence[Candidate]], config: StarsConfig
) -> list[Verdict]:
    """Ask the operator, and note thresholds and acceptance."""
    drawn = [candidate for group in candidates for candidate in group]
    counts = [0, *(len(group) for group in candidates)]
    int32, float64 = torch.int32, torch.float64
    attempts = torch.tensor([request.attempts for request in requests], dtype=int32, device="cpu")
    best_attempt = torch.tensor([request.best_attempt for request in requests], dtype=int32, device="cpu")
    first_row = torch.tensor(counts, device="cpu").cumsum(0, dtype=int32)
    groups, best = len(requests), [request.best for request in requests]
    winner, accepted, thresholds, _ = select_and_commit(
        torch.tensor([candidate.score for candidate in drawn], dtype=torch.float32, device="cpu"),
        torch.tensor([len(candidate.draw.tokens) for candidate in drawn], dtype=int32, device="cpu"),
        torch.tensor([candidate.ended for candidate in drawn], device="cpu"),
        first_row,
        torch.tensor([request.key for request in requests], device="cpu"),
        torch.tensor([len(request.segments) for request in requests], dtype=int32, device="cpu"),
        attempts,
        torch.tensor([len(request.tokens) for request in requests], dtype=int32, device="cpu"),
        torch.full((groups,), config.max_new_tokens, dtype=int32, device="cpu"),
        torch.tensor([most_attempts(request, config) for request in requests], dtype=int32, device="cpu"),
        torch.tensor([_known(request.base) for request in requests], dtype=float64, device="cpu"),
        torch.tensor([request.target for request in requests], dtype=float64, device="cpu"),
        torch.tensor([request.beta for request in requests], dtype=float64, device="cpu"),
        torch.full((groups,), config.finished_threshold != "target", device="cpu"),
        torch.tensor([one.score if one else 0.0 for one in best], dtype=torch.float32, device="cpu"),
        best_attempt,
        torch.tensor([len(one.draw.tokens) if one else 0 for one in best], dtype=int32, device="cpu"),
        torch.tensor([one is not None and one.ended for one in best], device="cpu"),
    )
    for candidate, tau in zip(drawn, thresholds.tolist(), strict=True):
        candidate.threshold = tau
    for request, group in zip(requests, candidates, strict=True):
        for candidate in group:
            if candidate.error is None:
                request.acceptance_sum += acceptance_probability(candidate.score, candidate.threshold, request.beta)
                request.scored += 1
    starts = first_row.tolist()
    return [
        Verdict(row - start if row >= 0 else row, won, looked, best)
        for row, start, won, looked, best in zip(
            winner.tolist(), starts, accepted.tolist(), attempts.tolist(), best_attempt.tolist(), strict=False
        )
    ]


def _known(base: float | None) -> float:
    assert base is not None, "r0 is set when a request is admitted"
    return base

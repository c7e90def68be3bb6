"""Which candidate of each request is committed: what the selection operator is asked, and what it says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from stars_fast.loop.request import Candidate, Request
from stars_fast.methods.stars import acceptance_probability
from stars_fast.ops.select_and_commit import INVALID, NONE, select_and_commit
from stars_fast.outputs import CandidateTrace
from stars_fast.rewards.base import Scores
from stars_fast.tree.upload import aligned, uploaded


class Verdict(NamedTuple):
    """What the selection operator says of one request."""

    winner: int  # place in the request's group, or NONE, EARLIER, INVALID
    accepted: bool
    attempts: int
    best_attempt: int
    finish: int  # GOES_ON, STOP or LENGTH


def first_accepted(
    requests: Sequence[Request], groups: Sequence[Sequence[Candidate]], rewards: torch.Tensor | None = None
) -> list[Verdict]:
    """Ask the operator, and note thresholds and acceptance.

    Parameters
    ----------
    requests : sequence of Request
    groups : sequence of sequences of Candidate
        Of each request, in index order.
    rewards : torch.Tensor, optional
        float ``[B]``, of all candidates in their order, where they lie on a device: everything is decided there, and
        one copy brings verdicts, thresholds and rewards to the host. None: candidates have their scores.
    """
    drawn = [candidate for group in groups for candidate in group]
    device = torch.device("cpu") if rewards is None else rewards.device
    counts = [0, *(len(group) for group in groups)]

    bests = [request.best for request in requests]
    configs = [request.terms.config for request in requests]
    ints = [
        [len(request.segments) for request in requests],
        [request.attempts for request in requests],
        [len(request.tokens) for request in requests],
        [request.best_attempt for request in requests],
        [0 if best is None else len(best.draw.tokens) for best in bests],
        [config.max_new_tokens for config in configs],
        [request.strategy.attempts_there_are(request) for request in requests],
    ]
    rule = [[_known(r.base) for r in requests], [r.target for r in requests], [r.beta for r in requests]]
    flags = [
        [config.finished_threshold == "ramp" for config in configs],
        [best is not None and best.ended for best in bests],
    ]
    with np.errstate(over="ignore"):  # a reward beyond what float32 holds is infinite
        best_rewards = np.array([0.0 if best is None else best.score for best in bests], dtype=np.float32)
        own = [] if rewards is not None else [np.array([one.score for one in drawn], dtype=np.float32)]
    columns: list[np.ndarray] = [
        np.array([request.key for request in requests], dtype=np.int64),
        aligned(rule, np.float64),
        aligned(ints, np.int32),
        np.array(counts, dtype=np.int32).cumsum(dtype=np.int32),
        np.array([len(one.draw.tokens) for one in drawn], dtype=np.int32),
        best_rewards,
        aligned(flags, np.bool_),
        np.array([one.ended for one in drawn], dtype=np.bool_),
        *own,
    ]
    keys, rules, numbers, group_indptr, lengths, best_reward, flagged, ended, *scored = uploaded(columns, device)
    segment, attempts, committed, best_attempt, best_length, longest, most = numbers[:, : len(requests)].unbind(0)
    (base, target, beta), (ramp, best_ended) = (columns[:, : len(requests)].unbind(0) for columns in (rules, flagged))
    scores = rewards.float() if rewards is not None else scored[0]
    winner, accepted, threshold, finish = select_and_commit(
        scores,
        lengths,
        ended,
        group_indptr,
        keys,
        segment,
        attempts,
        committed,
        longest,
        most,
        base,
        target,
        beta,
        ramp,
        best_reward,
        best_attempt,
        best_length,
        best_ended,
    )
    verdicts = torch.stack((winner, accepted.int(), attempts, best_attempt, finish))  # [5, G]
    values = torch.stack((threshold, scores.float()))  # [2, B]
    if rewards is not None:
        packed = torch.cat((verdicts.flatten(), values.view(torch.int32).flatten())).cpu()  # the one look
        verdicts, values = packed[: verdicts.numel()].view(5, -1), packed[verdicts.numel() :]
        values = values.view(torch.float32).view(2, -1)
        for one, (reward, error) in zip(drawn, Scores(None, values[1]), strict=True):
            one.reward, one.error, one.score = reward, error, reward
    for one, tau in zip(drawn, values[0].tolist(), strict=True):
        one.threshold = tau
    for request, group in zip(requests, groups, strict=True):
        chances = [acceptance_probability(c.score, c.threshold, request.beta) for c in group if c.error is None]
        request.acceptance_sum += sum(chances)
        request.scored += len(chances)
    starts = np.cumsum(counts).tolist()
    return [
        Verdict(row - start if row >= 0 else row, bool(won), looked, best, ends)
        for (row, won, looked, best, ends), start in zip(verdicts.T.tolist(), starts, strict=False)
    ]


def traced(request: Request, group: Sequence[Candidate], verdict: Verdict) -> list[CandidateTrace]:
    """All candidates of a request's segment so far: those of earlier heartbeats, and what became of this group."""
    chosen = request.attempts + verdict.winner if verdict.winner >= 0 else verdict.best_attempt
    traces = [*request.looked_at]
    traces += [one.traced("rejected" if one.attempt < verdict.attempts else "unseen") for one in group]
    if verdict.winner not in (NONE, INVALID):
        traces[chosen] = traces[chosen]._replace(verdict="accepted" if verdict.accepted else "fallback")
    return traces


def trace_unseen(answer: Request, rest: Sequence[Candidate]) -> None:
    """Add what was behind the candidate that settled a segment, and was not even scored."""
    if answer.terms.trace:
        traces = answer.looked_at or answer.segments[-1].candidates  # it has failed, or has just committed
        assert traces is not None
        traces += [one.traced("unseen") for one in rest]


def _known(base: float | None) -> float:
    assert base is not None, "r0 is set when a request is admitted"
    return base

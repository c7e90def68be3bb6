"""Accepted tokens per second of the whole loop, and the best number of candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.roofline.cost import ModelCost
from benchmarks.roofline.gpus import Gpu
from benchmarks.roofline.stages import Part, Stage, prefill, proposal, score_pass
from stars_fast.loop.in_order import PASS_OF_GPUS, first_stage

# Per row a reward, a length, flags, a uniform, and a slot per token of a winner: next to nothing.
_SELECT_BYTES_PER_ROW = 128
_SELECT_KERNELS = 2


@dataclass(frozen=True)
class Workload:
    """What is asked of the engine, in a steady state: a request that ends is replaced at once.

    ValueError for values out of range, by name.
    """

    batch: int = 64  # running requests
    segment: int = 16  # tokens; all segments are assumed to be this long
    acceptance: float = 0.3  # P(accept) of a candidate, independent of all others
    context: float = 256  # mean tokens before the segment: the prompt and half of the response
    response: int = 128  # tokens of a whole one; each costs one prefill of its prompt, by both models
    max_attempts: int = 20  # candidates per segment, after which the best rejected one is committed
    tail: int = 0  # tokens of a chat template behind the segment that the reward model reads anew for each row
    in_order: bool = False  # whether candidates are scored in stages, those behind an accepted one never

    def __post_init__(self) -> None:
        if not 0 < self.acceptance <= 1:
            raise ValueError(f"acceptance={self.acceptance}: a probability, above 0 and at most 1")
        for name, least in (("batch", 1), ("segment", 1), ("response", 1), ("max_attempts", 1), ("tail", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: at least {least}")
        if self.prompt < 1:
            raise ValueError(
                f"context={self.context} leaves no prompt before half of response={self.response}: raise the one or "
                "lower the other"
            )

    @property
    def prompt(self) -> float:
        """Mean tokens of a prompt."""
        return self.context - self.response / 2


@dataclass(frozen=True)
class Renewal:
    """One segment of one request, from its first candidate to its commit (:func:`renewal`)."""

    heartbeats: float
    candidates: float
    fallback: float


def renewal(acceptance: float, candidates: int, max_attempts: int) -> Renewal:
    """Expected cost of one committed segment, with ``candidates`` M side by side and at most N attempts.

    The request is still without a winner after h heartbeats with probability ``(1 - a)^(h M)``, and heartbeat h draws
    ``m_h = min(M, N - h M)`` candidates. A segment ends with an acceptance or after its N-th candidate, so::

        E[heartbeats] = sum over h < ceil(N / M) of (1 - a)^(h M)
        E[candidates] = sum over h < ceil(N / M) of (1 - a)^(h M) m_h
        P(fallback)   = (1 - a)^N

    Segments are independent, so each starts the process anew, and by the renewal theorem a heartbeat commits with
    long-run probability ``1 / E[heartbeats]`` and draws ``E[candidates] / E[heartbeats]`` candidates. As N grows that
    is ``1 - (1 - a)^M`` and M.

    Raises
    ------
    ValueError
        Unless 1 <= candidates <= max_attempts.
    """
    if not 1 <= candidates <= max_attempts:
        raise ValueError(f"candidates={candidates}: at least 1 and at most max_attempts={max_attempts}")
    starts = range(0, max_attempts, candidates)
    alive = [(1 - acceptance) ** start for start in starts]
    return Renewal(
        heartbeats=sum(alive),
        candidates=sum(p * min(candidates, max_attempts - start) for p, start in zip(alive, starts, strict=True)),
        fallback=(1 - acceptance) ** max_attempts,
    )


@dataclass(frozen=True)
class Heartbeat:
    """The mean heartbeat with a number of candidates per request."""

    candidates: int  # M; a request with fewer attempts left draws those
    rows: float  # mean candidates of all requests
    commit_probability: float  # P(a request commits a segment), fallbacks included
    fallback_share: float  # of committed segments that were not accepted
    committed_tokens: float  # by all requests together
    memory: float  # bytes of both models' weights, and of the keys and values the scheduler reserves
    fits: bool  # whether that is less than the GPU has
    stages: tuple[Stage, ...]  # propose, score, select, host, refill

    @property
    def total(self) -> Stage:
        """All stages, one after another."""
        return Stage.total("heartbeat", ((1, stage) for stage in self.stages))

    @property
    def tokens_per_second(self) -> float:
        """Committed tokens per second of all requests together, achievable."""
        return self.committed_tokens / self.total.achievable_s

    @property
    def floor_tokens_per_second(self) -> float:
        """The same at the peaks, one pass after another."""
        return self.committed_tokens / self.total.floor_s


def heartbeat(
    policy: ModelCost,
    reward: ModelCost,
    workload: Workload,
    candidates: int,
    gpu: Gpu,
) -> Heartbeat:
    """Model the mean heartbeat.

    propose
        Requests that committed encode their last token (its logits are the new leaf's; a retry has them already); all
        rows draw their first token from the leaf's logits; then K - 1 decode steps of all rows.
    score
        One packed pass of the reward model over the K new tokens of every row; or, in order, one a stage
        (:func:`stages_in_order`).
    select, host
        One kernel and a copy a pass; the plan.
    refill
        One prefill per response that ended, by both models.

    Raises
    ------
    ValueError
        Unless 1 <= candidates <= workload.max_attempts.
    """
    cycle = renewal(workload.acceptance, candidates, workload.max_attempts)
    commit, rows = 1 / cycle.heartbeats, workload.batch * cycle.candidates / cycle.heartbeats
    committed = workload.batch * commit * workload.segment
    memory = _memory(policy, reward, workload, candidates)
    stages = [(float(workload.batch), rows)]
    if workload.in_order:
        stages = stages_in_order(workload, candidates, rows / workload.batch / candidates)
    return Heartbeat(
        candidates=candidates,
        rows=rows,
        commit_probability=commit,
        fallback_share=cycle.fallback,
        committed_tokens=committed,
        memory=memory,
        fits=memory <= gpu.memory,
        stages=(
            _propose(policy, workload, rows, commit, gpu),
            _score(reward, workload, stages, gpu),
            Stage.of("select", [Part(rows * _SELECT_BYTES_PER_ROW, 0)], gpu, kernels=_SELECT_KERNELS * len(stages)),
            Stage("host", achievable_s=gpu.achievable.host_s),
            _refill(policy, reward, workload, committed / workload.response, gpu),
        ),
    )


def best_candidates(policy: ModelCost, reward: ModelCost, workload: Workload, gpu: Gpu) -> Heartbeat:
    """The heartbeat with the most achievable tokens per second among those that fit; M = 1 if none does."""
    every = range(1, workload.max_attempts + 1)
    first, *others = (heartbeat(policy, reward, workload, m, gpu) for m in every)
    return max([first, *(one for one in others if one.fits)], key=lambda one: one.tokens_per_second)


def _propose(policy: ModelCost, workload: Workload, rows: float, commit: float, gpu: Gpu) -> Stage:
    # A heartbeat after which nobody committed needs no extension; otherwise it holds those who did.
    extends = 1 - (1 - commit) ** workload.batch
    behind = workload.batch * commit / extends
    work = (workload.batch, workload.context, workload.segment)
    return proposal(policy, rows, *work, gpu, behind=behind, extends=extends)


def stages_in_order(workload: Workload, candidates: int, drawn: float = 1.0) -> list[tuple[float, float]]:
    """Requests and rows of each scoring pass, as :func:`stars_fast.loop.in_order.first_stage` divides them.

    After d candidates a request is still without an accepted one with probability ``(1 - a)^d``. ``drawn`` is the mean
    share of the ``candidates`` that there are: near the last attempt there are fewer.
    """
    stages, looked_at = list[tuple[float, float]](), 0
    while looked_at < candidates:
        requests = workload.batch * (1 - workload.acceptance) ** looked_at
        whole = max(round(requests), 1)
        sizes, lengths = [candidates - looked_at] * whole, [workload.segment + workload.tail] * whole
        width = first_stage(sizes, lengths, [workload.acceptance] * whole, PASS_OF_GPUS)
        stages.append((requests, requests * width * drawn))
        looked_at += width
    return [(requests, rows) for requests, rows in stages if requests]


def _score(reward: ModelCost, workload: Workload, stages: Sequence[tuple[float, float]], gpu: Gpu) -> Stage:
    passes = (
        score_pass(reward, rows, requests, workload.context, workload.segment, gpu, workload.tail)
        for requests, rows in stages
    )
    return Stage.total("score", ((1.0, one) for one in passes))


def _refill(policy: ModelCost, reward: ModelCost, workload: Workload, prompts: float, gpu: Gpu) -> Stage:
    # Prompts admitted together share a pass; with fewer than one a heartbeat, most heartbeats have none.
    passes = min(prompts, 1.0)
    return Stage.total(
        "refill",
        [(passes, prefill(cost, prompts / passes, workload.prompt, gpu)) for cost in (policy, reward)],
    )


def _memory(policy: ModelCost, reward: ModelCost, workload: Workload, candidates: int) -> float:
    """Weights, each request's prompt, response and best candidate so far, and the candidates being drawn."""
    response = workload.response + workload.segment
    drawn = candidates * (workload.segment + workload.tail)
    slots = workload.batch * (workload.prompt + response + drawn)
    kv_bytes = policy.kv_bytes_per_token + reward.kv_bytes_per_token
    return policy.bytes + reward.bytes + slots * kv_bytes

"""Persona-judge: one model under two prompts, in one tree. It drafts under one, and judges under the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import torch

from stars_fast.loop.memory import passing
from stars_fast.loop.queue import Queue
from stars_fast.loop.request import Candidate, Drawn, PromptNode, Request, Tree, Trunk
from stars_fast.loop.two_trunks import TwoTrunks
from stars_fast.ops.philox import uniform
from stars_fast.ops.sample_step import filter_logits, sample_step
from stars_fast.outputs import CandidateTrace
from stars_fast.policy.leaf import NOT_FINITE, Draw, Sampling

# The random numbers' attempts: a block is drafted with the first, what replaces a token that fell with the second.
_DRAFT, _REPLACEMENT = 0, 1


class SelfJudging(TwoTrunks):
    """The request's trunk is the judge's; the draft's, and the drafted blocks there, are kept beside it."""

    def __init__(self, queue: Queue) -> None:
        super().__init__(queue, queue.trunks)
        self._twins: dict[Candidate, int] = {}  # the same tokens under the drafting prompt

    def both(self, prompt: PromptNode) -> tuple[PromptNode, PromptNode]:
        judging, drafting = (PromptNode(ids, prompt.reward_prompt) for ids in prompt.under_preferences)
        return judging, drafting

    def prompts(self, request: Request) -> Sequence[PromptNode]:
        return request.trunk.prompt, self._draft_trunks[request].prompt

    def held(self, request: Request) -> int:
        return request.terms.method.slots(request.terms.config)

    def peak(self, request: Request) -> int:
        return self.held(request)

    def branch(self, request: Request) -> int:
        return 0

    def due(self, request: Request) -> list[tuple[Tree, Trunk]]:
        return [(self.drafts, request.trunk), (self.drafts, self._draft_trunks[request])]

    def asks(self, requests: Sequence[Request], rows: int) -> list[tuple[Request, int]]:
        return []

    def draw(self, requests: Sequence[Request], rows: int) -> Drawn:
        """Draft a block for each request, and keep what stands of it and what replaces the first token to fall."""
        policy, drawn = self.trunks.policy, Drawn()
        leaves = [self.leaf(request, 1, trunk=self._draft_trunks[request]) for request in requests]
        with passing(rows=len(requests)):
            draws = [draw for (draw,) in policy.propose(leaves)]
            judged, nodes, twins = self._judge(requests, draws)
        for i, (request, draw) in enumerate(zip(requests, judged, strict=True)):
            policy.tree.release(draws[i].node)
            draw.node, twin = nodes[i], replace(draw, node=twins[i])
            candidate = self.candidate(request, draw)
            policy.trim(request.trunk.leaf, draw)
            twin.cut(len(draw.tokens))
            policy.trim(self._draft_trunks[request].leaf, twin)
            self._twins[candidate] = twin.node
            drawn[request] = [candidate]
        return drawn

    def _judge(self, requests: Sequence[Request], drafts: Sequence[Draw]) -> tuple[list[Draw], list[int], list[int]]:
        """What stands of each block and, where a token falls, its replacement. Log-probabilities are the judge's.

        Returns the draws, and the nodes that hold the blocks but for their last tokens, of judge and draft.
        """
        nodes, logits = self._reread(requests, drafts)
        count, lengths = len(drafts), [len(draft.tokens) for draft in drafts]
        sampled = [r.terms.sampling for r, length in zip(requests, lengths, strict=True) for _ in range(length)]
        raw = torch.cat(logits[:count])  # [T, V], the judge's
        judge, drafted = (
            _processed(self.trunks.policy.allowed(rows), sampled) for rows in (raw, torch.cat(logits[count:]))
        )
        tokens = torch.tensor(
            [token for draft in drafts for token in draft.tokens], dtype=torch.int64, device="cpu"
        ).to(raw.device)
        ratio = (judge - drafted).gather(1, tokens[:, None])[:, 0].exp().double().cpu()  # [T]
        ratio = ratio.nan_to_num(0.0)  # filters that cut otherwise than in the draft leave 0 / 0: such a token falls
        stands = (_uniforms(requests, lengths) < ratio).tolist()
        starts = [0, *accumulate(lengths)]
        kept = [_leading(stands[a:b]) for a, b in pairwise(starts)]
        fallen = [i for i in range(count) if kept[i] < lengths[i] and drafts[i].error is None]
        places = torch.tensor([starts[i] + kept[i] for i in fallen], dtype=torch.int64, device="cpu")
        lacking = (judge[places].exp() - drafted[places].exp()).clamp_min(0)  # [F, V]
        # Two laws that differ by rounding alone may leave nothing.
        lacking = torch.where(lacking.sum(1, keepdim=True) > 0, lacking, judge[places].exp())
        fallen_requests = [requests[i] for i in fallen]
        replaced = _replacements(fallen_requests, [kept[i] for i in fallen], lacking.log())
        new = dict(zip(fallen, replaced, strict=True))
        raw = raw.float().log_softmax(1)
        judged = []
        for i, (request, draft) in enumerate(zip(requests, drafts, strict=True)):
            ids = draft.tokens[: kept[i]] + ([new[i]] if i in new else [])
            rows = (
                torch.arange(starts[i], starts[i] + len(ids), device="cpu"),
                torch.tensor(ids, dtype=torch.int64, device="cpu"),
            )
            if request.terms.trace and i in new:
                nothing = math.nan, math.nan, math.nan
                request.looked_at = [CandidateTrace(0, draft.tokens, *nothing, "rejected", math.nan)]
            ended = bool(ids) and ids[-1] in request.terms.sampling.eos_token_ids
            error = draft.error or (NOT_FINITE if raw[rows[0]].isnan().any() else None)
            judged.append(Draw(-1, ids, raw[rows].tolist(), judge[rows].tolist(), ended, error))
            request.terms.stats.policy_tokens += lengths[i] - kept[i]
        return judged, nodes[:count], nodes[count:]

    def _reread(self, requests: Sequence[Request], drafts: Sequence[Draw]) -> tuple[list[int], list[torch.Tensor]]:
        """All blocks but their last tokens under both prompts, in one pass.

        Returns the new nodes, and the logits ``[T, V]`` at each token's place: the judge's, then the draft's.
        """
        policy = self.trunks.policy
        trunks = [request.trunk for request in requests] + [self._draft_trunks[request] for request in requests]
        runs = [draft.tokens[:-1] for draft in drafts] * 2
        nodes = [trunk.leaf for trunk in trunks]
        logits = [trunk.logits[None] for trunk in trunks if trunk.logits is not None]
        assert len(logits) == len(trunks)
        for node, run in zip(nodes, runs, strict=True):
            if not run:
                policy.tree.retain(node)
        places = [i for i, run in enumerate(runs) if run]
        if places:
            new, rows_after = policy.read([nodes[i] for i in places], [runs[i] for i in places])
            for i, node, rows in zip(places, new, rows_after, strict=True):
                nodes[i], logits[i] = node, torch.cat((logits[i], rows))
        # A draft that broke off at once has no token to judge.
        return nodes, [rows[: len(draft.tokens)] for rows, draft in zip(logits, [*drafts, *drafts], strict=True)]

    def judge(self, requests: Sequence[Request], drawn: Drawn, rewards: torch.Tensor | None) -> None:
        for request in requests:
            (candidate,) = drawn[request]
            twin = self._twins.pop(candidate)
            request.attempts += 1
            if request.terms.trace:
                candidate.attempt = len(request.looked_at)
                request.looked_at.append(candidate.traced("accepted"))
            if candidate.error is not None:
                self.trunks.policy.tree.release(twin)
                self.roll_back([candidate])
                self.queue.fail(request, candidate.error)
                continue
            trunk = self._draft_trunks[request]
            trunk.pending = [*trunk.pending, *candidate.draw.tokens]
            self.drafts.advance(trunk, twin)
            self.commit_untested(request, candidate)
            request.terms.stats.committed_tokens += len(candidate.draw.tokens)

    def preempt(self, request: Request) -> None:
        self._twins = {candidate: node for candidate, node in self._twins.items() if candidate.answer is not request}
        super().preempt(request)

    def drop(self, request: Request) -> None:
        self._twins.clear()
        super().drop(request)


def _processed(logits: torch.Tensor, sampled: Sequence[Sampling]) -> torch.Tensor:
    """Log-probabilities ``[T, V]`` after each row's temperature and filters."""

    def rows(name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.tensor([getattr(one, name) for one in sampled], dtype=dtype, device="cpu").to(logits.device)

    scaled = logits.float() / rows("temperature")[:, None]
    return filter_logits(scaled, rows("top_k", torch.int32), rows("top_p"), rows("min_p")).log_softmax(1)


def _uniforms(requests: Sequence[Request], lengths: Sequence[int]) -> torch.Tensor:
    """What decides about each token of each block ``[T]``."""
    names = [
        (request.key, len(request.segments), position)
        for request, length in zip(requests, lengths, strict=True)
        for position in range(length)
    ]
    keys, segments, positions = torch.tensor(names, dtype=torch.int64, device="cpu").view(-1, 3).unbind(1)
    return uniform(keys, segments, torch.tensor(_DRAFT, device="cpu"), positions)


def _replacements(requests: Sequence[Request], positions: Sequence[int], logits: torch.Tensor) -> list[int]:
    """A token with these logits ``[F, V]`` for each."""
    rows, device, int32, float32 = len(requests), logits.device, torch.int32, torch.float32
    if not rows:
        return []

    def full(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((rows,), value, dtype=dtype, device=device)

    place = torch.tensor(positions, dtype=int32, device=device)
    tokens, *_ = sample_step(
        logits,
        torch.tensor([request.key for request in requests], device=device),
        torch.tensor([len(request.segments) for request in requests], dtype=int32, device=device),
        full(_REPLACEMENT, int32),
        place,
        full(True, torch.bool),
        place + 1,
        full(1, float32),
        full(0, int32),
        full(1, float32),
        full(0, float32),
        full(1, float32),
        None,
        torch.empty(rows, 0, dtype=torch.int64, device=device),
    )
    ids: list[int] = tokens.tolist()
    return ids


def _leading(stands: Sequence[bool]) -> int:
    """How many are true before the first that is not."""
    return next((place for place, stand in enumerate(stands) if not stand), len(stands))

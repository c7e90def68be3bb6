"""Loops with two proposers: a draft model and the policy, or one model under two prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import torch

from stars_fast.loop.heartbeat import Generation
from stars_fast.loop.scheduler import persona_slots
from stars_fast.loop.trunks import Trunks
from stars_fast.methods.two_policies import RSD
from stars_fast.ops.philox import uniform
from stars_fast.ops.sample_step import filter_logits, sample_step
from stars_fast.policy import Draw, Policy
from stars_fast.request import Candidate, PromptNode, Request, Trunk


class Drafting(Generation):
    """A draft model writes each segment first (RSD). Both models' trees hold all that is committed.

    A tree is brought up to date when its model is next asked, so that the policy reads accepted drafts in one pass.
    """

    def __init__(self, *args: Any, draft: Policy) -> None:
        super().__init__(*args)
        assert isinstance(self.method, RSD)
        self.threshold = self.method.threshold
        self.trees.append(Trunks(draft, self.scheduler, place=1))
        nodes: dict[PromptNode, PromptNode] = {}
        for request in self.waiting:
            prompt = nodes.setdefault(request.prompt, PromptNode(request.prompt.ids, request.prompt.reward_prompt))
            request.trunks.append(Trunk(prompt))

    def _drafted(self, request: Request) -> bool:
        """Whether it is the draft model's turn."""
        return request.attempts == 0

    def trunks_ahead(self) -> Trunks:
        return self.trees[1]

    def extend(self) -> None:
        for place, trunks in enumerate(self.trees):
            trunks.extend([request for request in self.running if self._drafted(request) == place])

    def propose(self) -> list[list[Candidate]]:
        if not self.running:
            return []
        self.scheduler.packed, self.stats.heartbeats = len(self.running), self.stats.heartbeats + 1
        drawn: dict[Request, Candidate] = {}
        for place, trunks in enumerate(self.trees):
            asked = [request for request in self.running if self._drafted(request) == place]
            leaves = [self._leaf(request, 1, place) for request in asked]
            groups = trunks.policy.propose(leaves, self.sampling) if asked else []
            for request, (draw,) in zip(asked, groups, strict=True):
                if place == 1:  # the policy has not read it, and may never do
                    self.stats.draft_tokens += len(draw.tokens)
                    draw.logprobs = [math.nan] * len(draw.tokens)
                drawn[request] = self._candidate(request, draw, place)
        return [[drawn[request]] for request in self.running]

    def asks_reward(self, candidate: Candidate) -> bool:
        return candidate.place == 1 or candidate.completion.finished

    def select_and_commit(self, candidates: Sequence[Sequence[Candidate]]) -> list[Request]:
        changed = []
        for request, (candidate,) in zip(self.running, candidates, strict=False):
            error = candidate.error or self._foreign(candidate)
            request.attempts += 1
            if error is not None:
                self._roll_back([candidate], keep=None)
                self.fail(request, error)
            elif candidate.place == 1 and candidate.reward < self.threshold:
                self._roll_back([candidate], keep=None)
                continue
            else:
                if candidate.place == 1:
                    candidate.threshold = self.threshold
                self.stats.committed_tokens += len(candidate.draw.tokens)
                self._commit(request, candidate, accepted=candidate.place == 1)
            changed.append(request)
        self.drop_finished()
        return changed

    def _foreign(self, candidate: Candidate) -> str | None:
        """Embedding tables of one vocabulary may be padded differently."""
        least = min(trunks.policy.vocab_size for trunks in self.trees)
        beyond = next((token for token in candidate.draw.tokens if token >= least), None)
        return None if beyond is None else f"id {beyond} lies outside the {least} ids that draft and policy share"


class SelfJudging(Generation):
    """One model under two prompts, in one tree (Persona-judge): it drafts under one, and judges under the other."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.drafts = Trunks(self.policy, self.scheduler, place=1)
        self.trees.append(self.drafts)
        self.twins: dict[Candidate, int] = {}  # the same tokens under the drafting prompt
        nodes: dict[PromptNode, list[PromptNode]] = {}
        for request in self.waiting:
            prompt = request.prompt
            if prompt not in nodes:
                nodes[prompt] = [PromptNode(ids, prompt.reward_prompt) for ids in prompt.personas]
            request.prompts = nodes[prompt]
            request.trunks = [Trunk(persona) for persona in request.prompts]
            request.reserve = persona_slots([], self.config)  # what it takes besides the prompts

    def extend(self) -> None:
        for trunks in self.trees:
            trunks.extend(self.running)

    def retreat(self, cause: str) -> list[Request]:
        self.twins.clear()  # their nodes went with the tree
        return super().retreat(cause)

    def propose(self) -> list[list[Candidate]]:
        """Draft a block for each request, and keep what stands of it and what replaces the first token to fall."""
        if not self.running:
            return []
        self.scheduler.packed, self.stats.heartbeats = len(self.running), self.stats.heartbeats + 1
        leaves = [self._leaf(request, 1, place=1) for request in self.running]
        draws = [draw for (draw,) in self.policy.propose(leaves, self.sampling)]
        judged, nodes, twins = self._judge(draws)
        candidates = []
        for i, (request, draw) in enumerate(zip(self.running, judged, strict=True)):
            self.policy.tree.release(draws[i].node)
            draw.node, twin = nodes[i], replace(draw, node=twins[i])
            candidate = self._candidate(request, draw)
            self.policy.trim(candidate.leaf, draw)
            twin.cut(len(draw.tokens))
            self.policy.trim(self.drafts.of(request).leaf, twin)
            self.twins[candidate] = twin.node
            candidates.append([candidate])
        return candidates

    def _judge(self, drafts: Sequence[Draw]) -> tuple[list[Draw], list[int], list[int]]:
        """What stands of each block and, where a token falls, its replacement. Log-probabilities are the judge's.

        Returns the draws, and the nodes that hold the blocks but for their last tokens, of judge and draft.
        """
        nodes, logits = self._reread(drafts)
        count, lengths = len(drafts), [len(draft.tokens) for draft in drafts]
        raw = torch.cat(logits[:count])  # [T, V], the judge's
        judge, drafted = self._processed(raw), self._processed(torch.cat(logits[count:]))
        tokens = torch.tensor(
            [token for draft in drafts for token in draft.tokens], dtype=torch.int64, device="cpu"
        ).to(raw.device)
        ratio = (judge - drafted).gather(1, tokens[:, None])[:, 0].exp().double().cpu()  # [T]
        ratio = ratio.nan_to_num(0.0)  # filters that cut otherwise than in the draft leave 0 / 0: such a token falls
        stands = (self._uniforms(lengths) < ratio).tolist()
        starts = [0, *accumulate(lengths)]
        kept = [_leading(stands[a:b]) for a, b in pairwise(starts)]
        fallen = [i for i in range(count) if kept[i] < lengths[i] and drafts[i].finite]
        places = torch.tensor([starts[i] + kept[i] for i in fallen], dtype=torch.int64, device="cpu")
        lacking = (judge[places].exp() - drafted[places].exp()).clamp_min(0)  # [F, V]
        # Two laws that differ by rounding alone may leave nothing.
        lacking = torch.where(lacking.sum(1, keepdim=True) > 0, lacking, judge[places].exp())
        new = dict(zip(fallen, self._replacements(fallen, kept, lacking.log()), strict=True))
        raw = raw.float().log_softmax(1)
        judged = []
        for i, draft in enumerate(drafts):
            ids = draft.tokens[: kept[i]] + ([new[i]] if i in new else [])
            rows = (
                torch.arange(starts[i], starts[i] + len(ids), device="cpu"),
                torch.tensor(ids, dtype=torch.int64, device="cpu"),
            )
            ended = bool(ids) and ids[-1] in self.sampling.eos_token_ids
            finite = draft.finite and not raw[rows[0]].isnan().any()
            judged.append(Draw(-1, ids, raw[rows].tolist(), judge[rows].tolist(), ended, finite))
            self.stats.policy_tokens += lengths[i] - kept[i]
        return judged, nodes[:count], nodes[count:]

    def _reread(self, drafts: Sequence[Draw]) -> tuple[list[int], list[torch.Tensor]]:
        """All blocks but their last tokens under both prompts, in one pass.

        Returns the new nodes, and the logits ``[T, V]`` at each token's place: the judge's, then the draft's.
        """
        trunks = [tree.of(request) for tree in self.trees for request in self.running]
        runs = [draft.tokens[:-1] for draft in drafts] * 2
        nodes = [trunk.leaf for trunk in trunks]
        logits = [trunk.logits[None] for trunk in trunks if trunk.logits is not None]
        assert len(logits) == len(trunks)
        for node, run in zip(nodes, runs, strict=True):
            if not run:
                self.policy.tree.retain(node)
        places = [i for i, run in enumerate(runs) if run]
        if places:
            new, rows_after = self.policy.read([nodes[i] for i in places], [runs[i] for i in places])
            for i, node, rows in zip(places, new, rows_after, strict=True):
                nodes[i], logits[i] = node, torch.cat((logits[i], rows))
        # A draft that broke off at once has no token to judge.
        return nodes, [rows[: len(draft.tokens)] for rows, draft in zip(logits, [*drafts, *drafts], strict=True)]

    def _processed(self, logits: torch.Tensor) -> torch.Tensor:
        """Log-probabilities ``[T, V]`` after temperature and filters."""

        def rows(value: float, dtype: torch.dtype) -> torch.Tensor:
            return torch.full((len(logits),), value, dtype=dtype, device=logits.device)

        filters = rows(self.sampling.top_k, torch.int32), rows(self.sampling.top_p, torch.float32)
        scaled = logits.float() / self.sampling.temperature
        return filter_logits(scaled, *filters, rows(self.sampling.min_p, torch.float32)).log_softmax(1)

    def _uniforms(self, lengths: Sequence[int]) -> torch.Tensor:
        """What decides about each token of each block ``[T]``."""
        names = [
            (request.key, len(request.segments), position)
            for request, length in zip(self.running, lengths, strict=True)
            for position in range(length)
        ]
        keys, segments, positions = torch.tensor(names, dtype=torch.int64, device="cpu").view(-1, 3).unbind(1)
        return uniform(keys, segments, torch.tensor(0, device="cpu"), positions)

    def _replacements(self, fallen: Sequence[int], positions: Sequence[int], logits: torch.Tensor) -> list[int]:
        """A token with these logits ``[F, V]`` for each, by the random numbers of attempt 1: drafts are attempt 0."""
        rows, int32, float32 = len(fallen), torch.int32, torch.float32
        if not rows:
            return []

        def full(value: float, dtype: torch.dtype) -> torch.Tensor:
            return torch.full((rows,), value, dtype=dtype, device=logits.device)

        requests = [self.running[i] for i in fallen]
        place = torch.tensor([positions[i] for i in fallen], dtype=int32, device=logits.device)
        tokens, *_ = sample_step(
            logits,
            torch.tensor([request.key for request in requests], device=logits.device),
            torch.tensor([len(request.segments) for request in requests], dtype=int32, device=logits.device),
            full(1, int32),
            place,
            full(True, torch.bool),
            place + 1,
            full(1, float32),
            full(0, int32),
            full(1, float32),
            full(0, float32),
            full(1, float32),
            None,
            torch.empty(rows, 0, dtype=torch.int64, device=logits.device),
        )
        ids: list[int] = tokens.tolist()
        return ids

    def select_and_commit(self, candidates: Sequence[Sequence[Candidate]]) -> list[Request]:
        changed = []
        for request, (candidate,) in zip(self.running, candidates, strict=False):
            twin = self.twins.pop(candidate)
            request.attempts += 1
            if candidate.error is not None:
                self.policy.tree.release(twin)
                self._roll_back([candidate], keep=None)
                self.fail(request, candidate.error)
            else:
                self.stats.committed_tokens += len(candidate.draw.tokens)
                self._commit(request, candidate, accepted=True)
                if request.finish_reason is None:
                    self.drafts.advance(request, twin)
                else:
                    self.policy.tree.release(twin)
            changed.append(request)
        self.drop_finished()
        return changed


def _leading(stands: Sequence[bool]) -> int:
    """How many are true before the first that is not."""
    return next((place for place, stand in enumerate(stands) if not stand), len(stands))

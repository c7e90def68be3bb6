"""Loops with two proposers: a draft model and the policy, or one model under two prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from stars_fast.heartbeat import Generation
from stars_fast.methods.two_policies import RSD
from stars_fast.ops.philox import acceptance_uniform
from stars_fast.ops.sample_step import filter_logits, sample_step
from stars_fast.policy import Draw, Policy
from stars_fast.request import Candidate, PromptNode, Request, Trunk
from stars_fast.scheduler import persona_slots
from stars_fast.trunks import Trunks


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
        self.running = [request for request in self.running if request.finish_reason is None]
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
            request.trunks = [Trunk(persona) for persona in nodes[prompt]]
            request.reserve = persona_slots(prompt.personas, self.config)

    def extend(self) -> None:
        for trunks in self.trees:
            trunks.extend(self.running)

    def propose(self) -> list[list[Candidate]]:
        """Draft a block for each request, and keep what stands of it and what replaces the first token to fall."""
        if not self.running:
            return []
        self.scheduler.packed, self.stats.heartbeats = len(self.running), self.stats.heartbeats + 1
        leaves = [self._leaf(request, 1, place=1) for request in self.running]
        draws = [draw for (draw,) in self.policy.propose(leaves, self.sampling)]
        nodes, judge, draft = self._reread(draws)
        candidates = []
        for i, (request, draw) in enumerate(zip(self.running, draws, strict=True)):
            self.policy.tree.release(draw.node)
            if draw.finite:
                draw = self._judged(request, draw, judge[i], draft[i])
            draw.node = nodes[0][i]
            candidate = self._candidate(request, draw)
            self.policy.trim(candidate.leaf, draw)
            candidates.append([candidate])
            twin = replace(draw, node=nodes[1][i])
            self.policy.trim(self.drafts.of(request).leaf, twin)
            self.twins[candidate] = twin.node
        return candidates

    def _reread(self, draws: Sequence[Draw]) -> tuple[list[list[int]], list[torch.Tensor], list[torch.Tensor]]:
        """All blocks under both prompts, in one pass.

        Returns the nodes that hold all tokens but the last, of the judge and of the draft, and the logits ``[T, V]`` at
        each token's place, of the judge and of the draft.
        """
        trunks = [tree.of(request) for tree in self.trees for request in self.running]
        runs = [draw.tokens[:-1] for draw in draws] * 2
        places = [i for i, run in enumerate(runs) if run]
        nodes, logits = [trunk.leaf for trunk in trunks], [_known(trunk)[None] for trunk in trunks]
        for i, run in enumerate(runs):
            if not run:
                self.policy.tree.retain(nodes[i])
        if places:
            new, after_tokens = self.policy.read([nodes[i] for i in places], [runs[i] for i in places])
            for i, node, rows in zip(places, new, after_tokens, strict=True):
                nodes[i], logits[i] = node, torch.cat((logits[i], rows))
        count = len(draws)
        return [nodes[:count], nodes[count:]], logits[:count], logits[count:]

    def _judged(self, request: Request, draft: Draw, judge_logits: torch.Tensor, draft_logits: torch.Tensor) -> Draw:
        """The tokens that stand, and the replacement of the first that does not. Log-probabilities are the judge's."""
        tokens = torch.tensor(draft.tokens, device=judge_logits.device)
        judge, drafted = self._processed(judge_logits), self._processed(draft_logits)  # [T, V], log
        ratio = (judge - drafted).gather(1, tokens[:, None])[:, 0].exp().double().cpu()
        uniforms = acceptance_uniform(
            torch.tensor(request.key), torch.tensor(len(request.segments)), torch.tensor(0), torch.arange(len(ratio))
        )
        fallen = (uniforms >= ratio).nonzero()[:, 0].tolist()
        stand = fallen[0] if fallen else len(draft.tokens)
        kept = draft.tokens[:stand]
        if fallen:
            residual = (judge[stand].exp() - drafted[stand].exp()).clamp_min(0)
            kept.append(self._draw(request, stand, residual.log() if residual.any() else judge[stand]))
        self.stats.policy_tokens += len(draft.tokens) - stand
        places, ids = torch.arange(len(kept)), torch.tensor(kept)
        raw = judge_logits[: len(kept)].float().log_softmax(1)
        ended, finite = kept[-1] in self.sampling.eos_token_ids, bool(judge_logits.amax().isfinite())
        logprobs, sampling = raw[places, ids].tolist(), judge[places, ids].tolist()
        return Draw(-1, kept, logprobs, sampling, ended, finite)

    def _processed(self, logits: torch.Tensor) -> torch.Tensor:
        """Log-probabilities ``[T, V]`` after temperature and filters."""

        def rows(value: float, dtype: torch.dtype) -> torch.Tensor:
            return torch.full((len(logits),), value, dtype=dtype, device=logits.device)

        filters = rows(self.sampling.top_k, torch.int32), rows(self.sampling.top_p, torch.float32)
        scaled = logits.float() / self.sampling.temperature
        return filter_logits(scaled, *filters, rows(self.sampling.min_p, torch.float32)).log_softmax(1)

    def _draw(self, request: Request, position: int, logits: torch.Tensor) -> int:
        """A token with these logits ``[V]``, by the random numbers of attempt 1: the drafts are attempt 0."""

        def one(value: float, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.tensor([value], dtype=dtype, device=logits.device)

        float32 = torch.float32
        token, *_ = sample_step(
            logits[None],
            torch.tensor([request.key], device=logits.device),
            one(len(request.segments)),
            one(1),
            one(position),
            one(True, torch.bool),
            one(position + 1),
            one(1, float32),
            one(0),
            one(1, float32),
            one(0, float32),
            one(1, float32),
            None,
            torch.empty(0, dtype=torch.int64, device=logits.device),
        )
        return int(token)

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
        self.running = [request for request in self.running if request.finish_reason is None]
        return changed


def _known(trunk: Trunk) -> torch.Tensor:
    assert trunk.logits is not None
    return trunk.logits

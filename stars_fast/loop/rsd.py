"""Reward-guided speculative decoding: a draft model writes each segment first, the policy where that does not stand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch

from stars_fast.loop.memory import passing
from stars_fast.loop.queue import Queue
from stars_fast.loop.request import Candidate, Drawn, PromptNode, Request, Tree, Trunk
from stars_fast.loop.trunks import Trunks
from stars_fast.loop.two_trunks import TwoTrunks
from stars_fast.methods.rsd import RSD


class Drafting(TwoTrunks):
    """Both models' trees hold all that is committed.

    A tree is brought up to date when its model is next asked, so that the policy reads accepted drafts in one pass.

    Parameters
    ----------
    queue : Queue
    drafts : Trunks
        Of the draft model's tree.
    """

    def __init__(self, queue: Queue, drafts: Trunks) -> None:
        super().__init__(queue, drafts)
        self.trees = (self.drafts,)
        self._drafted: set[Candidate] = set()  # whose branches lie in the draft model's tree

    def both(self, prompt: PromptNode) -> tuple[PromptNode, PromptNode]:
        return prompt, PromptNode(prompt.ids, prompt.reward_prompt, media=prompt.media)

    def beside(self, request: Request) -> list[tuple[Tree, PromptNode]]:
        return [(self.drafts, self._draft_trunks[request].prompt)]

    def _drafts(self, request: Request) -> bool:
        """Whether it is the draft model's turn."""
        return request.attempts == 0

    def due(self, request: Request) -> list[tuple[Tree, Trunk]]:
        own = (self.drafts, self._draft_trunks[request])
        return [own if self._drafts(request) else (self.queue.trunks, request.trunk)]

    def asks(self, requests: Sequence[Request], rows: int) -> list[tuple[Request, int]]:
        return [(request, 1) for request in requests if not self._drafts(request)]

    def draw(self, requests: Sequence[Request], rows: int) -> Drawn:
        drawn: Drawn = {}
        asked = [request for request in requests if self._drafts(request)]
        if not asked:
            return drawn
        trunks = [self._draft_trunks[request] for request in asked]
        with passing(rows=len(asked)):
            groups = self.drafts.policy.propose(
                [
                    self.leaf(request, 1, trunk=trunk, trunks=self.drafts)
                    for request, trunk in zip(asked, trunks, strict=True)
                ]
            )
        for request, trunk, (draw,) in zip(asked, trunks, groups, strict=True):
            request.terms.stats.draft_tokens += len(draw.tokens)
            draw.logprobs = [math.nan] * len(draw.tokens)  # the policy has not read it, and may never do
            candidate = self.candidate(request, draw, self.drafts, trunk)
            self._drafted.add(candidate)
            drawn[request] = [candidate]
        return drawn

    def asks_reward(self, candidate: Candidate) -> bool:
        return candidate in self._drafted or candidate.completion.finished

    def judge(self, requests: Sequence[Request], drawn: Drawn, rewards: torch.Tensor | None) -> None:
        for request in requests:
            (candidate,) = drawn[request]
            error = candidate.error or self._foreign(candidate)
            drafted, threshold = candidate in self._drafted, cast(RSD, request.terms.method).threshold
            request.attempts += 1
            candidate.error, candidate.threshold = error, threshold if drafted else math.nan
            stays = not (drafted and candidate.reward < threshold)
            if request.terms.trace:
                verdict = "fallback" if not drafted else "accepted" if stays else "rejected"
                request.looked_at = [*request.looked_at, candidate.traced(verdict)]
            if error is not None:
                self.roll_back([candidate])
                self.queue.fail(request, error)
            elif not stays:
                self.roll_back([candidate])
            else:
                self.commit_untested(request, candidate, accepted=drafted)
                request.terms.stats.committed_tokens += len(candidate.draw.tokens)

    def _foreign(self, candidate: Candidate) -> str | None:
        """Embedding tables of one vocabulary may be padded differently."""
        least = min(trunks.policy.logit_size for trunks in (self.trunks, self.drafts))
        beyond = next((token for token in candidate.draw.tokens if token >= least), None)
        return None if beyond is None else f"id {beyond} lies outside the {least} ids that draft and policy share"

    def roll_back(self, candidates: Sequence[Candidate]) -> None:
        drafted = [one for one in candidates if one in self._drafted]
        self.drafts.release([one.draw for one in drafted])
        for one in drafted:
            self._drafted.discard(one)
            self.queue.tell(one.answer, self.queue.reward.discard, one.completion)
        super().roll_back([one for one in candidates if one not in drafted])

    def grow(self, answer: Request, chosen: Candidate) -> None:
        draw, drafted = chosen.draw, chosen in self._drafted
        self._drafted.discard(chosen)
        for trunks, trunk, mine in (
            (self.trunks, answer.trunk, not drafted),
            (self.drafts, self._draft_trunks[answer], drafted),
        ):
            trunks.append(trunk, draw.tokens, draw.node if mine else -1, draw.logits if mine else None)

    def preempt(self, request: Request) -> None:
        self._drafted = {candidate for candidate in self._drafted if candidate.answer is not request}
        super().preempt(request)

    def drop(self, request: Request) -> None:
        self._drafted.clear()
        super().drop(request)

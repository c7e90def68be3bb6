"""RL-of-Thoughts: before each step the policy is asked about its answer, and told what to do next."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import cast

import torch

from stars_fast.loop.memory import passing
from stars_fast.loop.one_answer import OneAnswer
from stars_fast.loop.request import Candidate, Drawn, Request, Trunk
from stars_fast.loop.trunks import Trunks
from stars_fast.methods.navigator import Navigator
from stars_fast.outputs import Cause, Scaffold
from stars_fast.policy.leaf import NOT_FINITE, Draw
from stars_fast.tree.attention import evaluating


class Navigating(OneAnswer):
    """A choice hangs on its request until the step is committed: who gives way reads the instruction once more, and is
    not asked again.
    """

    judges_on_device = False

    # Rows and slots

    def held(self, request: Request) -> int:
        """With room for what is read before candidates are drawn, where that is still to come."""
        held = super().held(request) + self._scaffold(request, 1)
        if request.scaffold is None:
            held += max(0, _method(request).asked - _method(request).longest_block - self.branch(request))
        return held

    def peak(self, request: Request) -> int:
        return super().peak(request) + self._scaffold(request, 2) + _method(request).asked

    def _scaffold(self, request: Request, ahead: int) -> int:
        """Slots of the instructions it has read, the segment's being the first of so many ``ahead``."""
        longest, steps = _method(request).longest_block, _method(request).steps
        read = sum(len(segment.scaffold.tokens) for segment in request.segments if segment.scaffold is not None)
        if request.scaffold is not None:
            read, ahead, steps = read + len(request.scaffold.tokens), ahead - 1, steps - 1
        return read + longest * min(ahead, steps - len(request.segments))

    # Drawing

    def draw(self, requests: Sequence[Request], rows: int) -> Drawn:
        """No candidates: choose the next step of those that begin one, and have the policy read its instruction."""
        begin = [request for request in requests if request.scaffold is None]
        free = [request for request in begin if len(request.segments) + 1 < _method(request).steps]
        states = dict(zip(free, self._states(free), strict=True))
        for request in begin:
            try:
                request.scaffold = _choice(_method(request), states.get(request))
            except Exception as error:
                self.queue.fail(request, Cause.of(error, f"method={_method(request).name!r} raised "))
                continue
            if tokens := request.scaffold.tokens:
                request.terms.stats.scaffold_tokens += len(tokens)
                self.trunks.append(request.trunk, tokens, -1)
        self.trunks.extend([request.trunk for request in begin if request.finish_reason is None])
        return {}

    def _states(self, requests: Sequence[Request]) -> list[torch.Tensor]:
        """What the policy says of each answer ``[questions]``: expected scores, NaN where its logits are not finite."""
        policy, expected = self.trunks.policy, list[torch.Tensor]()
        asked = [(request, question) for request in requests for question in _method(request).questions]
        for first in range(0, len(asked), most := self.scheduler.max_rows):
            batch = asked[first : first + most]
            leaves, runs = [request.trunk.leaf for request, _ in batch], [question for _, question in batch]
            tokens, limit = sum(map(len, runs)), self.scheduler.prefill_tokens
            with passing(min(tokens, limit), len(batch)):
                nodes, logits = policy.prefill(leaves, cast(Sequence[Sequence[int]], runs), limit)
            policy.tree.release_all(nodes)
            for (request, question), row in zip(batch, logits, strict=True):
                scores = row[list(cast(Sequence[int], _method(request).scores))].float().softmax(0)
                expected.append(scores @ torch.arange(1.0, len(scores) + 1, device=scores.device))
                request.terms.stats.scaffold_tokens += len(question)
        if not expected:
            return []
        states = torch.stack(expected).cpu()  # the one look
        return list(states.split([len(_method(request).questions) for request in requests]))

    def asks(self, requests: Sequence[Request], rows: int) -> list[tuple[Request, int]]:
        going = [request for request in requests if request.finish_reason is None]
        return super().asks(going, rows) if going else []

    def candidate(
        self, answer: Request, draw: Draw, trunks: Trunks | None = None, trunk: Trunk | None = None
    ) -> Candidate:
        """The last block's step ends the answer."""
        one, scaffold = super().candidate(answer, draw, trunks, trunk), answer.scaffold
        if scaffold is not None and scaffold.block == len(_method(answer).blocks) - 1:
            one.ended = one.completion.finished = True
        return one

    # Judging

    def asks_reward(self, candidate: Candidate) -> bool:
        return _method(candidate.answer).n > 1 or candidate.completion.finished

    def judge(self, requests: Sequence[Request], drawn: Drawn, rewards: torch.Tensor | None) -> None:
        if going := [request for request in requests if request.finish_reason is None]:
            super().judge(going, drawn, rewards)


def _choice(method: Navigator, state: torch.Tensor | None) -> Scaffold:
    """By the state, or the last block where there is none. Raises what the network does."""
    block = len(method.blocks) - 1
    if state is not None:
        if not state.isfinite().all():
            raise ValueError(NOT_FINITE)
        network = method.network
        with evaluating(network) if isinstance(network, torch.nn.Module) else nullcontext():
            block = method.action(state)
    return Scaffold(list(cast(Sequence[int], method.blocks[block])), block, None if state is None else state.tolist())


def _method(request: Request) -> Navigator:
    return cast(Navigator, request.terms.method)

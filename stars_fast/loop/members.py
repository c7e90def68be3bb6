"""Requests that have several answers at once: what whole answers on trial and populations have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence

from stars_fast.loop.one_answer import OneAnswer
from stars_fast.loop.queue import Queue
from stars_fast.loop.request import Request, Tree, Trunk
from stars_fast.ops.philox import Domain, philox_key
from stars_fast.outputs import SegmentTrace


class Members(OneAnswer):
    """Each request stands for answers that are requests of their own. Their slots are set aside when it is admitted."""

    judges_on_device = False

    def __init__(self, queue: Queue) -> None:
        super().__init__(queue)
        self.members: dict[Request, list[Request]] = {}

    def enter(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self.members[request] = []

    def leaves(self, request: Request) -> list[Request]:
        """Its answers that grow."""
        return [member for member in self.members[request] if member.finish_reason is None]

    def reserve(self, request: Request) -> int:
        """Slots for all of its answers."""
        raise NotImplementedError

    def held(self, request: Request) -> int:
        return self.reserve(request)

    def peak(self, request: Request) -> int:
        return self.reserve(request)

    def branch(self, request: Request) -> int:
        return 0

    def looks_in_order(self, answer: Request) -> bool:
        return False

    def start(self, request: Request) -> None:
        """See to it that it has answers that grow."""
        raise NotImplementedError

    def due(self, request: Request) -> list[tuple[Tree, Trunk]]:
        self.start(request)
        return [due for leaf in self.leaves(request) for due in self.trunks.due(leaf.trunk)]

    def member(self, request: Request, slot: int, group: int = 0) -> Request:
        """A new answer to the request's prompt, with random numbers of its own."""
        member = Request(
            terms=request.terms,
            prompt=request.prompt,
            key=philox_key(request.key, group, slot, domain=Domain.MEMBER),
            target=-math.inf,
            base=-math.inf,
            beta=1.0,
            processor=request.processor,
            stop=request.stop,
        )
        member.strategy, member.owner = self, request
        return member

    def settle(self, request: Request, winner: Request, segments: list[SegmentTrace]) -> None:
        """The winner's answer is the request's."""
        request.response.tokens[:], request.reward = winner.tokens, winner.reward
        request.logprobs, request.sampling_logprobs = winner.logprobs, winner.sampling_logprobs
        request.segments = segments
        request.terms.stats.committed_tokens += len(winner.tokens)
        self.queue.finish(request, winner.finish_reason or "length")

    def preempt(self, request: Request) -> None:
        for leaf in self.leaves(request):
            super().preempt(leaf)

    def give_back(self, request: Request) -> int:
        return 0

    def close(self, request: Request) -> None:
        for leaf in dict.fromkeys(self.members.pop(request, ())):
            if leaf.finish_reason is None:
                super().close(leaf)
        super().close(request)

    def drop(self, request: Request) -> None:
        for leaf in self.leaves(request):
            super().drop(leaf)

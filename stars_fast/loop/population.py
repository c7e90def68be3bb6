"""Populations of answers that grow in step and are resampled: particle filters and trees of answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from stars_fast.loop.members import Members
from stars_fast.loop.request import Candidate, Drawn, Request
from stars_fast.methods.base import Population
from stars_fast.ops.philox import Stream, uniform_number
from stars_fast.outputs import CandidateTrace, Cause, SegmentTrace


class Populations(Members):
    """A segment in each heartbeat, after which the method says which answers go on."""

    def rows(self, request: Request) -> int:
        return _method(request).width

    def reserve(self, request: Request) -> int:
        return _method(request).slots(request.terms.config)

    def start(self, request: Request) -> None:
        if not self.members[request]:
            self.members[request] = [self.member(request, 0)]

    def asks(self, requests: Sequence[Request], rows: int) -> list[tuple[Request, int]]:
        return [
            (leaf, _method(request).children if leaf.segments else _method(request).width)
            for request in requests
            for leaf in self.leaves(request)
        ]

    def judge(self, requests: Sequence[Request], drawn: Drawn, rewards: torch.Tensor | None) -> None:
        for request in requests:
            pairs = [(leaf, candidate) for leaf in self.leaves(request) for candidate in drawn[leaf]]
            error = next((candidate.error for _, candidate in pairs if candidate.error is not None), None)
            finished = [member for member in self.members[request] if member.finish_reason is not None]
            values = [answer.reward - answer.weighed for answer in finished]
            values += [candidate.score - leaf.weighed for leaf, candidate in pairs]
            if error is None:
                try:
                    places = _method(request).select(values, self._uniforms(request))
                except Exception as raised:
                    error = Cause.of(raised, f"method={_method(request).name!r} raised ")
            if error is not None:
                self._trace(request, pairs)  # they were scored; those with an error say so
                self.roll_back([candidate for _, candidate in pairs])
                self.queue.fail(request, error)
            else:
                self._resample(request, finished, pairs, places)

    def _resample(
        self,
        request: Request,
        finished: Sequence[Request],
        drawn: Sequence[tuple[Request, Candidate]],
        places: Sequence[int] | None,
    ) -> None:
        """The members of the next round: those in these places among finished answers and this round's candidates."""
        method = _method(request)
        parents, first = self.leaves(request), len(request.looked_at)
        kept = range(len(finished) + len(drawn)) if places is None else places
        # First: what is committed before this fails would count, and be lost.
        self.roll_back([candidate for i, (_, candidate) in enumerate(drawn, len(finished)) if i not in kept])
        chosen, members = dict(enumerate(finished)), list[Request]()
        for slot, place in enumerate(kept):
            if place not in chosen:
                child = self._continued(request, slot, *drawn[place - len(finished)], attempts=len(drawn))
                child.traced_as = first + place - len(finished)
                chosen[place] = child
                members.append(child)
            else:  # a finished answer holds nothing that copies would need of their own
                one = chosen[place]
                members.append(one if one.finish_reason is not None else self._fork(request, slot, one))
        for parent in parents:
            self.trunks.give_back(parent.trunk, parent.tokens)
            self.queue.tell(parent, self.queue.reward.close, parent.response)
        self._trace(request, drawn)
        self.members[request], request.attempts = members, request.attempts + 1
        if places is not None and method.weighs_increments:
            for one in members:
                one.weighed = one.reward
        if not self.leaves(request):
            winner = members[method.answer([one.reward - one.weighed for one in members], self._uniforms(request)[0])]
            self.settle(request, winner, _with_candidates(winner, request.looked_at))

    def _trace(self, request: Request, drawn: Sequence[tuple[Request, Candidate]]) -> None:
        """Keep a round's candidates, and which of the round before each continues. Who wins is known at the end."""
        if request.terms.trace:
            request.looked_at += [
                one.traced("rejected")._replace(attempt=attempt, parent=parent.traced_as)
                for attempt, (parent, one) in enumerate(drawn, len(request.looked_at))
            ]

    def _uniforms(self, request: Request) -> list[float]:
        slots = range(_method(request).width)
        return [uniform_number(request.key, request.attempts, slot, Stream.RESAMPLE) for slot in slots]

    def _continued(self, request: Request, slot: int, parent: Request, candidate: Candidate, attempts: int) -> Request:
        """A member that has committed the candidate."""
        child = self._fork(request, slot, parent)
        child.attempts, candidate.completion.response = attempts, child.response
        self.commit_untested(child, candidate)
        return child

    def _fork(self, request: Request, slot: int, answer: Request) -> Request:
        """A member that goes on from an answer."""
        twin = self.member(request, slot)
        twin.segments = list(answer.segments)
        twin.logprobs, twin.sampling_logprobs = list(answer.logprobs), list(answer.sampling_logprobs)
        twin.reward, twin.weighed, twin.traced_as = answer.reward, answer.weighed, answer.traced_as
        twin.trunk = self.trunks.fork(answer.trunk)
        twin.response = self.forked(request, answer.response)
        return twin


def _with_candidates(winner: Request, traces: Sequence[CandidateTrace]) -> list[SegmentTrace]:
    """The winner's segments with the candidates of their rounds; the last has those of the rounds after it, too."""
    if not traces:
        return winner.segments
    traces, place = list(traces), winner.traced_as
    rounds: list[int] = []  # of each candidate
    for one in traces:
        rounds.append(0 if one.parent is None else rounds[one.parent] + 1)
    while place is not None:
        traces[place] = traces[place]._replace(verdict="accepted")
        place = traces[place].parent
    last = len(winner.segments) - 1
    return [
        segment._replace(candidates=[one for one, r in zip(traces, rounds, strict=True) if min(r, last) == index])
        for index, segment in enumerate(winner.segments)
    ]


def _method(request: Request) -> Population:
    return cast(Population, request.terms.method)

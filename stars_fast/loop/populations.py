"""Loops in which a request has several answers at once: whole answers on trial, and populations that are resampled."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from stars_fast.decode import Leaf
from stars_fast.loop.heartbeat import Generation
from stars_fast.methods.base import Population
from stars_fast.methods.stars import acceptance_probability
from stars_fast.ops.philox import Domain, Stream, philox_key, uniform
from stars_fast.outputs import SegmentTrace
from stars_fast.policy import Draw
from stars_fast.request import Candidate, Request
from stars_fast.rewards.base import Response

# Expected share of whole answers accepted, before any is seen.
_ACCEPTANCE = 0.3


class Members(Generation):
    """Each request stands for answers that are requests of their own. Their slots are set aside when it is admitted."""

    def drawers(self) -> list[Request]:
        return [leaf for request in self.running for leaf in request.leaves]

    def draw(self, drawers: Sequence[Request], shares: Sequence[int]) -> list[list[Draw]]:
        """In as many proposals as ``max_rows`` asks for."""
        groups: list[list[Draw]] = [[] for _ in drawers]
        for batch in _batches(shares, self.scheduler.max_rows):
            self.scheduler.packed = sum(count for _, _, count in batch)
            leaves = [self._part(drawers[i], first, count) for i, first, count in batch]
            for (i, _, _), draws in zip(batch, self.policy.propose(leaves, self.sampling), strict=True):
                groups[i] += draws
        return groups

    def _part(self, request: Request, first: int, count: int) -> Leaf:
        leaf = self._leaf(request, count)
        leaf.first_attempt += first
        return leaf

    def member(self, request: Request, slot: int) -> Request:
        """A new answer to the request's prompt, with random numbers of its own."""
        return Request(
            index=request.index,
            prompt_index=request.prompt_index,
            sample_index=request.sample_index,
            prompt=request.prompt,
            key=philox_key(request.key, 0, slot, domain=Domain.MEMBER),
            target=-math.inf,
            base=-math.inf,
            beta=1.0,
            response=Response(request.prompt.reward_prompt),
            processor=request.processor,
            stop=request.stop,
        )

    def settle(self, request: Request, winner: Request, segments: list[SegmentTrace]) -> None:
        """The winner's answer is the request's."""
        request.tokens, request.reward = winner.tokens, winner.reward
        request.logprobs, request.sampling_logprobs = winner.logprobs, winner.sampling_logprobs
        request.segments = segments
        self.stats.committed_tokens += len(winner.tokens)
        self.finish(request, winner.finish_reason or "length")

    def decided(self) -> list[Request]:
        """Requests that ended in this heartbeat; they no longer run."""
        over = [request for request in self.running if request.finish_reason is not None]
        self.drop_finished()
        return over


class Trials(Members):
    """Whole answers, unguided, until one is accepted: looked at in the order of their attempts, whoever ends first.

    A request's answers in the works are as many as ``candidates`` says, or as the slots hold. Which are drawn side by
    side never changes what is returned: every attempt has its own random numbers.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        config, scheduler, requests = self.config, self.scheduler, list(self.waiting)
        most = config.max_attempts
        if config.candidates != "auto":
            most = min(most, int(config.candidates))
        elif self.method.has_target:
            limits = [most] * len(requests)
            most = min(scheduler.shares([_ACCEPTANCE] * len(requests), limits, scheduler.max_rows))
        for request in requests:
            room = (scheduler.kv_cache_tokens - len(request.prompt.ids)) // config.max_new_tokens
            request.width = max(1, min(most, room, scheduler.max_rows))
            request.reserve = request.width * config.max_new_tokens

    def extend(self) -> None:
        for request in self.running:
            while len(request.members) < self.config.max_attempts and (
                not request.members or len(request.leaves) < request.width
            ):
                request.members.append(self.member(request, len(request.members)))
        super().extend()

    def shares(self, drawers: Sequence[Request]) -> list[int]:
        return [1] * len(drawers)

    def select_and_commit(self, candidates: Sequence[Sequence[Candidate]]) -> list[Request]:
        for member, (candidate,) in zip(self.drawers(), candidates, strict=True):
            if candidate.error is not None:
                self._roll_back([candidate], keep=None)
                self.fail(member, candidate.error)
            else:
                self._commit(member, candidate, accepted=True)
        for request in self.running:
            self._judge(request)
        return self.decided()

    def _judge(self, request: Request) -> None:
        """Look at the finished answers as far as no earlier one is in the works."""
        while request.finish_reason is None and request.attempts < len(request.members):
            answer = request.members[request.attempts]
            if answer.finish_reason is None:
                return
            if answer.error is not None:
                self.fail(request, answer.error)
                return
            request.attempts += 1
            best = request.members[request.best_attempt] if request.best_attempt >= 0 else None
            if best is None or answer.reward > best.reward:
                request.best_attempt = request.attempts - 1
            if self._accepts(request, answer):
                self._settle_at(request, answer, accepted=True)
            elif request.attempts == self.config.max_attempts:
                self._settle_at(request, request.members[request.best_attempt], accepted=False)

    def _accepts(self, request: Request, answer: Request) -> bool:
        key, attempt = torch.tensor(request.key, device="cpu"), torch.tensor(request.attempts - 1, device="cpu")
        drawn = uniform(key, torch.tensor(0, device="cpu"), attempt).item()
        return drawn < acceptance_probability(answer.reward, request.target, request.beta)

    def _settle_at(self, request: Request, answer: Request, accepted: bool) -> None:
        logprob, parts = sum(answer.logprobs), answer.segments[-1].parts
        trace = SegmentTrace(answer.tokens, answer.reward, request.target, request.attempts, accepted, logprob, parts)
        self.settle(request, answer, [trace])


class Populations(Members):
    """Answers that grow in step, a segment in each heartbeat, after which the method says which of them go on."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        assert isinstance(self.method, Population)
        self.population = self.method
        for request in self.waiting:
            request.width, request.reserve = self.population.width, self.population.slots(self.config)

    def extend(self) -> None:
        for request in self.running:
            if not request.members:
                request.members = [self.member(request, 0)]
        super().extend()

    def shares(self, drawers: Sequence[Request]) -> list[int]:
        return [self.population.children if leaf.segments else self.population.width for leaf in drawers]

    def select_and_commit(self, candidates: Sequence[Sequence[Candidate]]) -> list[Request]:
        groups = iter(candidates)
        for request in self.running:
            drawn = [(leaf, candidate) for leaf in request.leaves for candidate in next(groups)]
            error = next((candidate.error for _, candidate in drawn if candidate.error is not None), None)
            if error is not None:
                self._roll_back([candidate for _, candidate in drawn], keep=None)
                self.fail(request, error)
            else:
                self._resample(request, drawn)
        return self.decided()

    def _resample(self, request: Request, drawn: Sequence[tuple[Request, Candidate]]) -> None:
        """The members of the next round: whom the method selects from finished answers and this round's candidates."""
        parents = request.leaves
        finished = [member for member in request.members if member.finish_reason is not None]
        values = [answer.reward for answer in finished] + [candidate.score for _, candidate in drawn]
        places = self.population.select(values, self._uniforms(request))
        chosen: dict[int, Request] = dict(enumerate(finished))
        members = []
        for slot, place in enumerate(places):
            if place not in chosen:
                chosen[place] = self._continued(request, slot, *drawn[place - len(finished)], attempts=len(drawn))
                members.append(chosen[place])
            else:  # a finished answer holds nothing that copies would need of their own
                one = chosen[place]
                members.append(one if one.finish_reason is not None else self._fork(request, slot, one))
        unchosen = [candidate for i, (_, candidate) in enumerate(drawn, len(finished)) if i not in chosen]
        self._roll_back(unchosen, keep=None)
        for parent in parents:
            self.trunks.give_back(parent)
            self.reward.close(parent.response)
        request.members, request.attempts = members, request.attempts + 1
        if not request.leaves:
            winner = max(members, key=lambda answer: answer.reward)
            self.settle(request, winner, winner.segments)

    def _uniforms(self, request: Request) -> list[float]:
        slots = torch.arange(self.population.width, device="cpu")
        key, step = torch.tensor(request.key, device="cpu"), torch.tensor(request.attempts, device="cpu")
        uniforms: list[float] = uniform(key, step, slots, stream=Stream.RESAMPLE).tolist()
        return uniforms

    def _continued(self, request: Request, slot: int, parent: Request, candidate: Candidate, attempts: int) -> Request:
        """A member that has committed the candidate."""
        child = self._fork(request, slot, parent)
        child.attempts, candidate.completion.response = attempts, child.response
        self._commit(child, candidate, accepted=True)
        return child

    def _fork(self, request: Request, slot: int, answer: Request) -> Request:
        """A member that goes on from an answer."""
        twin = self.member(request, slot)
        twin.tokens, twin.segments = list(answer.tokens), list(answer.segments)
        twin.logprobs, twin.sampling_logprobs = list(answer.logprobs), list(answer.sampling_logprobs)
        twin.trunks = [self.trunks.fork(answer)]
        twin.response = self.reward.fork(answer.response)
        twin.response.tokens = twin.tokens
        return twin


def _batches(shares: Sequence[int], most: int) -> Iterator[list[tuple[int, int, int]]]:
    """Batches of (place, first, count) with at most ``most`` rows each, which together are all of the shares."""
    batch, room = [], most
    for place, share in enumerate(shares):
        first = 0
        while first < share:
            count = min(share - first, room)
            batch.append((place, first, count))
            first, room = first + count, room - count
            if not room:
                yield batch
                batch, room = [], most
    if batch:
        yield batch

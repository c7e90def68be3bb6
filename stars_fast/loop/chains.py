"""Chains over whole answers: each draws the end of its answer anew, step by step, and keeps the new one or the old."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch

from stars_fast.loop.members import Members
from stars_fast.loop.pilot import ACCEPTANCE
from stars_fast.loop.queue import Queue
from stars_fast.loop.request import Candidate, Drawn, Request, Tree, Trunk
from stars_fast.methods.metropolis import Ending, SuffixChain
from stars_fast.ops.philox import Stream, uniform_number
from stars_fast.outputs import CandidateTrace, Cause
from stars_fast.rewards.base import Reward


@dataclass(eq=False)
class Chain:
    """One of a request's chains. Its steps are numbered: 0 draws the first state."""

    place: int  # among the request's
    step: int = 0  # the next to be looked at
    state: Request | None = None  # the answer that was accepted last
    proposals: list[Request] = field(default_factory=list)  # of the steps from the next on, in order
    looked_at: list[CandidateTrace] = field(default_factory=list)  # where they are traced


class Chains(Members):
    """What a chain's next steps propose is drawn side by side, all from its state, and looked at in order.

    Each step has random numbers of its own. Once one is accepted, those behind it, at which nobody has looked, are
    thrown away and drawn from the new state with the same numbers: what is returned is what one proposal at a time
    gives. A redraw is a fork of the state's trunk, and of its response under the reward, at the cut.
    """

    def __init__(self, queue: Queue) -> None:
        super().__init__(queue)
        self._chains: dict[Request, list[Chain]] = {}
        self._lanes: dict[Request, int] = {}
        self._sides: dict[int, int] = {}  # by steps: what a chain is given side by side, as many as are here now

    def enter(self, requests: Sequence[Request]) -> None:
        self._sides.clear()
        for request in requests:
            self._chains[request] = [Chain(place) for place in range(_method(request).chains)]

    def rows(self, request: Request) -> int:
        return min(self._width(request), self.scheduler.max_rows)

    def _width(self, request: Request) -> int:
        """Proposals in the works: those of one chain after another where they are fewer than chains."""
        if request in self._lanes:
            return self._lanes[request]
        config, scheduler, method = request.terms.config, self.scheduler, _method(request)
        if config.candidates != "auto":
            most = min(method.steps, int(config.candidates))
        else:
            most = self._sides.get(method.steps) or self._side(method.steps)
        answers = scheduler.answers(request)  # that have room
        room = answers - method.chains if answers >= 2 * method.chains else answers // 2
        width = max(1, min(most * method.chains, room, scheduler.max_rows))
        return width - width % method.chains if width > method.chains else width

    def _side(self, steps: int) -> int:
        """Asked for once by all who come together: it takes the longer, the more there are."""
        together = sum(map(len, self._chains.values()))
        shares = self.scheduler.shares([ACCEPTANCE] * together, [steps] * together, self.scheduler.max_rows)
        self._sides[steps] = min(shares)
        return self._sides[steps]

    def reserve(self, request: Request) -> int:
        width = self._width(request)
        return (min(width, _method(request).chains) + width) * request.terms.config.max_new_tokens

    def leaves(self, request: Request) -> list[Request]:
        return [answer for chain in self._chains[request] for answer in chain.proposals if answer.finish_reason is None]

    def _answers(self, request: Request) -> Iterator[Request]:
        """All that may hold something."""
        for chain in self._chains.get(request, ()):
            yield from ([] if chain.state is None else [chain.state])
            yield from (answer for answer in chain.proposals if answer.error is None)

    # Drawing

    def _active(self, request: Request) -> list[Chain]:
        """The chains that go on now."""
        unfinished = [chain for chain in self._chains[request] if chain.step <= _method(request).steps]
        return unfinished[: self._width(request)]

    def start(self, request: Request) -> None:
        method = _method(request)
        width = self._lanes[request] = self._width(request)  # fixed from here on
        side = max(1, width // method.chains)
        for chain in self._active(request):
            if chain.state is None:
                chain.proposals = chain.proposals or [self.member(request, 0, chain.place)]
            elif self.trunks.ready(chain.state.trunk):
                while len(chain.proposals) < min(side, method.steps + 1 - chain.step):
                    chain.proposals.append(self._redraw(request, chain, chain.state))

    def due(self, request: Request) -> list[tuple[Tree, Trunk]]:
        """The states, too, where they had to give way: redraws begin in them."""
        due = super().due(request)
        states = [chain.state for chain in self._active(request) if chain.state is not None]
        behind = [one for state in states for one in self.trunks.due(state.trunk)]
        return [(tree, trunk) for tree, trunk in behind if not tree.ready(trunk)] + due

    def asks(self, requests: Sequence[Request], rows: int) -> list[tuple[Request, int]]:
        return [(leaf, 1) for request in requests for leaf in self.leaves(request)]

    def _redraw(self, request: Request, chain: Chain, state: Request) -> Request:
        """What the next step that has no proposal yet puts in the state's place: its first segments, so far."""
        step = chain.step + len(chain.proposals)
        cut, start = _cut(request, chain, step, state)
        answer = self.member(request, step, chain.place)
        answer.segments = state.segments[:cut]
        answer.logprobs, answer.sampling_logprobs = state.logprobs[:start], state.sampling_logprobs[:start]
        answer.trunk = self.trunks.cut(state.trunk, state.tokens[:start])
        try:
            answer.response = self.reward.fork_at(state.response, start)
        except Exception as error:
            self.reward.unsure = True
            self.queue.broken[request] = Cause.of(error, "the reward's fork_at raised ")
            answer.response = Reward.fork_at(self.reward, state.response, start)
        return answer

    def grow(self, answer: Request, chosen: Candidate) -> None:
        """No redraw begins behind the last segment: its slots are free again."""
        if chosen.completion.finished:
            self.trunks.release([chosen.draw])
            for trunk in (answer.trunk, *answer.trunk.beside):
                trunk.logits = None  # a view of those of all rows
        else:
            super().grow(answer, chosen)

    # Judging

    def judge(self, requests: Sequence[Request], drawn: Drawn, rewards: torch.Tensor | None) -> None:
        for request in requests:
            for chain in self._chains[request]:
                for step, answer in enumerate(chain.proposals, chain.step):
                    if answer.finish_reason is None:
                        (candidate,) = drawn[answer]
                        self._append(answer, candidate, 1 + _attempt(request, chain, step))
            self._look(request)

    def _append(self, answer: Request, candidate: Candidate, attempts: int) -> None:
        if candidate.error is not None:
            self.roll_back([candidate])
            self._let_go(answer)
            answer.error, answer.finish_reason = candidate.error, "error"
            return
        answer.attempts = attempts
        self.commit(answer, candidate, accepted=True)
        if candidate.completion.finished:
            answer.finish_reason = "stop" if candidate.ended else "length"

    def _look(self, request: Request) -> None:
        """Look at what is finished as far as no earlier step is in the works, and end where no step is left."""
        chains, steps = self._chains[request], _method(request).steps
        for chain in chains:
            while chain.proposals and chain.proposals[0].finish_reason is not None:
                error = self._decide(request, chain)
                if error is not None:
                    request.looked_at = self._traces(request)
                    self.queue.fail(request, error)
                    return
            if chain.step > steps and chain.state is not None:
                self.trunks.give_back(chain.state.trunk, _held(chain.state))
        if all(chain.step > steps for chain in chains):
            state = chains[int(uniform_number(request.key, 0, 0, Stream.CHOICE) * len(chains))].state
            assert state is not None
            first = state.segments[0]._replace(candidates=self._traces(request) or None)
            self.settle(request, state, [first, *state.segments[1:]])

    def _traces(self, request: Request) -> list[CandidateTrace]:
        return [trace for chain in self._chains[request] for trace in chain.looked_at]

    def _decide(self, request: Request, chain: Chain) -> str | None:
        """Whether the next step's answer becomes the state. Returns an error instead, where there is one."""
        answer, state, ratio = chain.proposals[0], chain.state, 0.0
        attempt = _attempt(request, chain, chain.step)
        if answer.error is not None:
            nothing = math.nan, math.nan, math.nan
            if request.terms.trace:
                chain.looked_at.append(CandidateTrace(attempt, answer.tokens, *nothing, "error", math.nan))
            return answer.error
        if state is not None:
            method, (_, start) = _method(request), _cut(request, chain, chain.step, state)
            try:
                ratio = method.log_ratio(_ending(answer, start), _ending(state, start), request.beta)
            except Exception as raised:
                return Cause.of(raised, f"method={method.name!r} raised ")
        threshold = math.log(uniform_number(request.key, chain.place, chain.step))
        accepted = threshold < ratio
        if request.terms.trace:
            seen = attempt, list(answer.tokens), answer.reward, ratio, threshold
            verdict, logprob = "accepted" if accepted else "rejected", sum(answer.logprobs)
            chain.looked_at.append(CandidateTrace(*seen, verdict, logprob, answer.segments[-1].parts))
        behind, chain.step = chain.proposals[1:], chain.step + 1
        dropped = ([] if state is None else [state, *behind]) if accepted else [answer]
        chain.state, chain.proposals = (answer, []) if accepted else (state, behind)
        for one in dropped:
            self._let_go(one)
        return None

    def _let_go(self, answer: Request) -> None:
        if answer.error is None:
            self.trunks.give_back(answer.trunk, _held(answer))
            self.queue.tell(answer, self.queue.reward.close, answer.response)

    # Giving way and ending

    def preempt(self, request: Request) -> None:
        for answer in self._answers(request):
            self.trunks.give_back(answer.trunk, _held(answer))
            self.reopen(answer)

    def close(self, request: Request) -> None:
        for answer in self._answers(request):
            self._let_go(answer)
        self._chains.pop(request, None)
        self._lanes.pop(request, None)
        super().close(request)

    def drop(self, request: Request) -> None:
        for answer in self._answers(request):
            answer.attempts = 0
            self.trunks.forget(answer.trunk, _held(answer))
            self.reopen(answer)


def _cut(request: Request, chain: Chain, step: int, state: Request) -> tuple[int, int]:
    """Before which segment of the state a step cuts, and before which token."""
    cut = int(uniform_number(request.key, chain.place, step, Stream.CUT) * len(state.segments))
    return cut, state.response.ends[cut - 1] if cut else 0


def _ending(answer: Request, start: int) -> Ending:
    behind = sum(answer.logprobs[start:]), sum(answer.sampling_logprobs[start:])
    return Ending(answer.reward, len(answer.segments), *behind)


def _attempt(request: Request, chain: Chain, step: int) -> int:
    """Index of what a step proposes among all that the request's chains propose."""
    return chain.place * (_method(request).steps + 1) + step


def _held(answer: Request) -> list[int]:
    """What of an answer is kept in the tree: where it is finished, all that a cut leaves of it at most."""
    if answer.finish_reason is None:
        return answer.tokens
    return answer.tokens[: answer.response.ends[-2]] if len(answer.segments) > 1 else []


def _method(request: Request) -> SuffixChain:
    return cast(SuffixChain, request.terms.method)

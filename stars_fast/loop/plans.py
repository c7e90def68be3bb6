"""Families of answers that begin with one plan: it is drawn by the first of them, and the others wait for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from transformers import PreTrainedTokenizerBase

from stars_fast.loop.one_answer import OneAnswer
from stars_fast.loop.queue import Queue
from stars_fast.loop.request import Drawn, Request, Tree, Trunk
from stars_fast.methods.plans import Plans
from stars_fast.rewards.base import Reward


@dataclass(eq=False)
class _Family:
    members: list[Request]  # in the order of their samples
    length: int | None = None  # tokens of the plan, once the others have it
    sharing: list[Request] = field(default_factory=list)  # whose slots of the plan are the same

    @property
    def leader(self) -> Request:
        """Who draws the plan: the first that did not fail."""
        return next(one for one in self.members if one.error is None)


class Planning(OneAnswer):
    """A family's first answer grows; when it has its plan, the others fork from it and grow beside it.

    Each has random numbers of its own. Those that wait take part in heartbeats without a row.
    """

    judges_on_device = False  # not everybody who runs has a candidate

    def __init__(self, queue: Queue) -> None:
        super().__init__(queue)
        self.families: dict[Request, _Family] = {}

    def enter(self, requests: Sequence[Request]) -> None:
        families: dict[tuple[int, int], _Family] = {}
        for request in requests:
            place = request.prompt_index, request.sample_index // _method(request).children
            self.families[request] = families.setdefault(place, _Family([]))
            self.families[request].members.append(request)

    def waits(self, request: Request) -> bool:
        """Whether another draws its plan."""
        family = self.families[request]
        return family.length is None and family.leader is not request

    def held(self, request: Request) -> int:
        return super().held(request) - self._held_by_others(request)

    def peak(self, request: Request) -> int:
        return super().peak(request) - self._held_by_others(request)

    def _held_by_others(self, request: Request) -> int:
        family = self.families[request]
        return family.length or 0 if request in family.sharing[1:] else 0

    def due(self, request: Request) -> list[tuple[Tree, Trunk]]:
        return [] if self.waits(request) else super().due(request)

    def asks(self, requests: Sequence[Request], rows: int) -> list[tuple[Request, int]]:
        for request in requests:  # all that they have committed is in the tree now
            if self.families[request].length is None and not self.waits(request) and self._has_plan(request):
                self._hand_on(request, set(requests))
        return [(request, 1) for request in requests if not self.waits(request)]

    def _has_plan(self, request: Request) -> bool:
        method, tokens = _method(request), request.tokens
        return len(tokens) >= method.longest or self._ends_plan(request, tokens)

    def _ends_plan(self, request: Request, tokens: Sequence[int]) -> bool:
        delimiter, tokenizer = _method(request).delimiter, self.queue.tokenizer
        if delimiter is None:
            return False
        assert isinstance(tokenizer, PreTrainedTokenizerBase)
        return delimiter in tokenizer.decode(list(tokens))

    def _step(self, answer: Request, tokens: list[int]) -> int:
        """Tokens up to and including the plan's last; all of them where it does not end, or has ended before."""
        if self.families[answer].length is not None:
            return len(tokens)
        most = min(len(tokens), _method(answer).longest - len(answer.tokens))
        if not self._ends_plan(answer, answer.tokens + tokens[:most]):
            return most
        return next(n for n in range(1, most + 1) if self._ends_plan(answer, answer.tokens + tokens[:n]))

    def _hand_on(self, leader: Request, running: set[Request]) -> None:
        """The others go on from the leader's plan, or end where it has ended with it."""
        family = self.families[leader]
        family.length = len(leader.tokens)
        others = [one for one in family.members if one is not leader and one.finish_reason is None]
        for one in others:
            one.segments, one.reward = list(leader.segments), leader.reward
            one.logprobs, one.sampling_logprobs = list(leader.logprobs), list(leader.sampling_logprobs)
            if one in running:
                one.trunk, one.response = self.trunks.fork(leader.trunk), self.forked(one, leader.response)
            else:  # it encodes the plan anew when there is room for it
                one.trunk, one.response = Trunk.below(one.prompt), Reward.fork(self.reward, leader.response)
                self.trunks.forget(one.trunk, leader.tokens)
        family.sharing = [leader, *(one for one in others if one in running)]

    def judge(self, requests: Sequence[Request], drawn: Drawn, rewards: torch.Tensor | None) -> None:
        super().judge([request for request in requests if request in drawn], drawn, rewards)

    def preempt(self, request: Request) -> None:
        self._shares_no_longer(request)
        super().preempt(request)

    def drop(self, request: Request) -> None:
        self._shares_no_longer(request)
        super().drop(request)

    def _shares_no_longer(self, request: Request) -> None:
        if request in (sharing := self.families[request].sharing):
            sharing.remove(request)

    def close(self, request: Request) -> None:
        self._shares_no_longer(request)
        super().close(request)
        family = self.families[request]
        if request.error is None and family.length is None and family.leader is request:
            self._hand_on(request, set())
            others = [one for one in family.members if one.finish_reason is None]
            self.queue.leave(others)
            for one in others:
                self.queue.finish(one, request.finish_reason or "length")
        if all(one.finish_reason is not None for one in family.members):
            for one in family.members:
                self.families.pop(one, None)


def _method(request: Request) -> Plans:
    return cast(Plans, request.terms.method)

"""Whole answers on trial: best-of-n and rejection sampling."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from stars_fast.loop.members import Members
from stars_fast.loop.pilot import ACCEPTANCE
from stars_fast.loop.queue import Queue
from stars_fast.loop.request import Drawn, Request
from stars_fast.methods.stars import acceptance_probability
from stars_fast.ops.philox import uniform_number
from stars_fast.outputs import CandidateTrace, SegmentTrace


class Trials(Members):
    """Whole answers, unguided, until one is accepted: looked at in the order of their attempts, whoever ends first.

    A request's answers in the works are as many as ``candidates`` says, or as the slots hold. Which are drawn side by
    side never changes what is returned: every attempt has its own random numbers.
    """

    def __init__(self, queue: Queue) -> None:
        super().__init__(queue)
        self._widths: dict[Request, int] = {}

    def rows(self, request: Request) -> int:
        if request not in self._widths:
            return self._width(request)
        return min(self._widths[request], self.scheduler.max_rows)

    def _width(self, request: Request) -> int:
        """Answers in the works, as many as its like now leave it."""
        config, scheduler = request.terms.config, self.scheduler
        most = config.max_attempts
        if config.candidates != "auto":
            most = min(most, int(config.candidates))
        elif request.terms.method.has_target:
            together = len(self.members)
            most = min(scheduler.shares([ACCEPTANCE] * together, [most] * together, scheduler.max_rows))
        return max(1, min(most, scheduler.answers(request), scheduler.max_rows))

    def reserve(self, request: Request) -> int:
        return self.rows(request) * request.terms.config.max_new_tokens

    def start(self, request: Request) -> None:
        members = self.members[request]
        self._widths.setdefault(request, self._width(request))  # fixed from here on
        while len(members) < request.terms.config.max_attempts and (
            not members or len(self.leaves(request)) < self.rows(request)
        ):
            members.append(self.member(request, len(members)))

    def asks(self, requests: Sequence[Request], rows: int) -> list[tuple[Request, int]]:
        return [(leaf, 1) for request in requests for leaf in self.leaves(request)]

    def judge(self, requests: Sequence[Request], drawn: Drawn, rewards: torch.Tensor | None) -> None:
        for request in requests:
            for member in self.leaves(request):
                (candidate,) = drawn[member]
                if candidate.error is not None:
                    self.roll_back([candidate])
                    self._end(member, candidate.error)
                else:
                    self.commit_untested(member, candidate)
            self._look(request)

    def _end(self, member: Request, error: str) -> None:
        member.error, member.finish_reason, member.reward = error, "error", float("nan")
        self.trunks.give_back(member.trunk, member.tokens)
        self.queue.tell(member, self.queue.reward.close, member.response)

    def _look(self, request: Request) -> None:
        """Look at the finished answers as far as no earlier one is in the works."""
        members, most = self.members[request], request.terms.config.max_attempts
        while request.finish_reason is None and request.attempts < len(members):
            answer = members[request.attempts]
            if answer.finish_reason is None:
                return
            if answer.error is not None:
                request.looked_at = self._traces(request)
                self.queue.fail(request, answer.error)
                return
            request.attempts += 1
            best = members[request.best_attempt] if request.best_attempt >= 0 else None
            if best is None or answer.reward > best.reward:
                request.best_attempt = request.attempts - 1
            if self._accepts(request, answer):
                self._settle_at(request, answer, accepted=True)
            elif request.attempts == most:
                self._settle_at(request, members[request.best_attempt], accepted=False)

    def _accepts(self, request: Request, answer: Request) -> bool:
        number = uniform_number(request.key, 0, request.attempts - 1)
        return number < acceptance_probability(answer.reward, request.target, request.beta)

    def _settle_at(self, request: Request, answer: Request, accepted: bool) -> None:
        logprob, parts = sum(answer.logprobs), answer.segments[-1].parts
        trace = (answer.tokens, answer.reward, request.target, request.attempts, accepted, logprob, parts)
        said = "accepted" if accepted else "fallback"
        self.settle(request, answer, [SegmentTrace(*trace, self._traces(request, answer, said) or None)])

    def _traces(self, request: Request, winner: Request | None = None, said: str = "") -> list[CandidateTrace]:
        """All answers so far, where they are traced; those that nobody looked at may be unfinished."""
        traces = []
        for attempt, one in enumerate(self.members[request] if request.terms.trace else ()):
            verdict = "rejected" if attempt < request.attempts else "unseen"
            verdict = said if one is winner else verdict if one.error is None else "error"
            parts = one.segments[-1].parts if one.segments else None
            values = one.reward, one.reward, request.target
            traces.append(CandidateTrace(attempt, one.tokens, *values, verdict, sum(one.logprobs), parts))
        return traces

    def close(self, request: Request) -> None:
        self._widths.pop(request, None)
        super().close(request)

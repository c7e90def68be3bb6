"""Candidates that are not drawn: the policy's likely next tokens (ARGS, MARA)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from stars_fast.loop.memory import TooLarge
from stars_fast.loop.one_answer import OneAnswer, after
from stars_fast.loop.queue import Queue
from stars_fast.loop.request import Drawn, Request
from stars_fast.methods.base import Enumerated
from stars_fast.ops.philox import choice_noise
from stars_fast.policy.leaf import Draw, ProcessorError
from stars_fast.tree.lack import is_lack_of_memory


class Enumeration(OneAnswer):
    """Attempt i of a segment is the i-th of the method's tokens."""

    judges_on_device = False

    def __init__(self, queue: Queue) -> None:
        super().__init__(queue)
        self._tokens: dict[Request, list[int]] = {}  # of the position that is being decided

    def attempts_there_are(self, request: Request) -> int:
        return min(len(self._tokens[request]), request.terms.config.max_attempts)

    def asks(self, requests: Sequence[Request], rows: int) -> list[tuple[Request, int]]:
        return []

    def draw(self, requests: Sequence[Request], rows: int) -> Drawn:
        looked_at, drawn = list[torch.Tensor](), Drawn()
        for request in requests:
            try:
                logits = self._logits(request)
                if request not in self._tokens:
                    self._tokens[request] = self._allowed(request, logits)
                looked_at.append(logits)
            except Exception as error:
                if is_lack_of_memory(error):
                    raise TooLarge(0, len(requests), f"{type(error).__name__}: {error}") from error
                failed = Draw(-1, [], [], [], False, ProcessorError.told(error))
                drawn[request] = [self.candidate(request, failed)]
                # Behind those that were looked at before, so that the selection looks at it, too.
                self._tokens[request] = [*self._tokens.get(request, [])[: request.attempts], -1]
        requests = [request for request in requests if request not in drawn]
        if not requests:
            return drawn
        shares = [share for _, share in super().asks(requests, rows)]
        tokens = [
            self._tokens[request][request.attempts : request.attempts + share]
            for request, share in zip(requests, shares, strict=True)
        ]
        leaves = [request.trunk.leaf for request in requests]
        logits = torch.stack([request.trunk.logits for request in requests if request.trunk.logits is not None])
        eos = [request.terms.sampling.eos_token_ids for request in requests]
        groups = self.trunks.policy.fork_tokens(leaves, tokens, eos, logits, torch.stack(looked_at))
        for request, draws in zip(requests, groups, strict=True):
            drawn[request] = [self.candidate(request, draw) for draw in draws]
        self._name_noise(drawn)
        return drawn

    def _name_noise(self, drawn: Drawn) -> None:
        """Each candidate's noise, for methods that draw among them."""
        named = [
            (candidate, (request.key, len(request.segments), request.attempts + i))
            for request, group in drawn.items()
            for i, candidate in enumerate(group)
        ]
        if named:
            noise = choice_noise(*torch.tensor([name for _, name in named], device="cpu").unbind(1))
            for (candidate, _), value in zip(named, noise.tolist(), strict=True):
                candidate.gumbel = value

    def _logits(self, request: Request) -> torch.Tensor:
        """What the method looks at ``[V]``, after the request's logits processor, without what is never drawn."""
        logits = request.trunk.logits
        assert logits is not None
        processor = after(request)
        processed = logits.float() if processor is None else processor([], logits.float()[None])[0]
        return self.trunks.policy.allowed(processed)

    def _allowed(self, request: Request, logits: torch.Tensor) -> list[int]:
        """The method's tokens, without those that the request's logits processor or the policy forbids."""
        tokens = cast(Enumerated, request.terms.method).tokens(logits)
        if request.processor is None and self.trunks.policy.barred is None:
            return tokens
        allowed = (logits[tokens] != -torch.inf).tolist()
        # Where it forbids everything one is kept, whose log-probability then says so.
        return [token for token, may in zip(tokens, allowed, strict=True) if may] or tokens[:1]

    def looks_in_order(self, answer: Request) -> bool:
        return False  # methods may compare their values

    def judge(self, requests: Sequence[Request], drawn: Drawn, rewards: torch.Tensor | None) -> None:
        super().judge(requests, drawn, rewards)
        for request in requests:
            if not request.attempts:  # the next position is decided
                self._tokens.pop(request, None)

    def close(self, request: Request) -> None:
        self._tokens.pop(request, None)
        super().close(request)

    def drop(self, request: Request) -> None:
        self._tokens.pop(request, None)
        super().drop(request)

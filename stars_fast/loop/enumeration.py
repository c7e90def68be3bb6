"""The loop whose candidates are the policy's likely next tokens, which are not drawn."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from stars_fast.loop.heartbeat import Generation, after
from stars_fast.methods.base import Enumerated
from stars_fast.ops.philox import choice_noise
from stars_fast.policy import Draw
from stars_fast.request import Candidate, Request


class Enumeration(Generation):
    """Attempt i of a segment is the i-th of the method's tokens."""

    def shares(self, drawers: Sequence[Request]) -> list[int]:
        for request in drawers:
            request.limit = request.limit or len(self._tokens(request, self._logits(request)))
        return super().shares(drawers)

    def _logits(self, request: Request) -> torch.Tensor:
        """What the method looks at ``[V]``, after the request's logits processor."""
        logits = self.trunks.of(request).logits
        assert logits is not None
        processor = after(request)
        return logits.float() if processor is None else processor([], logits.float()[None])[0]

    def _tokens(self, request: Request, logits: torch.Tensor) -> list[int]:
        """The method's tokens, without those that the request's logits processor forbids."""
        assert isinstance(self.method, Enumerated)
        tokens = self.method.tokens(logits)
        if request.processor is None:
            return tokens
        allowed = (logits[tokens] != -torch.inf).tolist()
        # Where it forbids everything one is kept, whose log-probability then says so.
        return [token for token, may in zip(tokens, allowed, strict=True) if may] or tokens[:1]

    def draw(self, drawers: Sequence[Request], shares: Sequence[int]) -> list[list[Draw]]:
        trunks = [self.trunks.of(request) for request in drawers]
        looked_at = [self._logits(request) for request in drawers]
        tokens = [
            self._tokens(request, logits)[request.attempts : request.attempts + share]
            for request, logits, share in zip(drawers, looked_at, shares, strict=True)
        ]
        logits = torch.stack([trunk.logits for trunk in trunks if trunk.logits is not None])
        eos = self.sampling.eos_token_ids
        return self.policy.fork_tokens([trunk.leaf for trunk in trunks], tokens, eos, logits, torch.stack(looked_at))

    def score(self, candidates: Sequence[Sequence[Candidate]]) -> None:
        named = [
            (candidate, (request.key, len(request.segments), request.attempts + i))
            for request, group in zip(self.running, candidates, strict=False)
            for i, candidate in enumerate(group)
        ]
        if named:
            noise = choice_noise(*torch.tensor([name for _, name in named], device="cpu").unbind(1))
            for (candidate, _), gumbel in zip(named, noise.tolist(), strict=True):
                candidate.gumbel = gumbel
        super().score(candidates)

"""The loop whose candidates are the policy's likely next tokens, which are not drawn."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from stars_fast.heartbeat import Generation, after
from stars_fast.methods.base import Enumerated
from stars_fast.ops.philox import acceptance_uniform
from stars_fast.policy import Draw
from stars_fast.request import Candidate, Request


class Enumeration(Generation):
    """Attempt i of a segment is the i-th of the method's tokens."""

    def shares(self, drawers: Sequence[Request]) -> list[int]:
        for request in drawers:
            request.limit = request.limit or len(self._tokens(request))
        return super().shares(drawers)

    def _logits(self, request: Request) -> torch.Tensor:
        """What the method looks at ``[V]``, after the request's logits processor."""
        logits = self.trunks.of(request).logits
        assert logits is not None
        processor = after(request)
        return logits.float() if processor is None else processor([], logits.float()[None])[0]

    def _tokens(self, request: Request) -> list[int]:
        assert isinstance(self.method, Enumerated)
        return self.method.tokens(self._logits(request))

    def draw(self, drawers: Sequence[Request], shares: Sequence[int]) -> list[list[Draw]]:
        groups = []
        for request, share in zip(drawers, shares, strict=True):
            tokens = self._tokens(request)[request.attempts : request.attempts + share]
            trunk = self.trunks.of(request)
            assert trunk.logits is not None
            groups.append(self.policy.fork_tokens(trunk.leaf, tokens, self.sampling, trunk.logits))
        return groups

    def score(self, candidates: Sequence[Sequence[Candidate]]) -> None:
        for request, group in zip(self.running, candidates, strict=False):
            attempts = torch.arange(request.attempts, request.attempts + len(group))
            uniforms = acceptance_uniform(torch.tensor(request.key), torch.tensor(len(request.segments)), attempts)
            for candidate, noise in zip(group, (-(-uniforms.log()).log()).tolist(), strict=True):
                candidate.gumbel = noise
        super().score(candidates)

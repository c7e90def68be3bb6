"""What the requests of a call hold of one policy's tree: prompts, and the leaves their answers have grown to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from stars_fast.loop.request import PromptNode, Request, Trunk
from stars_fast.loop.scheduler import Scheduler
from stars_fast.policy.policy import Policy


class Trunks:
    """Encodes what is not in the tree yet, and knows which prompts are.

    Parameters
    ----------
    policy : Policy
        Begun by the caller.
    scheduler : Scheduler
        Says how many tokens a forward pass may take.
    place : int
        Which of a request's trunks these are.
    """

    def __init__(self, policy: Policy, scheduler: Scheduler, place: int = 0) -> None:
        self.policy, self.scheduler, self.place = policy, scheduler, place
        self._prompts: set[PromptNode] = set()  # in the tree

    def of(self, request: Request) -> Trunk:
        """The request's trunk in this tree."""
        return request.trunks[self.place]

    def extend(self, requests: Sequence[Request]) -> None:
        """Encode what is not in the tree: prompts, last tokens of segments just committed, all of who was preempted."""
        self.encode(requests)
        for trunk in map(self.of, requests):
            self._join_prompt(trunk)

    def encode(self, requests: Sequence[Request], most: int | None = None) -> int:
        """Encode at most so many tokens of what is not in the tree, the first requests' first. Returns how many."""
        trunks, count = [self.of(request) for request in requests], 0
        while most is None or count < most:
            behind: dict[PromptNode | Trunk, list[int]] = {}
            for trunk in trunks:
                prompt = trunk.prompt
                if prompt.logits is None:
                    behind[prompt] = prompt.ids[prompt.encoded :]
                elif trunk.pending:
                    self._join_prompt(trunk)
                    behind[trunk] = trunk.pending
            if not behind:
                break
            count += self._encode(behind, None if most is None else most - count)
        return count

    def _join_prompt(self, trunk: Trunk) -> None:
        if trunk.leaf < 0:
            self.policy.tree.retain(trunk.prompt.node)
            trunk.leaf, trunk.logits = trunk.prompt.node, trunk.prompt.logits

    def _encode(self, behind: dict[PromptNode | Trunk, list[int]], most: int | None) -> int:
        """The first tokens of these runs, at most so many. Returns how many."""
        pieces: dict[PromptNode | Trunk, list[int]] = {}
        count = 0
        for holder, run in behind.items():
            piece = run if most is None else run[: most - count]
            if piece:
                pieces[holder] = piece
                count += len(piece)
        limit = self.scheduler.prefill_tokens
        self.scheduler.packed = min(count, limit)
        leaves = [holder.node if isinstance(holder, PromptNode) else holder.leaf for holder in pieces]
        nodes, logits = self.policy.prefill(leaves, list(pieces.values()), limit)
        for (holder, piece), old, node, row in zip(pieces.items(), leaves, nodes, logits, strict=True):
            if old >= 0:
                self.policy.tree.release(old)
            if isinstance(holder, PromptNode):
                holder.node, holder.encoded = node, holder.encoded + len(piece)
                holder.logits = row if holder.encoded == len(holder.ids) else None
                self._prompts.add(holder)
            else:
                holder.leaf, holder.pending = node, holder.pending[len(piece) :]
                holder.logits = None if holder.pending else row
        return count

    def ready(self, request: Request) -> bool:
        """Whether all that the request has is in the tree."""
        trunk = self.of(request)
        return trunk.prompt.logits is not None and not trunk.pending

    def append(self, request: Request, tokens: Sequence[int], node: int, logits: torch.Tensor | None = None) -> None:
        """The request goes on with ``tokens``.

        ``node`` holds all but the last; all of them where ``logits`` are those that follow. It is -1 where none is in
        this tree.
        """
        trunk = self.of(request)
        if node >= 0:
            self._release(trunk)
            trunk.leaf, trunk.pending = node, [] if logits is not None else list(tokens[-1:])
        else:
            trunk.pending = [*trunk.pending, *tokens]
        trunk.logits = logits if node >= 0 else None

    def advance(self, request: Request, node: int) -> None:
        """``node`` holds all that is pending but the last token."""
        trunk = self.of(request)
        self._release(trunk)
        trunk.leaf, trunk.pending = node, trunk.pending[-1:]

    def fork(self, request: Request) -> Trunk:
        """Another trunk that goes on from the request's."""
        trunk = self.of(request)
        if trunk.leaf >= 0:
            self.policy.tree.retain(trunk.leaf)
        return Trunk(trunk.prompt, trunk.leaf, trunk.logits, list(trunk.pending))

    def give_back(self, request: Request) -> None:
        """Release the request's slots. All that it has is to be encoded again if it goes on."""
        trunk = self.of(request)
        self._release(trunk)
        trunk.leaf, trunk.logits, trunk.pending = -1, None, list(request.tokens)

    def _release(self, trunk: Trunk) -> None:
        if trunk.leaf >= 0:
            self.policy.tree.release(trunk.leaf)

    def keep_prompts(self, requests: Iterable[Request]) -> None:
        """Release prompts that none of these requests has."""
        for prompt in self._prompts - {self.of(request).prompt for request in requests}:
            self.policy.tree.release(prompt.node)
            prompt.node, prompt.encoded, prompt.logits = -1, 0, None
            self._prompts.remove(prompt)

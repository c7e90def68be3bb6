"""What the requests of a call hold of one policy's tree: prompts, and the leaves their answers have grown to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from stars_fast.policy import Policy
from stars_fast.request import PromptNode, Request, Trunk
from stars_fast.scheduler import Scheduler


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
        trunks = [self.of(request) for request in requests]
        while True:
            for trunk in trunks:
                if trunk.leaf < 0 and trunk.prompt.node >= 0:
                    self.policy.tree.retain(trunk.prompt.node)
                    trunk.leaf, trunk.logits = trunk.prompt.node, trunk.prompt.logits
            prompts = [prompt for prompt in dict.fromkeys(trunk.prompt for trunk in trunks) if prompt.node < 0]
            behind = [trunk for trunk in trunks if trunk.leaf >= 0 and trunk.pending]
            if not prompts and not behind:
                return
            self._encode(prompts, behind)

    def _encode(self, prompts: Sequence[PromptNode], behind: Sequence[Trunk]) -> None:
        """Encode prompts, and what requests have committed since their leaf."""
        leaves = [-1] * len(prompts) + [trunk.leaf for trunk in behind]
        nodes, logits = self._prefill(leaves, [p.ids for p in prompts] + [trunk.pending for trunk in behind])
        for prompt, node, row in zip(prompts, nodes, logits, strict=False):
            prompt.node, prompt.logits = node, row
        self._prompts.update(prompts)
        for trunk, node, row in zip(behind, nodes[len(prompts) :], logits[len(prompts) :], strict=True):
            self.policy.tree.release(trunk.leaf)
            trunk.leaf, trunk.logits, trunk.pending = node, row, []

    def _prefill(self, leaves: Sequence[int], runs: Sequence[list[int]]) -> tuple[list[int], list[torch.Tensor]]:
        """:meth:`Policy.prefill` in as many passes as the scheduler's limit asks for: one, unless memory ran out."""
        nodes, logits = list(leaves), [torch.empty(0)] * len(leaves)
        begun, done = [False] * len(runs), [0] * len(runs)
        limit = self.scheduler.prefill_tokens
        while True:
            pieces: dict[int, list[int]] = {}
            packed = 0
            for i, run in enumerate(runs):
                if done[i] < len(run) and packed < limit:
                    pieces[i] = run[done[i] : done[i] + limit - packed]
                    packed += len(pieces[i])
            if not pieces:
                return nodes, logits
            self.scheduler.packed = packed
            new, rows = self.policy.prefill([nodes[i] for i in pieces], list(pieces.values()))
            for (i, piece), node, row in zip(pieces.items(), new, rows, strict=True):
                if begun[i]:
                    self.policy.tree.release(nodes[i])
                nodes[i], logits[i], begun[i] = node, row, True
                done[i] += len(piece)

    def append(self, request: Request, tokens: Sequence[int], node: int) -> None:
        """The request goes on with ``tokens``: ``node`` holds all but the last, or -1 where none is in this tree."""
        trunk = self.of(request)
        if node >= 0:
            self._release(trunk)
            trunk.leaf, trunk.pending = node, list(tokens[-1:])
        else:
            trunk.pending = [*trunk.pending, *tokens]
        trunk.logits = None

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
            prompt.node, prompt.logits = -1, None
            self._prompts.remove(prompt)

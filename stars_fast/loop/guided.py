"""Answers that several models write together: the policy, and guides whose logits are mixed with its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch

from stars_fast.loop.request import PromptNode, Tree, Trunk
from stars_fast.loop.scheduler import Scheduler
from stars_fast.loop.trunks import Trunks
from stars_fast.policy.leaf import Draw, Leaf
from stars_fast.policy.policy import Policy
from stars_fast.tree.attention import plugged


class SecondTree(Trunks):
    """What requests hold of the tree of a model beside the policy, a draft model or a guide.

    It is allocated here, as large as the policy's, and its model plugged in until :meth:`leave`.

    Parameters
    ----------
    policy : Policy
        That model.
    scheduler : Scheduler
    longest, segment_length : int
        Tokens of a trunk and of a segment, at most.
    """

    def __init__(self, policy: Policy, scheduler: Scheduler, longest: int, segment_length: int) -> None:
        super().__init__(policy, scheduler)
        self._plugged = ExitStack()
        policy.begin(scheduler.kv_cache_tokens, longest, segment_length)
        self._plugged.enter_context(plugged(policy.model))

    def leave(self) -> None:
        """Nobody uses it any more."""
        self.clear()
        self._plugged.close()


class GuidedTrunks:
    """The policy's trunks, and beside each the same answer in the trees of its guides, in lockstep.

    Strategies that draw from the mix ask for what they ask of :class:`stars_fast.loop.trunks.Trunks`, and need not know
    of guides. It is no tree: what is encoded, kept and cleared is each guide's own.

    Parameters
    ----------
    own : Trunks
        Of the policy's tree, in which other requests have theirs.
    guides : sequence of Trunks
        ``own`` where a guide is the policy itself, under another prompt.
    """

    def __init__(self, own: Trunks, guides: Sequence[Trunks]) -> None:
        self.own, self.guides, self.policy = own, guides, own.policy

    def _each(self, trunk: Trunk) -> Iterator[tuple[Trunks, Trunk]]:
        return zip((self.own, *self.guides), (trunk, *trunk.beside), strict=True)

    def due(self, trunk: Trunk) -> list[tuple[Tree, Trunk]]:
        return list(self._each(trunk))

    def beside(self, prompt: PromptNode) -> list[tuple[Tree, PromptNode]]:
        return list(zip(self.guides, prompt.beside, strict=True))

    def propose(self, leaves: Sequence[Leaf]) -> list[list[Draw]]:
        return self.policy.propose(leaves, [guide.policy for guide in self.guides])

    def ready(self, trunk: Trunk) -> bool:
        return all(tree.ready(one) for tree, one in self._each(trunk))

    def extend(self, trunks: Sequence[Trunk]) -> None:
        wanted: dict[Trunks, list[Trunk]] = {}
        for tree, one in (pair for trunk in trunks for pair in self._each(trunk)):
            wanted.setdefault(tree, []).append(one)
        for tree, some in wanted.items():
            tree.extend(some)

    def append(self, trunk: Trunk, tokens: Sequence[int], node: int, logits: torch.Tensor | None = None) -> None:
        """Guides are yet to read the tokens."""
        self.own.append(trunk, tokens, node, logits)
        for guide, one in zip(self.guides, trunk.beside, strict=True):
            guide.append(one, tokens, -1)

    def grow(self, trunk: Trunk, draw: Draw) -> None:
        self.own.grow(trunk, draw)
        nodes = draw.beside or [-1] * len(self.guides)  # given up for room
        for guide, one, node in zip(self.guides, trunk.beside, nodes, strict=True):
            guide.append(one, draw.tokens, node)

    def trim(self, trunk: Trunk, draw: Draw) -> None:
        self.own.trim(trunk, draw)
        draw.beside = [
            guide.policy.trimmed(one.leaf, node, len(draw.tokens))
            for guide, one, node in zip(self.guides, trunk.beside, draw.beside, strict=True)
        ]

    def release(self, draws: Sequence[Draw]) -> None:
        self.own.release(draws)
        held = [draw for draw in draws if draw.beside]
        for place, guide in enumerate(self.guides):
            guide.policy.tree.release_all([draw.beside[place] for draw in held])

    def fork(self, trunk: Trunk) -> Trunk:
        first, *beside = [tree.fork(one) for tree, one in self._each(trunk)]
        return replace(first, beside=beside)

    def cut(self, trunk: Trunk, tokens: Sequence[int]) -> Trunk:
        first, *beside = [tree.cut(one, tokens) for tree, one in self._each(trunk)]
        return replace(first, beside=beside)

    def give_back(self, trunk: Trunk, tokens: Sequence[int]) -> None:
        for tree, one in self._each(trunk):
            tree.give_back(one, tokens)

    def forget(self, trunk: Trunk, tokens: Sequence[int]) -> None:
        for tree, one in self._each(trunk):
            tree.forget(one, tokens)

"""What requests hold of one policy's tree: prompts, and the leaves their answers have grown to."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from stars_fast.loop.memory import TooLarge, passing
from stars_fast.loop.request import PromptNode, Tree, Trunk
from stars_fast.loop.scheduler import Scheduler
from stars_fast.outputs import Cause
from stars_fast.policy.leaf import Draw, Leaf
from stars_fast.policy.policy import Policy
from stars_fast.text.media import text_inputs
from stars_fast.tree.prefixes import first_of_each


class Trunks:
    """Encodes what is not in the tree yet, and knows which prompts are.

    Parameters
    ----------
    policy : Policy
        Begun by the caller.
    scheduler : Scheduler
        Says how many tokens a forward pass may take.
    """

    def __init__(self, policy: Policy, scheduler: Scheduler) -> None:
        self.policy, self.scheduler = policy, scheduler
        self._prompts: set[PromptNode] = set()  # in the tree

    def due(self, trunk: Trunk) -> list[tuple[Tree, Trunk]]:
        """What is to be in which tree before the trunk's answer goes on."""
        return [(self, trunk)]

    def beside(self, prompt: PromptNode) -> list[tuple[Tree, PromptNode]]:
        """What stands in which tree for guides."""
        return []

    def propose(self, leaves: Sequence[Leaf]) -> list[list[Draw]]:
        """:meth:`stars_fast.policy.policy.Policy.propose`."""
        return self.policy.propose(leaves)

    def extend(self, trunks: Sequence[Trunk]) -> None:
        """Encode what is not in the tree: prompts, last tokens of segments just committed, all of who was preempted.

        Raises
        ------
        TooLarge
            Where slots or memory lack.
        """
        self.encode(trunks)
        for trunk in trunks:
            if trunk.prompt.error is None:
                self._join_prompt(trunk)

    def encode(self, trunks: Sequence[Trunk], most: int | None = None) -> int:
        """Encode at most so many tokens of what is not in the tree, the first ones' first. Returns how many.

        What is read whole, as prompts with pictures are, may be more. Where the model refuses it, the prompt's
        ``error`` says why.
        """
        count = 0
        while most is None or count < most:
            prompts = dict.fromkeys(trunk.prompt for trunk in trunks)
            missing = [prompt for prompt in prompts if prompt.logits is None and prompt.error is None]
            if missing and self._is_whole(missing[0]):
                count += self._read_whole(missing)
                continue
            behind: dict[PromptNode | Trunk, list[int]] = {
                prompt: prompt.ids[prompt.encoded :] for prompt in self._fresh(missing)
            }
            for trunk in trunks:
                if trunk.prompt.logits is not None and trunk.pending:
                    self._join_prompt(trunk)
                    behind[trunk] = trunk.pending
            if not behind:
                break
            count += self._encode(behind, None if most is None else most - count)
        return count

    def _is_whole(self, prompt: PromptNode) -> bool:
        """Whether it is read in one piece, by the model's own forward pass."""
        return prompt.media is not None or self.policy.reads_whole

    def _read_whole(self, missing: Sequence[PromptNode]) -> int:
        """The first of these, and those that are rows of the same batch, in one pass. Returns its tokens.

        Nothing of them is shared with others: the same ids may stand for another picture. What the model raises, but
        for lack of memory, is the error of these prompts, and of no others.
        """
        media = missing[0].media
        inputs = text_inputs(missing[0].ids) if media is None else media.inputs
        rows = {0: missing[0]} if media is None else dict[int, PromptNode]()
        for prompt in missing:
            if prompt.media is not None and prompt.media.inputs is inputs:
                rows.setdefault(prompt.media.row, prompt)  # whoever stands on the same row reads it in the next pass
        try:
            with passing(inputs["input_ids"].numel()):
                nodes, logits = self.policy.read_media(inputs, list(rows))
        except TooLarge:
            raise
        except Exception as error:
            together = f", one of {len(rows)} of a batch" if len(rows) > 1 else ""
            for prompt in rows.values():
                prompt.error = Cause.of(error, f"the {self.policy.role} cannot read the prompt{together}: ")
            return 0
        for prompt, node, row in zip(rows.values(), nodes, logits, strict=True):
            prompt.node, prompt.encoded, prompt.logits = node, len(prompt.ids), row
            self._prompts.add(prompt)
        return inputs["input_ids"].numel()

    def _fresh(self, missing: Sequence[PromptNode]) -> list[PromptNode]:
        """Prompts of text that are not in the tree as a whole, from where others that are begin alike.

        What several have in common is encoded for the first of them; the others wait for the next pass.
        """
        prompts = [prompt for prompt in missing if not self._is_whole(prompt)]
        for prompt in prompts:
            if not prompt.encoded:
                prompt.node, prompt.encoded = self.policy.prefixes.longest(prompt.ids)
                if prompt.node >= 0:
                    self._prompts.add(prompt)
        places = first_of_each([prompt.ids for prompt in prompts], [prompt.encoded for prompt in prompts])
        return [prompts[place] for place in places]

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
        leaves = [holder.node if isinstance(holder, PromptNode) else holder.leaf for holder in pieces]
        with passing(min(count, limit)):
            nodes, logits = self.policy.prefill(leaves, list(pieces.values()), limit)
        for (holder, piece), old, node, row in zip(pieces.items(), leaves, nodes, logits, strict=True):
            if old >= 0:
                self.policy.tree.release(old)
            if isinstance(holder, PromptNode):
                holder.node, holder.encoded = node, holder.encoded + len(piece)
                self._prompts.add(holder)
                if holder.encoded == len(holder.ids):
                    holder.logits = row
                    self.policy.prefixes.keep(holder.ids, node)
            else:
                holder.leaf, holder.pending = node, holder.pending[len(piece) :]
                holder.logits = None if holder.pending else row
        return count

    def ready(self, trunk: Trunk) -> bool:
        """Whether all that the answer has is in the tree."""
        return trunk.prompt.logits is not None and not trunk.pending

    def append(self, trunk: Trunk, tokens: Sequence[int], node: int, logits: torch.Tensor | None = None) -> None:
        """The answer goes on with ``tokens``.

        ``node`` holds all but the last; all of them where ``logits`` are those that follow. It is -1 where none is in
        this tree.
        """
        if node >= 0:
            self._release(trunk)
            trunk.leaf, trunk.pending = node, [] if logits is not None else list(tokens[-1:])
        else:
            trunk.pending = [*trunk.pending, *tokens]
        trunk.logits = logits if node >= 0 else None

    def grow(self, trunk: Trunk, draw: Draw) -> None:
        """:meth:`append` what was drawn."""
        self.append(trunk, draw.tokens, draw.node, draw.logits)

    def trim(self, trunk: Trunk, draw: Draw) -> None:
        """:meth:`stars_fast.policy.policy.Policy.trim`."""
        self.policy.trim(trunk.leaf, draw)

    def release(self, draws: Sequence[Draw]) -> None:
        """Give the branches of draws back."""
        self.policy.tree.release_all([draw.node for draw in draws if draw.node >= 0])

    def advance(self, trunk: Trunk, node: int) -> None:
        """``node`` holds all that is pending but the last token."""
        self._release(trunk)
        trunk.leaf, trunk.pending = node, trunk.pending[-1:]

    def fork(self, trunk: Trunk) -> Trunk:
        """Another trunk that goes on from this one."""
        if trunk.leaf >= 0:
            self.policy.tree.retain(trunk.leaf)
        return Trunk(trunk.prompt, trunk.leaf, trunk.logits, list(trunk.pending))

    def cut(self, trunk: Trunk, tokens: Sequence[int]) -> Trunk:
        """Another trunk that goes on from ``tokens``, the first of the answer's, which are all in this one.

        Only the last of them is encoded again, for the logits that follow it.
        """
        if not tokens:
            return Trunk.below(trunk.prompt)
        node = self.policy.tree.cut(trunk.leaf, len(trunk.prompt.ids) + len(tokens) - 1)
        return Trunk(trunk.prompt, node, pending=list(tokens[-1:]))

    def give_back(self, trunk: Trunk, tokens: Sequence[int]) -> None:
        """Release the trunk's slots. ``tokens``, all that is committed, are to be encoded again if it goes on."""
        self._release(trunk)
        self.forget(trunk, tokens)

    def forget(self, trunk: Trunk, tokens: Sequence[int]) -> None:
        """The tree was cleared: nothing of the trunk is in it any more."""
        trunk.leaf, trunk.logits, trunk.pending = -1, None, list(tokens)

    def _release(self, trunk: Trunk) -> None:
        if trunk.leaf >= 0:
            self.policy.tree.release(trunk.leaf)

    def keep_prompts(self, prompts: Sequence[PromptNode]) -> None:
        """Release all prompts but these."""
        for prompt in self._prompts - set(prompts):
            self.policy.tree.release(prompt.node)
            self._out(prompt)

    def clear(self) -> None:
        """Drop everything from the tree, whoever holds it."""
        for prompt in list(self._prompts):
            self._out(prompt)
        self.policy.clear()

    def _out(self, prompt: PromptNode) -> None:
        prompt.node, prompt.encoded, prompt.logits = -1, 0, None
        self._prompts.remove(prompt)

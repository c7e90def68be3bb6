"""Runs the policy over the tree: prefill, and K decode steps that draw candidates side by side."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary, ref

import numpy as np
import torch
from transformers import PreTrainedModel

from stars_fast.policy.leaf import NOT_FINITE, Draw, Leaf
from stars_fast.policy.mixed import MixedSteps, read_at
from stars_fast.policy.steps import Shape, Steps
from stars_fast.tree.check import checked
from stars_fast.tree.media import placeholder_ids, places
from stars_fast.tree.model import TreeModel
from stars_fast.tree.segment_tree import TreePlan
from stars_fast.tree.support import written

_LOOKS = 8  # steps between looks at whether anybody goes on, where each makes the host wait


class Policy(TreeModel):
    """A causal language model on a tree of slots.

    Parameters
    ----------
    model : transformers causal LM
    cuda_graphs : bool
        Whether decode steps on a CUDA device are captured: once for every padded shape
        (:meth:`stars_fast.policy.steps.Shape.padded`), kept until the pool or the weights move.
    torch_compile : bool
        Whether decoder layers run compiled on a CUDA device.
    role : str
        What error messages call it.

    Attributes
    ----------
    barred : torch.Tensor or None
        int64 ``[N]``: ids that stand for pictures, which are never drawn. ``generate`` of transformers may draw them.
        Of a draft model or a guide, also those that do in the policy.
    """

    def __init__(
        self, model: PreTrainedModel, cuda_graphs: bool = True, torch_compile: bool = True, role: str = "policy"
    ) -> None:
        super().__init__(model, model, role)
        checked(self)
        self.accelerate(cuda_graphs, torch_compile)
        self.logit_size = written(model)  # the vocabulary to every operator; what prompts hold is `vocab_size`
        self.bar(placeholder_ids(model) if self.takes_media else [])
        self.source: Any = model  # what the user named it by
        self.sharded = any(type(parameter).__name__ == "DTensor" for parameter in model.parameters())
        self.length_room = 0  # of the longest segment that decode steps have room for
        self._guides_then = WeakKeyDictionary[Policy, Any]()  # what steps that hold a guide rely on of it

    def bar(self, ids: Iterable[int]) -> None:
        """Draw none of these ids either, of those that the model writes."""
        own = [] if self.barred is None else self.barred.tolist()
        barred = sorted({*own, *(token for token in ids if token < self.logit_size)})
        self.barred = torch.tensor(barred, dtype=torch.int64, device=self.device) if barred else None

    def begin(self, tokens: int, longest: int, segment_length: int) -> None:
        """Make room for ``tokens`` slots, trunks of up to ``longest`` tokens and segments of ``segment_length``."""
        self.allocate(tokens, longest)
        if segment_length > self.length_room:  # never smaller again, as trunks
            self.length_room = segment_length
            self.graphs.drop(Steps)
            self.graphs.drop(MixedSteps)

    def has_room(self, longest: int, segment_length: int) -> bool:
        """Whether trunks and segments of these lengths go into the graphs that :meth:`begin` made room for."""
        return not self.graphs.enabled or (longest <= self.trunk_room and segment_length <= self.length_room)

    def prefill(
        self, leaves: Sequence[int], tokens: Sequence[Sequence[int]], limit: int | None = None
    ) -> tuple[list[int], list[torch.Tensor]]:
        """Append tokens below each leaf (-1: a fresh prompt), at most ``limit`` in a forward pass.

        Returns new nodes and the next tokens' logits ``[V]``.
        """
        nodes, outputs = self.extend(leaves, tokens, limit, logits_to_keep=0)
        passes = {id(output): output for output, _, _ in outputs}
        logits = {key: output.logits[0].unbind() for key, output in passes.items()}
        return nodes, [logits[id(output)][place] for output, _, place in outputs]

    def read_media(
        self, inputs: Mapping[str, Any], rows: Sequence[int] = (0,), lag: int = 0, **kwargs: Any
    ) -> tuple[list[int], list[torch.Tensor]]:
        """Read a processor's prompts whole (:meth:`TreeModel.read_media`).

        Returns new nodes and the logits ``[V]`` after the last token of each row.
        """
        last = [int(place[-1]) for place in places(inputs, rows)]
        kept = sorted(set(last))
        keep = torch.tensor(kept, device=self.device)
        nodes, output = super().read_media(inputs, rows, lag, logits_to_keep=keep, **kwargs)
        places_kept = [(row, kept.index(place)) for row, place in zip(rows, last, strict=True)]
        return nodes, [output.logits[place].clone() for place in places_kept]  # views would keep all of the batch's

    def allowed(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits ``[..., V]`` with -inf at :attr:`barred`."""
        return logits if self.barred is None else logits.index_fill(-1, self.barred, -math.inf)

    def propose(self, leaves: Sequence[Leaf], guides: Sequence[Policy] = ()) -> list[list[Draw]]:
        """Draw ``leaf.candidates`` segments of up to ``leaf.length`` tokens below each leaf, all in parallel.

        The first token comes from the leaf's logits; a segment of K tokens costs K - 1 forward passes. Where there are
        ``guides``, tokens follow the sum of all models' logits by ``leaf.weights``
        (:class:`stars_fast.policy.mixed.MixedSteps`), and every further model costs as many passes.

        Raises
        ------
        SlotsExhausted, torch.OutOfMemoryError
            Where slots or memory lack.
        """
        with self.on_device():
            return self._propose(leaves, guides)

    def _propose(self, leaves: Sequence[Leaf], guides: Sequence[Policy]) -> list[list[Draw]]:
        rows = [leaf.candidates for leaf in leaves]
        lengths = [leaf.length for leaf in leaves for _ in range(leaf.candidates)]
        plans, branches = self._planned(leaves, guides, rows, [length - 1 for length in lengths])
        steps = self._begun(leaves, guides, plans)
        alive = steps.alive.numpy() if self.device.type == "cpu" else None  # Python's any() stops at the first
        for step in range(1, max(lengths)):
            if alive is not None and not any(alive):
                break
            if alive is None and steps.shape.uncertain and step % _LOOKS == 0 and not steps.alive.any():
                break
            steps.run()
        eos = [leaf.sampling.eos_token_ids for leaf in leaves for _ in range(leaf.candidates)]
        drawn = _draws(steps, branches[0], eos)
        for draw, *beside in zip(drawn, *branches[1:], strict=True):
            draw.beside = beside
        draws = iter(drawn)
        groups = [[next(draws) for _ in range(n)] for n in rows]
        if steps.shape.uncertain:
            for leaf, group in zip(leaves, groups, strict=True):
                for draw in group:
                    self.trim(leaf.node, draw)
                    for i, guide in enumerate(guides):
                        draw.beside[i] = guide.trimmed(leaf.nodes[i + 1], draw.beside[i], len(draw.tokens))
        return groups

    def _planned(
        self, leaves: Sequence[Leaf], guides: Sequence[Policy], rows: list[int], slots: list[int]
    ) -> tuple[list[TreePlan], list[list[int]]]:
        """A plan in each tree, and the branches of all rows: the policy's, and each guide's."""
        plans, branches = list[TreePlan](), [list[int]() for _ in (self, *guides)]
        for model, own in read_at((self, *guides)).items():
            nodes = [leaf.nodes[place] for place in own for leaf in leaves]
            plans.append(plan := model.plan(nodes, rows * len(own), slots * len(own)))
            for i, place in enumerate(own):
                branches[place] = plan.branches[i * len(slots) : (i + 1) * len(slots)]
        return plans, branches

    def _begun(self, leaves: Sequence[Leaf], guides: Sequence[Policy], plans: Sequence[TreePlan]) -> Steps:
        """Steps that have drawn the first tokens."""
        shape = Shape.of(leaves, plans[0])
        processed = any(leaf.processor for leaf in leaves)
        if not guides:
            steps = self._prepared(shape, processed)
            steps.load(leaves, plans[0])
            return steps
        shape = shape._replace(trunk=max(plan.trunk_slots.shape[1] for plan in plans))
        mixed = self._prepared_mixed((self, *guides), shape, processed)
        mixed.load_all(leaves, plans)
        return mixed

    def trim(self, leaf: int, draw: Draw) -> None:
        """Give back the branch's slots of tokens that the draw does not have (any more), and of the last it has."""
        draw.node = self.trimmed(leaf, draw.node, len(draw.tokens))

    def trimmed(self, leaf: int, branch: int, tokens: int) -> int:
        """The branch below a leaf with slots for all but the last of so many tokens; the others are given back."""
        length = self.tree.length(leaf) + max(tokens, 1) - 1
        if self.tree.length(branch) <= length:
            return branch
        node = self.tree.cut(branch, length)
        self.tree.release(branch)
        return node

    def fork_tokens(
        self,
        leaves: Sequence[int],
        tokens: Sequence[Sequence[int]],
        eos_token_ids: Sequence[Sequence[int]],
        logits: torch.Tensor,
        processed: torch.Tensor,
    ) -> list[list[Draw]]:
        """Candidates of one given token each, several below each leaf, whose logits are ``logits [G, V]``.
        ``eos_token_ids[g]`` end its answer.

        Their log-probabilities are those of ``logits``, and, as what is sampled from, of ``processed [G, V]``.
        """
        raw, looked_at = logits.float().log_softmax(1), processed.float().log_softmax(1)
        counts = [len(group) for group in tokens]
        ids = [token for group in tokens for token in group]
        group = torch.tensor([g for g, count in enumerate(counts) for _ in range(count)], device=raw.device)
        place = group, torch.tensor(ids, device=raw.device)
        nodes = self.plan(leaves, counts, [0] * len(ids)).branches
        finite = (raw.amax(1).isfinite() & looked_at.amax(1).isfinite())[group]
        columns = raw[place].tolist(), looked_at[place].tolist(), finite.tolist()
        ends = [set(eos) for eos, count in zip(eos_token_ids, counts, strict=True) for _ in range(count)]
        draws = iter(
            Draw(node, [token], [logprob], [sampling_logprob], token in eos, None if finite else NOT_FINITE)
            for node, token, eos, logprob, sampling_logprob, finite in zip(nodes, ids, ends, *columns, strict=True)
        )
        return [[next(draws) for _ in range(count)] for count in counts]

    def finish_branches(self, draws: Sequence[Draw]) -> torch.Tensor:
        """Encode each draw's last token too, so that its ``logits`` are known. Returns the hidden states ``[B, H]``:
        what the output embedding read at these tokens.
        """
        with self._head_inputs() as seen:
            nodes, outputs = self.extend(
                [draw.node for draw in draws], [draw.tokens[-1:] for draw in draws], logits_to_keep=0
            )
        for draw, node, (output, _, place) in zip(draws, nodes, outputs, strict=True):
            self.release(draw.node)
            draw.node, draw.logits = node, output.logits[0, place]
        return seen[-1][0]

    def hidden_at_end(self, nodes: Sequence[int], last_tokens: Sequence[int]) -> torch.Tensor:
        """What the output embedding reads at the last token of each node ``[B, H]``, by encoding it once more."""
        lengths = [self.tree.length(node) - 1 for node in nodes]
        before = [self.tree.cut(node, length) if length else -1 for node, length in zip(nodes, lengths, strict=True)]
        draws = [Draw(node, [token], [0.0], [0.0], False) for node, token in zip(before, last_tokens, strict=True)]
        hidden = self.finish_branches(draws)
        for draw in draws:
            self.tree.release(draw.node)
        return hidden

    @contextmanager
    def _head_inputs(self) -> Iterator[list[torch.Tensor]]:
        """What this thread gives the output embedding inside, one tensor ``[1, rows, H]`` per forward pass.

        Other engines, and the model's ordinary users, may run the same head in threads of their own.
        """
        seen: list[torch.Tensor] = []
        here, head = threading.get_ident(), self.model.get_output_embeddings()

        def look(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            if threading.get_ident() == here:
                seen.append(args[0])

        handle = head.register_forward_pre_hook(look)
        self.watched = True  # a graph would not call the hook
        try:
            yield seen
        finally:
            self.watched = False
            handle.remove()

    def read(self, leaves: Sequence[int], runs: Sequence[Sequence[int]]) -> tuple[list[int], list[torch.Tensor]]:
        """Encode a run below each leaf. Returns new nodes, and the logits after each token of each run ``[T, V]``."""
        nodes, output, last = self.encode(leaves, [1] * len(leaves), runs)
        starts = [0, *(int(end) + 1 for end in last)]
        return nodes, [output.logits[0, a:b] for a, b in pairwise(starts)]

    def _prepared(self, shape: Shape, processed: bool) -> Steps:
        """Tensors for a proposal of this shape. A user's logits processors run on the host: no graph holds them."""
        if processed or not self.graphs.enabled:
            return self._steps(shape)
        return self.steps(shape.padded(self.trunk_room, self.length_room))

    def _steps(self, shape: Shape) -> Steps:
        return Steps(self, shape, self.logit_size, self.barred)

    def _prepared_mixed(self, models: tuple[Policy, ...], shape: Shape, processed: bool) -> MixedSteps:
        """:meth:`_prepared` for a proposal of several models. Captured steps hold all of them, and go with what any of
        them relies on.
        """
        if processed or not self.graphs.enabled:
            return MixedSteps(models, shape)
        relied_on = {model: model.graphs.relied_on for model in models[1:]}
        # One has moved, or is new: then others may be gone for good.
        if any(self._guides_then.get(model) != now for model, now in relied_on.items()):
            self.graphs.drop(MixedSteps)
        self._guides_then.update(relied_on)
        shape = shape.padded(max(model.trunk_room for model in models), self.length_room)
        capture = shape.length > 1 and all(model.graphs.enabled for model in models)
        with self.on_device():
            return self.graphs.get((shape, *map(ref, models)), lambda: MixedSteps(models, shape), capture=capture)

    def steps(self, shape: Shape) -> Steps:
        """Tensors of decode steps of a padded shape, which are kept, and captured where that is possible."""
        with self.on_device():
            return self.graphs.get(shape, lambda: self._steps(shape), capture=shape.length > 1)


def _draws(steps: Steps, branches: Sequence[int], eos: Sequence[Sequence[int]]) -> list[Draw]:
    """Copy what was drawn to the host in one piece: the one look per heartbeat."""
    rows, length = len(branches), steps.shape.length
    position, tokens = steps.position[:rows, None], steps.tokens[:rows].int()
    logprobs = [column[:rows].view(torch.int32) for column in (steps.logprobs, steps.sampling_logprobs)]
    packed = torch.cat((position, tokens, *logprobs), 1).cpu().numpy()
    counts, ids, floats = packed[:, 0], packed[:, 1 : 1 + length], packed[:, 1 + length :].view(np.float32)
    # Logits that are not finite end a row with a NaN log-probability, and nothing else writes one.
    finite = ~np.isnan(floats[:, length:]).any(1)
    columns: Any = [one.tolist() for one in (counts, ids, floats[:, :length], floats[:, length:], finite)]
    draws = []
    for place, (node, ends, count, row, raw, sampled, sound) in enumerate(zip(branches, eos, *columns, strict=True)):
        draw = Draw(node, row, raw, sampled, count > 0 and row[count - 1] in ends)
        if count < length:
            draw.cut(count)
        draw.error = steps.failures.get(place) or steps.unread(draw.tokens) or (None if sound else steps.not_finite)
        draws.append(draw)
    return draws

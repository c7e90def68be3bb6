"""Decode steps of several models at once: one token a row, drawn from a weighted sum of all their logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F

from stars_fast.policy.leaf import Leaf
from stars_fast.policy.steps import Shape, Steps
from stars_fast.tree.model import TreeModel
from stars_fast.tree.segment_tree import TreePlan
from stars_fast.tree.upload import uploaded

Model = TypeVar("Model", bound=TreeModel)


def read_at(models: Sequence[Model]) -> dict[Model, list[int]]:
    """Each model once, with its places among them: there it reads other prompts."""
    found: dict[Model, list[int]] = {}
    for place, model in enumerate(models):
        found.setdefault(model, []).append(place)
    return found


class MixedSteps(Steps):
    """:class:`Steps` whose tokens follow the softmax of ``sum_i weights_i logits_i``, before temperature and filters.

    Each model has the same tokens in a tree of its own; one that reads several prompts reads them in one pass.
    ``logprobs`` are those of the first model, the policy, alone.

    Parameters
    ----------
    models : sequence of TreeModel
        The policy and its guides; one as often as it reads another prompt. All on one device.
    shape : Shape
    """

    not_finite = "the sum of the policy's logits and its guides' is not finite"

    def __init__(self, models: Sequence[TreeModel], shape: Shape) -> None:
        (policy, own), *others = read_at(models).items()
        # Tables of one vocabulary may be padded differently. What one of them cannot read or write nobody draws.
        self.shared = min(policy.logit_size, *(min(model.logit_size, model.vocab_size) for model in models[1:]))
        barred = [model.barred[model.barred < self.shared] for model in read_at(models) if model.barred is not None]
        super().__init__(policy, shape, policy.logit_size, torch.cat(barred).unique() if barred else None, len(own))
        self.others = [self.reads(model, len(at)) for model, at in others]
        self.order = [place for at in read_at(models).values() for place in at]  # of models, as their logits come
        self.weights = torch.zeros(len(models), shape.rows, device=policy.device)  # in this order

    def load_all(self, leaves: Sequence[Leaf], plans: Sequence[TreePlan]) -> None:
        """:meth:`load`, with a plan for each model."""
        candidates = [leaf.candidates for leaf in leaves]
        by_leaf = np.array([[leaf.weights[place] for leaf in leaves] for place in self.order], dtype=np.float32)
        (weights,) = uploaded([by_leaf.repeat(candidates, axis=1)], self.weights.device)
        self.weights[:, : weights.shape[1]] = weights
        self.load(leaves, plans[0])
        groups = self.every_group[: weights.shape[1]]
        for reader, plan in zip(self.others, plans[1:], strict=True):
            reader.load(plan, groups, len(leaves))

    def begin(self, leaves: Sequence[Leaf], groups: torch.Tensor) -> None:
        self.draw_of([self.below([leaf.all_logits[place] for leaf in leaves], groups) for place in self.order])

    def work(self) -> None:
        readers = (self.reader, *self.others)
        self.draw_of([one for reader in readers for one in reader.forward(self.tokens, self.step, self.alive)])

    def draw_of(self, logits: Sequence[torch.Tensor]) -> None:
        """Sample one token per row from the sum of these logits, each ``[rows, V]``."""
        mixed = torch.zeros_like(logits[0][:, : self.shared], dtype=torch.float32)
        for weight, one in zip(self.weights, logits, strict=True):
            mixed.addcmul_(weight[:, None], one[:, : self.shared].float())
        if (beyond := self.written - self.shared) > 0:
            mixed = F.pad(mixed, (0, beyond), value=-torch.inf)
        self.draw(mixed, logits[0])

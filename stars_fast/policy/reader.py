"""One model's part in a decode step: it reads the token that every row drew last."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch

from stars_fast.tree.attention import TreeContext
from stars_fast.tree.model import TreeModel
from stars_fast.tree.segment_tree import TreePlan


class Reader:
    """The tables of a proposal in one model's tree, and the forward pass over them.

    A row may lie below several prompts of its request: there it has a branch each, all with the same tokens, and one
    pass reads them all.

    Parameters
    ----------
    model : TreeModel
        Held weakly.
    rows, groups, most_rows, trunk, length : int
        As in :class:`stars_fast.policy.steps.Shape`.
    prompts : int
        Below which each row lies.
    """

    def __init__(
        self, model: TreeModel, rows: int, groups: int, most_rows: int, trunk: int, length: int, prompts: int = 1
    ) -> None:
        self.model: Any = weakref.proxy(model)
        self.rows, self.most_rows, self.prompts = rows, most_rows, prompts
        branches, device = prompts * rows, model.device
        self.plan = TreePlan.empty(prompts * groups, trunk, branches, max(1, length - 1), device)
        self.first_position = torch.zeros(branches, dtype=torch.int32, device=device)  # of the token after the trunk
        self.query_indptr = torch.arange(branches + 1, dtype=torch.int32, device=device)
        self.every_branch = torch.arange(branches, device=device)
        # Rows in use come first in the plan, under one prompt after another, and padding behind all of them.
        self._row_of = self.every_branch % rows  # [branches]
        self._branch_of = self.every_branch.clone()  # [prompts * rows]

    def load(self, plan: TreePlan, groups: torch.Tensor, count: int) -> None:
        """Begin a proposal of rows of these groups ``[rows in use]``, of which each prompt has ``count``."""
        self.plan.load(plan)
        used, prompts = len(groups), range(self.prompts)
        if self.prompts > 1:
            own = self.every_branch[:used]
            self._row_of.fill_(self.rows - 1)
            self._row_of[: used * self.prompts] = own.repeat(self.prompts)
            self._branch_of.fill_(len(self.every_branch) - 1)
            self._branch_of.view(self.prompts, self.rows)[:, :used] = torch.stack([own + i * used for i in prompts])
            groups = torch.cat([groups + i * count for i in prompts])
        torch.index_select(plan.trunk_position, 0, groups, out=self.first_position[: len(groups)])

    def forward(self, tokens: torch.Tensor, step: torch.Tensor, alive: torch.Tensor) -> Sequence[torch.Tensor]:
        """Logits ``[rows, V]`` below each prompt.

        Parameters
        ----------
        tokens : torch.Tensor
            int64 ``[rows, length]``: what was drawn.
        step : torch.Tensor
            int64 ``[1]``: how much of it.
        alive : torch.Tensor
            bool ``[rows]``.
        """
        last = step - 1
        tokens = tokens.index_select(1, last)[:, 0]
        if self.prompts > 1:
            tokens, alive = tokens[self._row_of], alive[self._row_of]
        if self.model.logit_size > self.model.vocab_size:
            tokens = tokens.clamp_max(self.model.vocab_size - 1)  # of rows that ended with what cannot be read
        context = TreeContext(
            pool=self.model.pool,
            plan=self.plan,
            write_slots=self.plan.branch_slots.index_select(1, last)[:, 0],  # of padding rows slot 0
            branch_len=step.int().expand(len(tokens)).contiguous(),
            query_indptr=self.query_indptr,
            max_rows=self.most_rows,
            max_queries=1,
        )
        # Rows that ended would walk past the last position, which a table of positions does not forgive.
        positions = torch.where(alive, self.first_position + last, 0)
        logits = self.model.forward(tokens, positions, context, logits_to_keep=self.every_branch).logits[0]
        if self.prompts == 1:
            return (logits,)
        return logits[self._branch_of].view(self.prompts, self.rows, -1).unbind()

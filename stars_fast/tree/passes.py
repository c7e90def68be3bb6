"""Small forward passes over the tree, padded to shapes that recur: launching their kernels takes longer than they run.

The pass that encodes the last tokens of committed segments is one in every heartbeat; the scoring of few candidates is
another. A decode step has tensors of its own (:mod:`stars_fast.policy.steps`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from stars_fast.tree.attention import TreeContext
from stars_fast.tree.graphs import Captured, Pooled
from stars_fast.tree.segment_tree import TreePlan

# Above, a pass of a large model takes the device longer than its launches take the host.
MOST_TOKENS = 1024
# Times that a shape is met before it is captured, which takes as long as some five passes.
WORTH_CAPTURING = 4
_SMALL_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 96, 128)
_BUCKET_STEP = 64
_TRUNK_STEP = 256


def bucket(rows: int) -> int:
    """The number of rows that ``rows`` are padded to, so that few graphs serve all: 1, 2, 4 to 64, 96, 128, 192 ..."""
    for size in _SMALL_BUCKETS:
        if rows <= size:
            return size
    return math.ceil(rows / _BUCKET_STEP) * _BUCKET_STEP


def trunk_room(tokens: int) -> int:
    """The length that trunks of ``tokens`` are padded to."""
    return max(1, math.ceil(tokens / _TRUNK_STEP)) * _TRUNK_STEP


class PassShape(NamedTuple):
    """Sizes of a pass's tensors: what its graph depends on."""

    tokens: int
    rows: int
    groups: int
    most_rows: int  # of a group
    most_queries: int  # of a row
    trunk: int
    branch: int
    logits: bool  # of each row's last token; else hidden states of all

    @classmethod
    def padded(cls, plan: TreePlan, lengths: Sequence[int], most_rows: int, logits: bool) -> PassShape:
        """With room for this pass; many share it."""
        (groups, trunk), branch = plan.trunk_slots.shape, plan.branch_slots.shape[1]
        sizes = (bucket(sum(lengths)), bucket(len(lengths)), bucket(groups), _power(most_rows), _power(max(lengths)))
        return cls(*sizes, trunk_room(trunk), _power(branch), logits)


class Pass(Captured):
    """One packed forward pass over branches that are encoded whole.

    Attributes
    ----------
    output : torch.Tensor
        Logits ``[1, rows, V]`` or hidden states ``[1, tokens, H]``; the next pass of this shape overwrites it.
    """

    def __init__(self, model: Pooled, shape: PassShape) -> None:
        super().__init__(model)
        self.shape, device = shape, model.device
        self.plan = TreePlan.empty(shape.groups, shape.trunk, shape.rows, shape.branch, device)
        self.packed = torch.zeros(3, shape.tokens, dtype=torch.int64, device=device)  # ids, row, place in its branch
        self.query_indptr = torch.zeros(shape.rows + 1, dtype=torch.int32, device=device)
        self.every_token = torch.arange(shape.tokens, device=device)
        self.every_row = torch.arange(shape.rows, dtype=torch.int32, device=device)
        self.output = torch.empty(0, device=device)

    def load(self, plan: TreePlan, branches: Sequence[Sequence[int]]) -> None:
        """What the next run encodes."""
        lengths = np.array([len(branch) for branch in branches])
        ends, tokens = lengths.cumsum(), int(lengths.sum())
        packed = np.zeros((3, self.shape.tokens), dtype=np.int64)
        packed[0, :tokens] = np.concatenate([np.asarray(branch, dtype=np.int64) for branch in branches])
        packed[1, :tokens] = np.repeat(np.arange(len(lengths)), lengths)
        packed[2, :tokens] = np.arange(tokens) - np.repeat(ends - lengths, lengths)
        query_indptr = np.full(self.shape.rows + 1, tokens, dtype=np.int32)
        query_indptr[0], query_indptr[1 : len(ends) + 1] = 0, ends
        for own, values in ((self.packed, packed), (self.query_indptr, query_indptr)):
            host = torch.from_numpy(values)
            own.copy_(host.pin_memory() if own.device.type == "cuda" else host, non_blocking=True)
        self.plan.load(plan)

    def rest(self) -> None:
        """Without tokens."""
        self.query_indptr.zero_()
        self.plan.group_indptr.zero_()

    def work(self) -> None:
        """The forward pass."""
        plan, (ids, row, place) = self.plan, self.packed
        used = self.every_token < self.query_indptr[-1:]
        group = torch.bucketize(self.every_row, plan.group_indptr[1:], right=True).clamp(max=self.shape.groups - 1)
        context = TreeContext(
            pool=self.model.pool,
            plan=plan,
            write_slots=torch.where(used, plan.branch_slots[row, place], 0),
            branch_len=plan.branch_len,
            query_indptr=self.query_indptr,
            max_rows=self.shape.most_rows,
            max_queries=self.shape.most_queries,
        )
        positions = torch.where(used, plan.trunk_len[group][row] + place, 0)
        last = {"logits_to_keep": (self.query_indptr[1:].long() - 1).clamp(min=0)} if self.shape.logits else {}
        output = self.model.forward(ids, positions, context, **last)
        self.output = output.logits if self.shape.logits else output.last_hidden_state


def _power(size: int) -> int:
    """The next power of two."""
    return 1 << (max(size, 1) - 1).bit_length()

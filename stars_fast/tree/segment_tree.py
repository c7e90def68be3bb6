"""Which slots hold whose tokens: the tree of segments, and its picture on the device for one heartbeat."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stars_fast._C import SegmentTree, SlotsExhausted

__all__ = ["SegmentTree", "SlotsExhausted", "TreePlan", "plan"]

Integers: TypeAlias = Sequence[int] | npt.NDArray[np.integer]

_ALIGN = 4  # int32 entries: SegmentTree.plan begins each section at a multiple of 16 bytes


@dataclass(frozen=True)
class TreePlan:
    """Slots and lengths of one heartbeat. All tensors are int32 views of one buffer, so that one copy carries them.

    G requests have a trunk each, B rows (candidates) a branch each; row b belongs to the request g with
    ``group_indptr[g] <= b < group_indptr[g + 1]``. Unused places of the slot tables hold 0, the slot that absorbs
    padding.
    """

    trunk_slots: Tensor  # [G, P] the prompt and all that is committed, root to leaf; P: the longest trunk, at least 1
    trunk_len: Tensor  # [G] tokens of each trunk
    branch_slots: Tensor  # [B, S] new slots of each row; S: the longest branch, at least 1
    branch_len: Tensor  # [B] how many of them the row has
    group_indptr: Tensor  # [G + 1] first row of each request, and B
    trunk_position: Tensor  # [G] of the token after each trunk: its length, and the offset of what it ends with
    branches: list[int]  # [B] the rows' nodes in the tree; the caller holds one reference to each
    fresh: bool = False  # no request has a trunk

    @classmethod
    def empty(cls, groups: int, trunk: int, rows: int, branch: int, device: torch.device) -> TreePlan:
        """Tables of these sizes for :meth:`load`, with nothing in them."""

        def zeros(*size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.int32, device=device)

        trunks, branches = (zeros(groups, trunk), zeros(groups)), (zeros(rows, branch), zeros(rows))
        return cls(*trunks, *branches, zeros(groups + 1), zeros(groups), [])

    def load(self, plan: TreePlan) -> None:
        """Copy a plan that is no larger into these tables, which a graph has seen; the rest of them is padding."""
        (groups, trunk), (rows, branch) = plan.trunk_slots.shape, plan.branch_slots.shape
        self.trunk_slots[:groups, :trunk].copy_(plan.trunk_slots)
        self.trunk_len[:groups].copy_(plan.trunk_len)
        self.trunk_position[:groups].copy_(plan.trunk_position)
        self.branch_slots.zero_()
        self.branch_slots[:rows, :branch].copy_(plan.branch_slots)
        self.branch_len.zero_()
        self.branch_len[:rows].copy_(plan.branch_len)
        self.group_indptr.fill_(rows)
        self.group_indptr[: groups + 1].copy_(plan.group_indptr)


def plan(
    tree: SegmentTree, leaves: Integers, rows: Integers, new_slots: Integers, device: torch.device | str
) -> TreePlan:
    """Fork ``rows[g]`` branches off ``leaves[g]``, give branch b ``new_slots[b]`` slots, and send the tables over.

    Parameters
    ----------
    tree : SegmentTree
    leaves : sequence or array of int
        [G] the node each request continues from; -1 for none (each of its branches is a new root).
    rows : sequence or array of int
        [G] branches per request; their sum is B.
    new_slots : sequence or array of int
        [B] tokens that each branch has room for.
    device : torch.device or str
        Where the tensors go, in one transfer.

    Raises
    ------
    SlotsExhausted
        When the tree has fewer free slots than ``sum(new_slots)``.
    ValueError
        When a leaf is not held, a count is negative, or the lengths of the arguments do not fit each other.

    Whatever it raises, the tree is as before.
    """
    nodes, packed, trunk_width, branch_width = tree.plan(leaves, rows, new_slots)
    try:
        buffer = torch.from_numpy(packed)
        if torch.device(device).type == "cuda":
            buffer = buffer.pin_memory()  # else the copy waits for the device
        buffer = buffer.to(device, non_blocking=True)
        groups, branches = len(rows), len(nodes)
        shapes = [(groups, trunk_width), (groups,), (branches, branch_width), (branches,), (groups + 1,), (groups,)]
        trunk_slots, trunk_len, branch_slots, branch_len, group_indptr, trunk_position = _sections(buffer, shapes)
    except BaseException:
        tree.release_all(nodes.tolist())
        raise
    fresh = all(leaf < 0 for leaf in leaves)
    trunks, rows_of = (trunk_slots, trunk_len), (branch_slots, branch_len, group_indptr)
    return TreePlan(*trunks, *rows_of, trunk_position, nodes.tolist(), fresh)


def _sections(buffer: Tensor, shapes: Sequence[tuple[int, ...]]) -> Iterator[Tensor]:
    """Views of the buffer, one after another."""
    start = 0
    for shape in shapes:
        size = math.prod(shape)
        yield buffer[start : start + size].view(shape)
        start += -(-size // _ALIGN) * _ALIGN

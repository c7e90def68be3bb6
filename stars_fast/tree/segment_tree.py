"""Which slots hold whose tokens: the tree of segments, and its picture on the device for one heartbeat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

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
    query_indptr: Tensor  # [B + 1] first of each row's new tokens where all of them stand in one row, and T
    write_slots: Tensor  # [T] slot of each of these
    positions: Tensor  # [T]
    ids: Tensor  # [T] where the plan was made with them, else [0]
    branches: list[int]  # [B] the rows' nodes in the tree; the caller holds one reference to each
    fresh: bool = False  # no request has a trunk

    @classmethod
    def empty(cls, groups: int, trunk: int, rows: int, branch: int, device: torch.device, tokens: int = 0) -> TreePlan:
        """Tables of these sizes for :meth:`load`, with nothing in them."""

        def zeros(*size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.int32, device=device)

        trunks, branches = (zeros(groups, trunk), zeros(groups)), (zeros(rows, branch), zeros(rows))
        packed = zeros(rows + 1), zeros(tokens), zeros(tokens), zeros(tokens)
        return cls(*trunks, *branches, zeros(groups + 1), zeros(groups), *packed, [])

    def load(self, plan: TreePlan) -> None:
        """Copy a plan that is no larger into these tables, which a graph has seen; the rest of them is padding.

        Tables without tokens take none.
        """
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
        if len(self.ids):
            tokens = len(plan.ids)
            self.query_indptr.fill_(tokens)
            self.query_indptr[: rows + 1].copy_(plan.query_indptr)
            for name in ("write_slots", "positions", "ids"):
                own = getattr(self, name)
                own.zero_()  # the ids too: where tokens share a scale or an expert, padding is not without effect
                own[:tokens].copy_(getattr(plan, name))


def plan(
    tree: SegmentTree,
    leaves: Integers,
    rows: Integers,
    new_slots: Integers,
    device: torch.device | str,
    ids: Integers | None = None,
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
    ids : sequence or array of int, optional
        [T] tokens of all branches, one branch after another, for which the slots are.

    Raises
    ------
    SlotsExhausted
        When the tree has fewer free slots than ``sum(new_slots)``.
    ValueError
        When a leaf is not held, a count is negative, or the lengths of the arguments do not fit each other.

    Whatever it raises, the tree is as before.
    """
    nodes, packed, trunk_width, branch_width = tree.plan(leaves, rows, new_slots, ids)
    branches = nodes.tolist()
    try:
        buffer = torch.from_numpy(packed)
        if torch.device(device).type == "cuda":
            buffer = buffer.pin_memory()  # else the copy waits for the device
        buffer = buffer.to(device, non_blocking=True)
        count, tokens = len(branches), int(np.sum(new_slots))
        trunks = [len(rows) * trunk_width, len(rows)]
        sizes = [*trunks, count * branch_width, count, len(rows) + 1, len(rows), count + 1, tokens, tokens]
        tables: list[Any] = _sections(buffer, [*sizes, 0 if ids is None else tokens])
        tables[0], tables[2] = tables[0].view(len(rows), trunk_width), tables[2].view(count, branch_width)
        fresh = all(leaf < 0 for leaf in leaves)
    except BaseException:
        tree.release_all(branches)
        raise
    return TreePlan(*[*tables, branches, fresh])


def _sections(buffer: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Views of the buffer, one after another, each from a multiple of ``_ALIGN`` on: in one call of torch."""
    pieces = [piece for size in sizes for piece in (size, -size % _ALIGN)]
    return list(buffer.split_with_sizes([*pieces[:-1], 0])[::2])  # behind the last is no padding

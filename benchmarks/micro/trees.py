"""The tree of slots in a steady state: every request holds a trunk, and each heartbeat forks its candidates off it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from stars_fast._C import SegmentTree

GROUPS, ROWS, SEGMENT, TRUNK = 64, 8, 16, 256
PROMISE = 50e-6  # seconds of plan and commit, C++, of 64 requests with 8 candidates each


class Forest:
    """``groups`` requests with trunks of ``trunk`` tokens in one segment tree, and what a heartbeat asks of it."""

    def __init__(self, groups: int = GROUPS, rows: int = ROWS, segment: int = SEGMENT, trunk: int = TRUNK) -> None:
        self.rows_of_one, self.segment = rows, segment
        self.tree = SegmentTree(groups * (trunk + (rows + 1) * segment) + 1)
        self.leaves = [self.tree.fork() for _ in range(groups)]
        for leaf in self.leaves:
            self.tree.extend(leaf, trunk)
        self.rows = np.full(groups, rows)
        self.new_slots = np.full(groups * rows, segment - 1)  # the last token is encoded once it is committed
        self.named = np.array(self.leaves)

    def plan(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        """The nodes of all candidates, and the packed tables."""
        nodes, packed, _, _ = self.tree.plan(self.named, self.rows, self.new_slots)
        return nodes, packed

    def fork(self) -> list[int]:
        """What plan does, node by node."""
        nodes = [self.tree.fork(leaf) for leaf in self.leaves for _ in range(self.rows_of_one)]
        for node in nodes:
            self.tree.extend(node, self.segment - 1)
        return nodes

    def commit(self, nodes: Sequence[int]) -> None:
        """As many references given back as by a heartbeat that accepts everywhere.

        That keeps one candidate of each request and releases the leaf it hangs on; here the candidate goes instead, so
        that trunks do not grow from one call to the next.
        """
        self.tree.release_all(nodes)


def tables_of_lists(
    paths: Sequence[list[int]], free: list[int], branches: int, new_slots: int
) -> npt.NDArray[np.int32]:
    """The same tables, padded and packed, from Python lists: what the C++ tree spares the host."""
    width = max(map(len, paths))
    tables = [slot for path in paths for slot in path + [0] * (width - len(path))]
    tables += map(len, paths)
    for branch in range(branches):
        tables += free[branch * new_slots : (branch + 1) * new_slots]
    return np.array([*tables, *([new_slots] * branches)], dtype=np.int32)

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

class SlotsExhausted(RuntimeError):
    """More slots were requested than are free; the tree is as before."""

class SegmentTree:
    """Who holds which slots.

    A slot is the place of one token's keys and values. A node is a run of slots with a parent; its *path* is the slots
    from the root down to its own last one. ``fork``, ``cut`` and ``plan`` give the caller one reference to the node
    they return, ``retain`` one more, and ``release`` takes one back; a child keeps its parent alive by itself. Only who
    holds a node may name it: any other name raises ValueError, and a name is never given to a second node.

    ``capacity`` counts slot 0, which is never handed out: it absorbs the writes of padding.
    ``free_slots + live_slots == capacity - 1`` at all times.
    """

    def __init__(self, capacity: int) -> None: ...
    @property
    def capacity(self) -> int: ...
    @property
    def free_slots(self) -> int: ...
    @property
    def live_slots(self) -> int: ...
    @property
    def nodes(self) -> int:
        """Live nodes."""

    def fork(self, parent: int = -1) -> int:
        """A new empty child of ``parent``, or a new empty root."""

    def extend(self, node: int, n: int) -> npt.NDArray[np.int32]:
        """Append ``n`` slots to the node's own run and return them, [n].

        Raises ValueError when the node has another holder or a child, SlotsExhausted when fewer are free.
        """

    def cut(self, node: int, length: int) -> int:
        """A node whose path is the first ``length`` slots of the path of ``node``.

        It is the deepest such node on the path, ``node`` included; where ``length`` falls inside a node, that node is
        split: a new node takes its first slots and becomes its parent, so that every name keeps its path. Length 0
        gives an empty root. ``node`` stays held: release it separately.
        """

    def retain(self, node: int) -> None:
        """Take one more reference."""

    def release(self, node: int) -> None:
        """Give one reference back; frees the node and its ancestors as far as nobody holds them."""

    def length(self, node: int) -> int:
        """Number of slots of the node's path."""

    def slots(self, node: int) -> npt.NDArray[np.int32]:
        """The node's path, root to leaf, [length]."""

    def plan(
        self,
        leaves: Sequence[int] | npt.NDArray[np.integer],
        rows: Sequence[int] | npt.NDArray[np.integer],
        new_slots: Sequence[int] | npt.NDArray[np.integer],
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], int, int]:
        """Fork and extend all branches of a heartbeat, or none of them; see :func:`stars_fast.tree.segment_tree.plan`.

        Returns ``(branches [B], packed, P, S)``. ``packed`` holds, each from a multiple of 4 entries on: trunk_slots
        [G, P], trunk_len [G], branch_slots [B, S], branch_len [B], group_indptr [G + 1]. P and S are the longest trunk
        and branch, at least 1; unused places hold 0.
        """

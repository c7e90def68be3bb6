"""Beginnings of texts that a tree still holds although nobody may be using them, for texts that begin alike."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from stars_fast.tree.segment_tree import SegmentTree

# Tokens that two texts have in common before sharing them is worth a node.
LEAST = 32
# Runs that are kept. Each is looked at whenever a text begins.
MOST = 256
_ITEM = np.dtype(np.int64).itemsize


class Prefixes:
    """Runs of ids whose keys and values a tree holds.

    What they hold is room that can be had: :meth:`stars_fast.tree.model.TreeModel.plan` takes it before it raises
    ``SlotsExhausted``.
    """

    def __init__(self, tree: SegmentTree) -> None:
        self._tree = tree
        self._nodes: dict[bytes, int] = {}  # by the run's ids; the one that was not used for longest comes first

    def __len__(self) -> int:
        return len(self._nodes)

    def longest(self, ids: Sequence[int], most: int | None = None) -> tuple[int, int]:
        """The longest kept beginning of ``ids``.

        Parameters
        ----------
        ids : sequence of int
        most : int, optional
            Tokens of it that are of use. None: all but the last, whose logits are yet to be computed.

        Returns
        -------
        (node, length)
            A reference of the caller's to a node that holds ``ids[:length]``; (-1, 0) where fewer than ``LEAST``
            tokens are the same.
        """
        text = _array(ids)[: len(ids) - 1 if most is None else most]
        start, best, length = text[:LEAST].tobytes(), b"", 0
        if len(text) < LEAST:
            return -1, 0
        for run in self._nodes:
            if run.startswith(start) and (shared := _shared(np.frombuffer(run, np.int64), text)) >= length:
                best, length = run, shared
        if not length:
            return -1, 0
        self._touch(best)
        return self._tree.cut(self._nodes[best], length), length

    def keep(self, ids: Sequence[int], node: int) -> None:
        """Keep ``node``, which holds exactly ``ids``: a reference of its own, until room is needed.

        Runs shorter than ``LEAST`` are not kept, and no more than ``MOST``.
        """
        if len(ids) < LEAST:
            return
        run = _array(ids).tobytes()
        if run in self._nodes:
            self._touch(run)
            return
        self._tree.retain(node)
        self._nodes[run] = node
        if len(self._nodes) > MOST:
            self._drop_oldest()

    def make_room(self, slots: int) -> None:
        """Drop runs, those not used for longest first, until so many slots are free or none is left."""
        while self._nodes and self._tree.free_slots < slots:
            self._drop_oldest()

    def clear(self) -> None:
        """Drop all."""
        self._tree.release_all(list(self._nodes.values()))
        self._nodes.clear()

    def _touch(self, run: bytes) -> None:
        self._nodes[run] = self._nodes.pop(run)

    def _drop_oldest(self) -> None:
        self._tree.release(self._nodes.pop(next(iter(self._nodes))))


def first_of_each(runs: Sequence[Sequence[int]], known: Sequence[int]) -> list[int]:
    """Which of these texts to encode now, so that what several of them begin with is encoded once.

    A text waits for the next pass where an earlier one shares at least ``LEAST`` tokens more with it than the caller
    has of it: once that one is kept (:meth:`Prefixes.keep`), the text goes on from there (:meth:`Prefixes.longest`).

    Parameters
    ----------
    runs : sequence of token ids
        Whole texts.
    known : sequence of int
        Tokens of each that are in the tree already.

    Returns
    -------
    list of int
        Places of those to encode, in order; the first is always among them.
    """
    lengths = {held + LEAST for held in known}
    begun: set[bytes] = set()  # the beginnings of those chosen, of every length that is asked for
    places = []
    for place, (run, held) in enumerate(zip(runs, known, strict=True)):
        text, needed = _array(run).tobytes(), held + LEAST
        if len(run) < needed or text[: needed * _ITEM] not in begun:
            places.append(place)
            begun.update(text[: length * _ITEM] for length in lengths if length <= len(run))
    return places


def _array(ids: Sequence[int]) -> npt.NDArray[np.int64]:
    return np.array(ids, dtype=np.int64)


def _shared(a: npt.NDArray[np.int64], b: npt.NDArray[np.int64]) -> int:
    """Leading ids that are the same."""
    length = min(len(a), len(b))
    differ = a[:length] != b[:length]
    return int(differ.argmax()) if differ.any() else length

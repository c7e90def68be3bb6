"""Small forward passes over the tree, padded to shapes that recur: launching their kernels takes longer than they run.

The pass that encodes the last tokens of committed segments is one in every heartbeat; the scoring of few candidates is
another. A decode step has tensors of its own (:mod:`stars_fast.policy.steps`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from stars_fast.tree.attention import TreeContext
from stars_fast.tree.graphs import Captured, Pooled
from stars_fast.tree.segment_tree import TreePlan

# What the tokens of a small pass are padded to. Few, since a shape is captured when it is met; a GPU takes as long for
# one token of a large model as for a hundred, which wait for the weights.
_TOKENS = (1, 16, 64, 128, 192, 256, 512, 768, 1024)
# Above, a pass of a large model takes the device longer than its launches take the host.
MOST_TOKENS = _TOKENS[-1]
# Of rows that are longer than a token or two, a pass has so many tokens each, or more.
_TOKENS_A_ROW = 8
_ROW_BUCKETS = (1, 16, 32, 64, 96, 128)
_GROUP_BUCKETS = (1, 4, 16, 64, 128)
_BUCKET_STEP = 64
_LEAST_TRUNK = 256


def bucket(rows: int) -> int:
    """The number of rows of a decode step that ``rows`` are padded to: 1, 16, 32, 64, 96, 128, 192 and so on."""
    return _padded(rows, _ROW_BUCKETS)


def group_bucket(groups: int) -> int:
    """The number of requests of a decode step that ``groups`` are padded to, each of them costing attention an idle
    program a head: 1, 4, 16, 64, 128, 192 and so on.
    """
    return _padded(groups, _GROUP_BUCKETS)


def _padded(number: int, buckets: Sequence[int]) -> int:
    for size in buckets:
        if number <= size:
            return size
    return math.ceil(number / _BUCKET_STEP) * _BUCKET_STEP


def trunk_room(tokens: int) -> int:
    """The length that trunks of ``tokens`` are padded to: 256, 512, 1,024 and so on."""
    return max(_LEAST_TRUNK, 1 << (max(tokens, 1) - 1).bit_length())


class PassShape(NamedTuple):
    """Sizes of a pass's tensors: what its graph depends on. Its tokens decide the others, but for three kinds of rows:
    one token each, some for each of a few requests, some for one request.
    """

    tokens: int
    rows: int
    groups: int
    most_rows: int  # of a group
    most_queries: int  # of a row, and slots of its branch
    trunk: int
    logits: bool  # of each row's last token; else hidden states of all

    @classmethod
    def padded(cls, lengths: Sequence[int], groups: int, most_rows: int, trunk: int, logits: bool) -> PassShape | None:
        """With room for rows of these lengths, in so many groups; many share it. None where they are too many tokens.

        Most rows and queries are bounds that take no more work of Triton's kernels than what is there does, but for the
        first token of every group, and a table's room costs no more than the table.
        """
        tokens = sum(lengths)
        if tokens > MOST_TOKENS:
            return None
        size = next(size for size in _TOKENS if tokens <= size)
        if max(lengths) == most_rows == 1:
            return cls(size, size, size, 1, 1, trunk, logits)
        rows = _rows(size)
        if len(lengths) > rows:
            rows = size
        # Attention splits lists by how many groups there may be, and takes padding for work: with room for more than
        # its one group, the trunk of a request that runs alone would be read by a few of the processors.
        return cls(size, rows, 1 if groups == 1 else rows, rows, size, trunk, logits)

    @classmethod
    def usual(cls, trunk: int, logits: bool, single: int) -> Iterator[PassShape]:
        """Those that a call meets: rows of several tokens, for one request and for more, and where ``single`` requests
        run at most, one token each."""
        for size in _TOKENS:
            if size > 1:
                rows = _rows(size)
                yield from (cls(size, rows, groups, rows, size, trunk, logits) for groups in (rows, 1))
        for size in _TOKENS[: 1 + sum(size < single for size in _TOKENS)] if single else ():
            yield cls(size, size, size, 1, 1, trunk, logits)


def _rows(tokens: int) -> int:
    return max(tokens // _TOKENS_A_ROW, min(tokens, 16))


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
        sizes = shape.groups, shape.trunk, shape.rows, shape.most_queries
        self.plan = TreePlan.empty(*sizes, device, shape.tokens)  # of what the next run encodes
        self.output = torch.empty(0, device=device)

    def rest(self) -> None:
        """Without tokens."""
        self.plan.query_indptr.zero_()
        self.plan.group_indptr.zero_()
        self.plan.write_slots.zero_()

    def work(self) -> None:
        """The forward pass."""
        plan = self.plan
        context = TreeContext.of_whole_branches(self.model.pool, plan, self.shape.most_rows)
        last = {"logits_to_keep": (plan.query_indptr[1:].long() - 1).clamp(min=0)} if self.shape.logits else {}
        output = self.model.forward(plan.ids.long(), plan.positions.long(), context, **last)
        self.output = output.logits if self.shape.logits else output.last_hidden_state

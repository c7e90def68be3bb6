"""K decode steps of all candidates, over tensors that stay where they are, so that a CUDA graph can hold a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from stars_fast.ops import gather_logprobs, sample_step
from stars_fast.policy.leaf import Leaf, ProcessorError, RowProcessor
from stars_fast.tree.attention import TreeContext
from stars_fast.tree.graphs import Captured
from stars_fast.tree.model import TreeModel
from stars_fast.tree.passes import bucket, group_bucket
from stars_fast.tree.segment_tree import TreePlan


class Shape(NamedTuple):
    """Sizes of the tensors of a proposal: what a captured step depends on."""

    rows: int
    groups: int
    most_rows: int  # of a group
    trunk: int  # tokens that a trunk has room for
    length: int  # tokens of a segment
    eos: int  # most ids that end a text
    penalised: bool  # whether any row is, by what has been seen
    uncertain: bool = False  # whether segments end where entropy is high

    @classmethod
    def of(cls, leaves: Sequence[Leaf], plan: TreePlan) -> Shape:
        """Exactly what these need."""
        candidates, length = [leaf.candidates for leaf in leaves], max(leaf.length for leaf in leaves)
        eos = max(len(leaf.sampling.eos_token_ids) for leaf in leaves)
        penalised = any(leaf.sampling.repetition_penalty != 1.0 for leaf in leaves)
        uncertain = any(leaf.entropy < math.inf for leaf in leaves)
        trunk = plan.trunk_slots.shape[1]
        return cls(sum(candidates), len(leaves), max(candidates), trunk, length, eos, penalised, uncertain)

    def padded(self, trunk: int, length: int) -> Shape:
        """A shape that many others share, with room for trunks and segments of up to these lengths."""
        most_rows = 2
        while most_rows < self.most_rows:  # 2, 4, 16, 64: tiles of attention hardly differ in between
            most_rows *= 2 if most_rows == 2 else 4
        rows, groups, eos = bucket(self.rows), group_bucket(self.groups), 4 * math.ceil(max(self.eos, 1) / 4)
        return Shape(rows, groups, most_rows, trunk, length, eos, self.penalised, self.uncertain)


class Steps(Captured):
    """The tensors of a proposal, and what a decode step does to them. Padding rows are not alive.

    Attributes
    ----------
    tokens : torch.Tensor
        int64 ``[rows, length]``.
    logprobs, sampling_logprobs : torch.Tensor
        float32 ``[rows, length]``, nats; NaN where the policy's logits were not finite.
    position : torch.Tensor
        int32 ``[rows]``: how many tokens each row has drawn.
    alive : torch.Tensor
        bool ``[rows]``.
    """

    def __init__(self, policy: TreeModel, shape: Shape, logits: int) -> None:
        super().__init__(policy)
        self.read, self.written = policy.vocab_size, logits  # ids with an embedding, and with a logit
        self.shape = shape
        rows, device, int32 = shape.rows, policy.device, torch.int32

        def zeros(*size: int, dtype: torch.dtype = int32) -> torch.Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self.plan = TreePlan.empty(shape.groups, shape.trunk, rows, max(1, shape.length - 1), device)
        self.counts = zeros(5, rows)
        self.segment, self.attempt, self.limit, self.top_k, self.shortest = self.counts
        self.filters = zeros(5, rows, dtype=torch.float32)
        self.temperature, self.top_p, self.min_p, self.penalty, self.entropy = self.filters
        self.first_position = zeros(rows)  # after the trunk
        self.keys = zeros(rows, dtype=torch.int64)
        self.position, self.alive = zeros(rows), zeros(rows, dtype=torch.bool)
        self.step = zeros(1, dtype=torch.int64)  # tokens drawn by rows that go on
        self.tokens = zeros(rows, shape.length, dtype=torch.int64)
        self.logprobs, self.sampling_logprobs = zeros(2, rows, shape.length, dtype=torch.float32)
        self.query_indptr = torch.arange(rows + 1, dtype=int32, device=device)
        self.every_row = torch.arange(rows, device=device)
        self.eos = zeros(rows, shape.eos, dtype=torch.int64)
        self.seen = zeros(rows, logits, dtype=torch.bool) if shape.penalised else None
        self.processors: list[RowProcessor | None] = []
        self.failures: dict[int, str] = {}  # by row: what its logits processor raised

    def load(self, leaves: Sequence[Leaf], plan: TreePlan) -> None:
        """Start a proposal, and draw the first token of every row from its leaf's logits."""
        rows = len(plan.branches)
        assert len(leaves) <= self.shape.groups and rows <= self.shape.rows
        group = [g for g, leaf in enumerate(leaves) for _ in range(leaf.candidates)]
        attempt = [leaf.first_attempt + i for leaf in leaves for i in range(leaf.candidates)]

        def loaded(into: torch.Tensor, values: Sequence[Any]) -> None:
            into.copy_(torch.tensor(values, dtype=into.dtype, device="cpu"), non_blocking=True)

        self.groups = torch.tensor(group, device="cpu").to(self.tokens.device, non_blocking=True)  # [rows in use]
        self.plan.load(plan)
        self._rest_settings()
        settings = [leaf.sampling for leaf in leaves]
        of_leaves = [
            [leaf.segment for leaf in leaves],
            [0] * len(leaves),
            [leaf.length for leaf in leaves],
            [sampling.top_k for sampling in settings],
            [leaf.shortest for leaf in leaves],
        ]
        loaded(self.counts[:, :rows], [attempt if at == 1 else [v[g] for g in group] for at, v in enumerate(of_leaves)])
        names = ("temperature", "top_p", "min_p", "repetition_penalty")
        filters = [[getattr(sampling, name) for sampling in settings] for name in names]
        filters.append([leaf.entropy for leaf in leaves])
        loaded(self.filters[:, :rows], [[values[g] for g in group] for values in filters])
        if self.shape.eos:
            eos = [[*s.eos_token_ids, *[-1] * (self.shape.eos - len(s.eos_token_ids))] for s in settings]
            loaded(self.eos[:rows], [eos[g] for g in group])
        loaded(self.keys[:rows], [leaves[g].key for g in group])
        torch.index_select(plan.trunk_len, 0, self.groups, out=self.first_position[:rows])
        self.position.zero_()
        self.alive.zero_()
        self.alive[:rows] = True
        self.step.zero_()
        self.sampling_logprobs.zero_()  # what an earlier proposal left there is not this one's
        if self.seen is not None:
            nothing = torch.zeros_like(self.seen[0])
            seen = [nothing if leaf.seen is None else leaf.seen for leaf in leaves]
            self.seen[:rows] = torch.stack(seen)[self.groups]
        self.processors, self.failures = [leaves[g].processor for g in group], {}
        logits = torch.stack([leaf.logits for leaf in leaves])[self.groups]  # [rows in use, V]
        if rows < self.shape.rows:
            logits = torch.cat((logits, logits.new_zeros(self.shape.rows - rows, logits.shape[1])))
        self.draw(logits)

    def _rest_settings(self) -> None:
        """Neutral settings of every row."""
        self.counts.zero_()
        self.filters.fill_(1)
        self.min_p.zero_()
        self.entropy.fill_(math.inf)
        self.eos.fill_(-1)  # no token

    def rest(self) -> None:
        """All rows are dead."""
        self.alive.zero_()
        self._rest_settings()
        self.step.fill_(1)

    def work(self) -> None:
        """Encode the token drawn last, of every row, and draw the next."""
        self.draw(self.forward())

    def forward(self) -> torch.Tensor:
        """Logits ``[rows, V]`` after the token drawn last, of every row."""
        last = self.step - 1
        context = TreeContext(
            pool=self.model.pool,
            plan=self.plan,
            write_slots=self.plan.branch_slots.index_select(1, last)[:, 0],  # of padding rows slot 0
            branch_len=self.step.int().expand(self.shape.rows).contiguous(),
            query_indptr=self.query_indptr,
            max_rows=self.shape.most_rows,
            max_queries=1,
        )
        tokens = self.tokens.index_select(1, last)[:, 0]
        if self.written > self.read:
            tokens = tokens.clamp_max(self.read - 1)  # of rows that ended with what cannot be read
        # Rows that ended would walk past the last position, which a table of positions does not forgive.
        positions = torch.where(self.alive, self.first_position + last, 0)
        return self.model.forward(tokens, positions, context, logits_to_keep=self.every_row).logits[0]

    def draw(self, logits: torch.Tensor) -> None:
        """Sample one token per row from logits ``[rows, V]``."""
        raw = logits
        processed = self.graph is None and any(self.processors)
        if processed:
            logits = self._process(logits.float())
        before = self.alive.clone() if self.shape.uncertain else None
        token, logprob, sampling_logprob, entropy = sample_step(
            logits,
            self.keys,
            self.segment,
            self.attempt,
            self.position,
            self.alive,
            self.limit,
            self.temperature,
            self.top_k,
            self.top_p,
            self.min_p,
            self.penalty,
            self.seen,
            self.eos,
        )
        if self.written > self.read:
            self.alive.logical_and_(token < self.read)
        if before is not None:
            if processed:  # segments end by what the model gave
                entropy = torch.special.entr(raw.float().softmax(1)).sum(1)
            self._end_before(before & (entropy >= self.entropy) & (self.position > self.shortest))
        if processed:
            logprob = gather_logprobs(raw, token)
        for column, value in (
            (self.tokens, token),
            (self.logprobs, logprob),
            (self.sampling_logprobs, sampling_logprob),
        ):
            column.index_copy_(1, self.step, value[:, None])
        self.step += 1

    def unread(self, tokens: Sequence[int]) -> str | None:
        """Why a text with these tokens cannot be gone on with, if it cannot."""
        if self.written <= self.read or max(tokens, default=0) < self.read:
            return None
        return (
            f"id {max(tokens)} was drawn, for which the policy has no embedding: its head writes {self.written} ids "
            f"and its embedding reads {self.read}"
        )

    def _end_before(self, uncertain: torch.Tensor) -> None:
        """Take back the token just drawn of these rows ``[rows]``, and end their segments."""
        self.position.sub_(uncertain.int())
        self.alive.logical_and_(~uncertain)

    def _process(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits ``[rows, V]`` after each row's processor. A row whose processor raises ends there, and only that."""
        out, drawn = logits.clone(), self.tokens[:, : int(self.step)].tolist()
        for row, (processor, alive) in enumerate(zip(self.processors, self.alive.tolist(), strict=False)):
            if alive and processor is not None:
                try:
                    out[row] = processor(drawn[row], logits[row : row + 1])[0]
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:
                    self.failures[row] = ProcessorError.told(error)
                    self.alive[row] = False
        return out

"""K decode steps of all candidates, over tensors that stay where they are, so that a CUDA graph can hold a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from stars_fast.ops import gather_logprobs, sample_step
from stars_fast.policy.leaf import NOT_FINITE, Leaf, ProcessorError, RowProcessor
from stars_fast.policy.reader import Reader
from stars_fast.tree.graphs import Captured
from stars_fast.tree.lack import is_lack_of_memory
from stars_fast.tree.model import TreeModel
from stars_fast.tree.passes import bucket, group_bucket
from stars_fast.tree.segment_tree import TreePlan
from stars_fast.tree.upload import uploaded

_NEUTRAL = (1.0, 1.0, 0.0, 1.0, math.inf)  # temperature, top_p, min_p, repetition penalty, entropy


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


def _sizes(shape: Shape) -> list[int]:
    """Of what a proposal sets anew, as int64, each in whole 16 bytes: keys, groups, EOS ids and the step; of four bytes
    a row five counts, five filters and the position; and of one byte whether it is alive.
    """
    sizes = [8 * shape.rows, 8 * shape.rows, 8 * shape.rows * shape.eos, 8, *[20 * shape.rows] * 2, 4 * shape.rows]
    return [-(-size // 16) * 2 for size in (*sizes, shape.rows)]


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

    not_finite = NOT_FINITE  # what is said of rows whose logits are not

    def __init__(
        self, policy: TreeModel, shape: Shape, logits: int, barred: torch.Tensor | None = None, prompts: int = 1
    ) -> None:
        super().__init__(policy)
        self.read, self.written = policy.vocab_size, logits  # ids with an embedding, and with a logit
        self.barred = barred  # ids that are not drawn
        self.shape = shape
        rows, device, int32 = shape.rows, policy.device, torch.int32

        def zeros(*size: int, dtype: torch.dtype = int32) -> torch.Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self.reader = self.reads(policy, prompts)
        self.plan = self.reader.plan
        # All that a proposal sets anew is one buffer, so that one copy sets it.
        self.settings = torch.zeros(sum(_sizes(shape)), dtype=torch.int64, device=device)
        keys, groups, eos, step, counts, filters, position, alive = self.settings.split(_sizes(shape))
        self.keys, self.every_group = keys[:rows], groups[:rows]
        self.eos = eos[: rows * shape.eos].view(rows, shape.eos)
        self.step = step[:1]  # tokens drawn by rows that go on
        self.counts = counts.view(int32)[: 5 * rows].view(5, rows)
        self.segment, self.attempt, self.limit, self.top_k, self.shortest = self.counts
        self.filters = filters.view(torch.float32)[: 5 * rows].view(5, rows)
        self.temperature, self.top_p, self.min_p, self.penalty, self.entropy = self.filters
        self.position, self.alive = position.view(int32)[:rows], alive.view(torch.bool)[:rows]
        self.tokens = zeros(rows, shape.length, dtype=torch.int64)
        self.logprobs, self.sampling_logprobs = zeros(2, rows, shape.length, dtype=torch.float32)
        self.seen = zeros(rows, logits, dtype=torch.bool) if shape.penalised else None
        self.processors: list[RowProcessor | None] = []
        self.failures: dict[int, str] = {}  # by row: what its logits processor raised

    def reads(self, model: TreeModel, prompts: int) -> Reader:
        """A model's part in these steps, which has each row below so many prompts."""
        rows, groups, most_rows, trunk, length, *_ = self.shape
        return Reader(model, rows, groups, most_rows, trunk, length, prompts)

    def load(self, leaves: Sequence[Leaf], plan: TreePlan) -> None:
        """Start a proposal, and draw the first token of every row from its leaf's logits."""
        rows = sum(leaf.candidates for leaf in leaves)
        assert len(leaves) <= self.shape.groups and rows <= self.shape.rows
        (settings,) = uploaded([self._settings(leaves)], self.settings.device)
        self.settings.copy_(settings)
        groups = self.every_group[:rows]
        self.reader.load(plan, groups, len(leaves))
        self.sampling_logprobs.zero_()  # what an earlier proposal left there is not this one's
        if self.seen is not None:
            nothing = torch.zeros_like(self.seen[0])
            seen = [nothing if leaf.seen is None else leaf.seen for leaf in leaves]
            self.seen[:rows] = torch.stack(seen)[groups]
        self.processors, self.failures = [leaf.processor for leaf in leaves for _ in range(leaf.candidates)], {}
        self.begin(leaves, groups)

    def begin(self, leaves: Sequence[Leaf], groups: torch.Tensor) -> None:
        """Draw the first token of every row; those in use are of these groups ``[rows in use]``."""
        self.draw(self.below([leaf.logits for leaf in leaves], groups))

    def below(self, logits: Sequence[torch.Tensor], groups: torch.Tensor) -> torch.Tensor:
        """Logits ``[rows, V]`` at the beginning of each row, from those of its leaf ``[V]``."""
        used = torch.stack(list(logits))[groups]  # [rows in use, V]
        if len(groups) == self.shape.rows:
            return used
        return torch.cat((used, used.new_zeros(self.shape.rows - len(groups), used.shape[1])))

    def _settings(self, leaves: Sequence[Leaf]) -> np.ndarray:
        """What :attr:`settings` hold when a proposal of these begins, int64; neutral where no row is in use."""
        shape, sampled = self.shape, [leaf.sampling for leaf in leaves]
        candidates = np.array([leaf.candidates for leaf in leaves], dtype=np.int64)
        group, rows = np.repeat(np.arange(len(leaves)), candidates), int(candidates.sum())
        keys, groups, eos, step, counts, filters, position, alive = [
            np.zeros(size, dtype=np.int64) for size in _sizes(shape)
        ]
        keys[:rows], groups[:rows], eos[:] = np.array([leaf.key for leaf in leaves])[group], group, -1  # no token
        if shape.eos:
            ends = [[*one.eos_token_ids, *[-1] * (shape.eos - len(one.eos_token_ids))] for one in sampled]
            eos[: rows * shape.eos] = np.array(ends)[group].reshape(-1)
        of_leaves = [
            [leaf.segment for leaf in leaves],
            [leaf.first_attempt for leaf in leaves],
            [leaf.length for leaf in leaves],
            [one.top_k for one in sampled],
            [leaf.shortest for leaf in leaves],
        ]
        ints = counts.view(np.int32)[: 5 * shape.rows].reshape(5, shape.rows)
        ints[:, :rows] = np.array(of_leaves)[:, group]
        ints[1, :rows] += np.arange(rows, dtype=np.int32) - np.repeat(np.cumsum(candidates) - candidates, candidates)
        names = ("temperature", "top_p", "min_p", "repetition_penalty")
        values = [[getattr(one, name) for one in sampled] for name in names]
        floats = filters.view(np.float32)[: 5 * shape.rows].reshape(5, shape.rows)
        floats[:] = np.array(_NEUTRAL, dtype=np.float32)[:, None]
        floats[:, :rows] = np.array([*values, [leaf.entropy for leaf in leaves]])[:, group]
        alive.view(np.bool_)[:rows] = True
        return np.concatenate((keys, groups, eos, step, counts, filters, position, alive))

    def rest(self) -> None:
        """All rows are dead."""
        self.settings.zero_()
        self.filters.copy_(torch.tensor(_NEUTRAL, device="cpu")[:, None])
        self.eos.fill_(-1)  # no token
        self.step.fill_(1)

    def work(self) -> None:
        """Encode the token drawn last, of every row, and draw the next."""
        self.draw(self.forward())

    def forward(self) -> torch.Tensor:
        """Logits ``[rows, V]`` after the token drawn last, of every row."""
        return self.reader.forward(self.tokens, self.step, self.alive)[0]

    def draw(self, logits: torch.Tensor, raw: torch.Tensor | None = None) -> None:
        """Sample one token per row from logits ``[rows, V]``. ``raw`` are the policy's, where those are others."""
        given, raw = logits, logits if raw is None else raw
        processed = self.graph is None and any(self.processors)
        if processed:
            logits = self._process(logits.float())
        if self.barred is not None:
            logits = logits.index_fill(1, self.barred, -math.inf)
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
            if logits is not given:  # segments end by what the models gave
                entropy = torch.special.entr(given.float().softmax(1)).sum(1)
            self._end_before(before & (entropy >= self.entropy) & (self.position > self.shortest))
        if logits is not raw:
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
                except Exception as error:
                    if is_lack_of_memory(error):
                        raise
                    self.failures[row] = ProcessorError.told(error)
                    self.alive[row] = False
        return out

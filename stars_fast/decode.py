"""K decode steps of all candidates, over tensors that stay where they are, so that a CUDA graph can hold a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from stars_fast.ops import gather_logprobs, sample_step
from stars_fast.tree.attention import TreeContext
from stars_fast.tree.graphs import Captured
from stars_fast.tree.passes import bucket
from stars_fast.tree.segment_tree import TreePlan

if TYPE_CHECKING:
    from stars_fast.policy import Policy

# Called once per row with the candidate's ids so far and its logits [1, V]; returns the processed logits [1, V].
RowProcessor = Callable[[list[int], torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Sampling:
    """How the policy is sampled. Neutral values switch a filter off."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    eos_token_ids: tuple[int, ...] = ()


@dataclass
class Leaf:
    """What a request contributes to a proposal."""

    node: int
    logits: torch.Tensor  # [V], of the next token
    key: int
    segment: int
    first_attempt: int
    candidates: int
    length: int  # tokens to draw per candidate
    seen: torch.Tensor | None = None  # [V] bool, ids in prompt and response; for the repetition penalty
    processor: RowProcessor | None = None
    entropy: float = math.inf  # nats: a segment ends before a token whose distribution, as the model gave it, has more
    shortest: int = 1  # once it has this many tokens


class Shape(NamedTuple):
    """Sizes of the tensors of a proposal: what a captured step depends on."""

    rows: int
    groups: int
    most_rows: int  # of a group
    trunk: int  # tokens that a trunk has room for
    length: int  # tokens of a segment
    eos: int  # ids that end a text
    penalised: bool  # by what has been seen
    uncertain: bool = False  # whether segments end where entropy is high

    @classmethod
    def of(cls, leaves: Sequence[Leaf], plan: TreePlan, sampling: Sampling) -> Shape:
        """Exactly what these need."""
        candidates, length = [leaf.candidates for leaf in leaves], max(leaf.length for leaf in leaves)
        eos, penalised = len(sampling.eos_token_ids), sampling.repetition_penalty != 1.0
        uncertain = any(leaf.entropy < math.inf for leaf in leaves)
        trunk = plan.trunk_slots.shape[1]
        return cls(sum(candidates), len(leaves), max(candidates), trunk, length, eos, penalised, uncertain)

    def padded(self, trunk: int, length: int) -> Shape:
        """A shape that many others share, with room for trunks and segments of up to these lengths."""
        most_rows, eos = 1 << (self.most_rows - 1).bit_length(), 4 * math.ceil(self.eos / 4)
        rows, groups = bucket(self.rows), bucket(self.groups)
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

    def __init__(self, policy: Policy, shape: Shape) -> None:
        super().__init__(policy)
        self.shape = shape
        rows, device, int32 = shape.rows, policy.device, torch.int32

        def zeros(*size: int, dtype: torch.dtype = int32) -> torch.Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self.plan = TreePlan.empty(shape.groups, shape.trunk, rows, max(1, shape.length - 1), device)
        self.row_state = zeros(4, rows)
        self.segment, self.attempt, self.limit, self.first_position = self.row_state  # first_position: after the trunk
        self.keys = zeros(rows, dtype=torch.int64)
        self.position, self.alive = zeros(rows), zeros(rows, dtype=torch.bool)
        self.step = zeros(1, dtype=torch.int64)  # tokens drawn by rows that go on
        self.tokens = zeros(rows, shape.length, dtype=torch.int64)
        self.logprobs, self.sampling_logprobs = zeros(2, rows, shape.length, dtype=torch.float32)
        self.query_indptr = torch.arange(rows + 1, dtype=int32, device=device)
        self.every_row = torch.arange(rows, device=device)
        self.eos = zeros(rows, shape.eos, dtype=torch.int64)
        self.temperature, self.top_p, self.min_p, self.penalty = zeros(4, rows, dtype=torch.float32)
        self.top_k = zeros(rows)
        self.seen = zeros(rows, policy.vocab_size, dtype=torch.bool) if shape.penalised else None
        self.entropy, self.shortest = zeros(rows, dtype=torch.float32), zeros(rows)
        self.processors: list[RowProcessor | None] = []

    def load(self, leaves: Sequence[Leaf], plan: TreePlan, sampling: Sampling) -> None:
        """Start a proposal, and draw the first token of every row from its leaf's logits."""
        rows = len(plan.branches)
        assert len(leaves) <= self.shape.groups and rows <= self.shape.rows
        group = [g for g, leaf in enumerate(leaves) for _ in range(leaf.candidates)]
        rank = [i for leaf in leaves for i in range(leaf.candidates)]
        state = torch.tensor(
            [
                [leaves[g].segment for g in group],
                [leaves[g].first_attempt + i for g, i in zip(group, rank, strict=True)],
                [leaves[g].length for g in group],
            ],
            dtype=torch.int32,
            device="cpu",
        )
        self.groups = torch.tensor(group, device="cpu").to(self.tokens.device, non_blocking=True)  # [rows in use]
        self.plan.load(plan)
        self._set(sampling)
        self.row_state[:3, :rows].copy_(state, non_blocking=True)
        self.keys[:rows].copy_(torch.tensor([leaves[g].key for g in group], device="cpu"), non_blocking=True)
        torch.index_select(plan.trunk_len, 0, self.groups, out=self.first_position[:rows])
        self.position.zero_()
        self.alive.zero_()
        self.alive[:rows] = True
        self.step.zero_()
        self.sampling_logprobs.zero_()  # what an earlier proposal left there is not this one's
        if self.seen is not None:
            self.seen[:rows] = torch.stack([_seen(leaf) for leaf in leaves])[self.groups]
        if self.shape.uncertain:
            self.entropy[:rows].copy_(
                torch.tensor([leaves[g].entropy for g in group], dtype=torch.float32, device="cpu"), non_blocking=True
            )
            shortest = torch.tensor([leaves[g].shortest for g in group], dtype=torch.int32, device="cpu")
            self.shortest[:rows].copy_(shortest, non_blocking=True)
        self.processors = [leaves[g].processor for g in group]
        logits = torch.stack([leaf.logits for leaf in leaves])[self.groups]  # [rows in use, V]
        if rows < self.shape.rows:
            logits = torch.cat((logits, logits.new_zeros(self.shape.rows - rows, logits.shape[1])))
        self.draw(logits)

    def _set(self, sampling: Sampling) -> None:
        self.temperature.fill_(sampling.temperature)
        self.top_k.fill_(sampling.top_k)
        self.top_p.fill_(sampling.top_p)
        self.min_p.fill_(sampling.min_p)
        self.penalty.fill_(sampling.repetition_penalty)
        self.eos.fill_(-1)  # no token
        for place, token in enumerate(sampling.eos_token_ids):
            self.eos[:, place] = token

    def rest(self) -> None:
        """All rows are dead."""
        self.alive.zero_()
        self._set(Sampling())
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

    def _end_before(self, uncertain: torch.Tensor) -> None:
        """Take back the token just drawn of these rows ``[rows]``, and end their segments."""
        self.position.sub_(uncertain.int())
        self.alive.logical_and_(~uncertain)

    def _process(self, logits: torch.Tensor) -> torch.Tensor:
        out, drawn = logits.clone(), self.tokens[:, : int(self.step)].tolist()
        for row, (processor, alive) in enumerate(zip(self.processors, self.alive.tolist(), strict=False)):
            if alive and processor is not None:
                out[row] = processor(drawn[row], logits[row : row + 1])[0]
        return out


def _seen(leaf: Leaf) -> torch.Tensor:
    if leaf.seen is None:
        raise ValueError("a repetition penalty needs the ids seen so far")
    return leaf.seen

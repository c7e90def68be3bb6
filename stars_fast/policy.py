"""Runs the policy over the tree: prefill, and K decode steps that draw candidates side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from stars_fast.ops import gather_logprobs, sample_step
from stars_fast.tree.attention import TreeContext
from stars_fast.tree.model import TreeModel
from stars_fast.tree.segment_tree import TreePlan

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


@dataclass
class Draw:
    """One candidate as it was drawn."""

    node: int  # its branch: the keys and values of all its tokens but the last
    tokens: list[int]
    logprobs: list[float]
    sampling_logprobs: list[float]
    ended: bool  # by EOS
    finite: bool  # False where the policy's logits were not

    def cut(self, length: int) -> None:
        """Keep the first ``length`` tokens. The branch keeps its slots: a candidate that is cut ends its request."""
        self.tokens = self.tokens[:length]
        self.logprobs = self.logprobs[:length]
        self.sampling_logprobs = self.sampling_logprobs[:length]


class Policy(TreeModel):
    """A causal language model on a tree of slots."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model, model, "policy")

    def prefill(self, leaves: Sequence[int], tokens: Sequence[Sequence[int]]) -> tuple[list[int], list[torch.Tensor]]:
        """Append tokens below each leaf (-1: a fresh prompt). Returns new nodes and the next tokens' logits ``[V]``."""
        nodes, outputs = self.extend(leaves, tokens, logits_to_keep=0)
        return nodes, [output.logits[0, place] for output, _, place in outputs]

    def propose(self, leaves: Sequence[Leaf], sampling: Sampling) -> list[list[Draw]]:
        """Draw ``leaf.candidates`` segments of up to ``leaf.length`` tokens below each leaf, all in parallel.

        The first token comes from the leaf's logits; a segment of K tokens costs K - 1 forward passes.
        """
        rows = [leaf.candidates for leaf in leaves]
        group = [g for g, n in enumerate(rows) for _ in range(n)]
        lengths = [leaves[g].length for g in group]
        plan = self.plan([leaf.node for leaf in leaves], rows, [length - 1 for length in lengths])
        steps = _Steps(self, leaves, plan, group, lengths, sampling)
        logits = torch.stack([leaf.logits for leaf in leaves])[steps.group]  # [B, V]
        for step in range(max(lengths)):
            if step:
                logits = steps.forward(step)
            steps.draw(logits)
            if self.device.type == "cpu" and not steps.alive.any():
                break
        draws = iter(steps.draws())
        return [[next(draws) for _ in range(n)] for n in rows]


class _Steps:
    """The tensors of one proposal, and what a decode step does to them."""

    def __init__(
        self,
        policy: Policy,
        leaves: Sequence[Leaf],
        plan: TreePlan,
        group: list[int],
        lengths: list[int],
        sampling: Sampling,
    ) -> None:
        self.policy, self.leaves, self.plan, self.sampling = policy, leaves, plan, sampling
        device, rows = policy.device, len(group)
        self.group = torch.tensor(group, device=device)  # [B]
        first_row = plan.group_indptr[:-1][self.group]
        rank = torch.arange(rows, device=device, dtype=torch.int32) - first_row
        attempt = torch.tensor([leaf.first_attempt for leaf in leaves], dtype=torch.int32, device=device)
        segment = torch.tensor([leaf.segment for leaf in leaves], dtype=torch.int32, device=device)
        self.attempt = attempt[self.group] + rank
        self.segment = segment[self.group]
        self.keys = torch.tensor([leaf.key for leaf in leaves], device=device)[self.group]
        self.limit = torch.tensor(lengths, dtype=torch.int32, device=device)
        self.position = torch.zeros(rows, dtype=torch.int32, device=device)
        self.alive = torch.ones(rows, dtype=torch.bool, device=device)
        self.trunk_len = plan.trunk_len[self.group]
        self.query_indptr = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self.max_rows = max(leaf.candidates for leaf in leaves)
        self.every_row = torch.arange(rows, device=device)
        self.eos = torch.tensor(sampling.eos_token_ids, dtype=torch.int64, device=device)
        self.filters = (
            torch.full((rows,), sampling.temperature, device=device),
            torch.full((rows,), sampling.top_k, dtype=torch.int32, device=device),
            torch.full((rows,), sampling.top_p, device=device),
            torch.full((rows,), sampling.min_p, device=device),
            torch.full((rows,), sampling.repetition_penalty, device=device),
        )
        penalised = sampling.repetition_penalty != 1.0
        self.seen = torch.stack([_seen(leaf) for leaf in leaves])[self.group] if penalised else None  # [B, V]
        self.drawn: list[
            tuple[torch.Tensor, torch.Tensor, torch.Tensor]
        ] = []  # per step: token, logprob, sampling logprob

    def forward(self, step: int) -> torch.Tensor:
        """Encode the token drawn last, of every row; returns the next logits ``[B, V]``."""
        slots = self.plan.branch_slots[:, step - 1]
        context = TreeContext(
            pool=self.policy.pool,
            plan=self.plan,
            write_slots=torch.where(self.alive, slots, 0),  # rows that ended write to slot 0
            branch_len=torch.full_like(self.position, step),
            query_indptr=self.query_indptr,
            max_rows=self.max_rows,
            max_queries=1,
        )
        tokens = self.drawn[-1][0]
        positions = self.trunk_len + (step - 1)
        return self.policy.forward(tokens, positions, context, logits_to_keep=self.every_row).logits[0]

    def draw(self, logits: torch.Tensor) -> None:
        """Sample one token per row from logits ``[B, V]``."""
        raw = logits
        processed = any(leaf.processor for leaf in self.leaves)
        if processed:
            logits = self._process(logits.float())
        token, logprob, sampling_logprob, _ = sample_step(
            logits,
            self.keys,
            self.segment,
            self.attempt,
            self.position,
            self.alive,
            self.limit,
            *self.filters,
            self.seen,
            self.eos,
        )
        if processed:
            logprob = gather_logprobs(raw, token)
        self.drawn.append((token, logprob, sampling_logprob))

    def _process(self, logits: torch.Tensor) -> torch.Tensor:
        out = logits.clone()
        drawn = torch.stack([token for token, _, _ in self.drawn], 1).tolist() if self.drawn else [[]] * len(logits)
        for row, (group, alive) in enumerate(zip(self.group.tolist(), self.alive.tolist(), strict=True)):
            processor = self.leaves[group].processor
            if alive and processor is not None:
                out[row] = processor(drawn[row], logits[row : row + 1])[0]
        return out

    def draws(self) -> list[Draw]:
        """Copy what was drawn to the host: the one look per heartbeat."""
        tokens, logprobs, sampling_logprobs = (
            torch.stack(column, 1).tolist() for column in zip(*self.drawn, strict=True)
        )
        eos = set(self.sampling.eos_token_ids)
        draws = []
        for row, length in enumerate(self.position.tolist()):
            # Logits that are not finite end a row with a NaN log-probability.
            finite = not any(math.isnan(value) for value in sampling_logprobs[row])
            ids = tokens[row][:length]
            draws.append(
                Draw(
                    node=self.plan.branches[row],
                    tokens=ids,
                    logprobs=logprobs[row][:length],
                    sampling_logprobs=sampling_logprobs[row][:length],
                    ended=bool(ids) and ids[-1] in eos,
                    finite=finite,
                )
            )
        return draws


def _seen(leaf: Leaf) -> torch.Tensor:
    if leaf.seen is None:
        raise ValueError("a repetition penalty needs the ids seen so far")
    return leaf.seen

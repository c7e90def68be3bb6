"""Bytes, operations and times of forward passes over the tree of slots.

A pass is a sequence of *parts* that cannot overlap: linear layers, attention, head. Its **floor** is what no program
can beat, ``max(bytes / bandwidth, operations / matrix rate)`` over the whole pass at the peaks. Its **achievable** time
adds up ``max(bytes / (f bandwidth), operations / (g matrix rate))`` part by part, and the launches. Each pass reads its
weights from device memory: right for models larger than the L2 cache. Activations between layers are not counted: a
decode step keeps them in that cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

from benchmarks.roofline.cost import ModelCost
from benchmarks.roofline.gpus import Gpu

# Beside the layers: embedding, last norm, head, draw (or score).
_KERNELS_OUTSIDE_LAYERS = 4


class Part(NamedTuple):
    """Work that runs before or after other parts, not beside them."""

    bytes: float
    operations: float


@dataclass(frozen=True)
class Stage:
    """A piece of a heartbeat."""

    name: str
    bytes: float = 0.0  # that must be moved from and to device memory
    operations: float = 0.0
    attention_bytes: float = 0.0  # keys and values in ``bytes``, a trunk counted once per request
    per_row_attention_bytes: float = 0.0  # that attention would move if every row read its trunk for itself
    floor_s: float = 0.0  # seconds at the peaks, perfectly overlapped
    achievable_s: float = 0.0  # seconds with the shares of :class:`Achievable`, launches included
    launch_s: float = 0.0  # seconds of launches in ``achievable_s``

    @classmethod
    def of(
        cls,
        name: str,
        parts: Sequence[Part],
        gpu: Gpu,
        *,
        kernels: int,
        attention_bytes: float = 0.0,
        per_row_attention_bytes: float = 0.0,
    ) -> Stage:
        """The stage that runs these parts one after another, in so many kernels."""
        bytes_, operations = sum(part.bytes for part in parts), sum(part.operations for part in parts)
        achievable = gpu.achievable
        bandwidth, matrix_rate = achievable.bandwidth * gpu.bandwidth, achievable.matrix * gpu.matrix_rate
        launch_s = kernels * achievable.launch_s
        return cls(
            name,
            bytes_,
            operations,
            attention_bytes,
            per_row_attention_bytes,
            floor_s=max(bytes_ / gpu.bandwidth, operations / gpu.matrix_rate),
            achievable_s=sum(max(part.bytes / bandwidth, part.operations / matrix_rate) for part in parts) + launch_s,
            launch_s=launch_s,
        )

    @classmethod
    def total(cls, name: str, stages: Iterable[tuple[float, Stage]]) -> Stage:
        """Stages one after another, each so many times (an expectation: not always a whole number)."""
        stages = list(stages)
        amounts = [field.name for field in fields(cls) if field.name != "name"]
        return cls(
            name, **{amount: sum(times * getattr(stage, amount) for times, stage in stages) for amount in amounts}
        )


def decode_step(
    cost: ModelCost,
    rows: float,
    groups: float,
    context: float,
    branch: float,
    gpu: Gpu,
) -> Stage:
    """One decode step: forward pass of one token a row, append, and a draw.

    Parameters
    ----------
    cost : ModelCost
        Of the policy.
    rows, groups : float
        Candidates, and requests they belong to: rows of a request share its trunk.
    context : float
        Tokens of a trunk.
    branch : float
        Tokens of a row that lie in slots of its own before this step.
    gpu : Gpu
    """
    return _forward("decode step", cost, rows, groups, context, branch, 1, gpu)


def proposal(
    cost: ModelCost,
    rows: float,
    groups: float,
    context: float,
    steps: int,
    gpu: Gpu,
    *,
    behind: float,
    extends: float = 1.0,
) -> Stage:
    """Candidates of ``steps`` tokens: the leaves' logits, a draw of every row's first token, decode steps.

    Parameters are those of :func:`decode_step`, and

    behind : float
        Requests whose last token is encoded first, since they have just committed it. Others have their leaf's logits.
    extends : float
        Share of the heartbeats in which there are any.
    """
    extension = decode_step(cost, behind, behind, context - 1, 0, gpu)
    step = decode_step(cost, rows, groups, context, max(steps / 2 - 1, 0), gpu)
    first = Stage.of("draw", [Part(_logit_bytes(cost, rows), 0.0)], gpu, kernels=1)
    return Stage.total("propose", [(extends, extension), (1.0, first), (steps - 1.0, step)])


def score_pass(
    cost: ModelCost,
    rows: float,
    groups: float,
    context: float,
    segment: float,
    gpu: Gpu,
    tail: float = 0.0,
) -> Stage:
    """One packed pass of the reward model over ``segment`` new tokens a row and ``tail`` tokens of its template.

    Parameters are those of :func:`decode_step`; scored rows have no tokens in slots of their own before.
    """
    return _forward("score", cost, rows, groups, context, 0.0, segment + tail, gpu)


def prefill(cost: ModelCost, prompts: float, length: float, gpu: Gpu) -> Stage:
    """One packed pass over fresh prompts of ``length`` tokens."""
    return _forward("prefill", cost, prompts, prompts, 0.0, 0.0, length, gpu)


def _forward(
    name: str,
    cost: ModelCost,
    rows: float,
    groups: float,
    context: float,
    branch: float,
    queries: float,
    gpu: Gpu,
) -> Stage:
    """``queries`` new tokens in each of ``rows`` rows; the head for the last of each row."""
    itemsize, tokens = cost.dtype.itemsize, rows * queries
    shared, per_row, operations = _attention(cost, rows, groups, context, branch, queries)
    parts = [
        Part(cost.body_bytes + tokens * cost.hidden * itemsize, 2 * cost.active * tokens),
        Part(shared, operations),
        Part(cost.head_bytes + 2 * _logit_bytes(cost, rows), 2 * cost.head * rows),  # logits written, then read
    ]
    kernels = gpu.achievable.kernels_per_layer * len(cost.layers) + _KERNELS_OUTSIDE_LAYERS
    return Stage.of(name, parts, gpu, kernels=kernels, attention_bytes=shared, per_row_attention_bytes=per_row)


def _logit_bytes(cost: ModelCost, rows: float) -> float:
    return rows * cost.vocab * cost.dtype.itemsize


def _attention(
    cost: ModelCost, rows: float, groups: float, context: float, branch: float, queries: float
) -> tuple[float, float, float]:
    """Bytes with a shared trunk, bytes with a trunk per row, and operations, over all layers.

    New keys are written once and read back. In a layer with a window, the first query sees the most of the trunk.
    """
    shared = per_row = operations = 0.0
    own = branch + queries
    for layer in cost.layers:
        window = float("inf") if layer.window is None else layer.window
        trunk = min(context, max(window - branch - 1, 0.0))
        branch_read = min(own, window + queries - 1)
        seen = min(context + branch + (queries + 1) / 2, window)  # keys of the mean query
        kv_bytes = layer.kv_elements * cost.dtype.itemsize
        shared += kv_bytes * (groups * trunk + rows * (branch_read + queries))
        per_row += kv_bytes * rows * (trunk + branch_read + queries)
        operations += layer.operations_per_key * rows * queries * seen
    return shared, per_row, operations

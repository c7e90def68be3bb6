"""Runs the policy over the tree: prefill, and K decode steps that draw candidates side by side."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from stars_fast.decode import Leaf, Sampling, Shape, Steps
from stars_fast.tree.model import TreeModel

_TRUNK_STEP = 256  # trunks have room for a multiple of it, so that calls share graphs


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
    """A causal language model on a tree of slots.

    Parameters
    ----------
    model : transformers causal LM
    cuda_graphs : bool
        Whether decode steps on a CUDA device are captured: once for every number of rows that they are padded to
        (:func:`stars_fast.decode.bucket`), kept until the pool or the weights move.
    torch_compile : bool
        Whether the decoder layers of a captured step are compiled.
    """

    def __init__(self, model: PreTrainedModel, cuda_graphs: bool = True, torch_compile: bool = True) -> None:
        super().__init__(model, model, "policy")
        self.padded = cuda_graphs and self.device.type == "cuda"
        self.torch_compile = torch_compile
        self._room = (0, 0)  # largest trunk and segment of this call
        self._steps: dict[Shape, Steps] = {}
        self._seen_by_graphs: tuple[Any, ...] = ()
        self._graph_pool: Any = None

    def begin(self, tokens: int, longest: int, segment_length: int) -> None:
        """Make room for ``tokens`` slots, trunks of up to ``longest`` tokens and segments of ``segment_length``."""
        self.allocate(tokens)
        self._room = (math.ceil(longest / _TRUNK_STEP) * _TRUNK_STEP, segment_length)
        if self.padded:
            now = (self.pools_made, *_addresses(self.model))
            if now != self._seen_by_graphs:
                self._steps.clear()
            self._seen_by_graphs = now

    def graph_pool(self) -> Any:
        """The memory that all graphs share: one runs at a time."""
        if self._graph_pool is None:
            self._graph_pool = torch.cuda.graph_pool_handle()
        return self._graph_pool

    def prefill(self, leaves: Sequence[int], tokens: Sequence[Sequence[int]]) -> tuple[list[int], list[torch.Tensor]]:
        """Append tokens below each leaf (-1: a fresh prompt). Returns new nodes and the next tokens' logits ``[V]``."""
        nodes, outputs = self.extend(leaves, tokens, logits_to_keep=0)
        return nodes, [output.logits[0, place] for output, _, place in outputs]

    def propose(self, leaves: Sequence[Leaf], sampling: Sampling) -> list[list[Draw]]:
        """Draw ``leaf.candidates`` segments of up to ``leaf.length`` tokens below each leaf, all in parallel.

        The first token comes from the leaf's logits; a segment of K tokens costs K - 1 forward passes.
        """
        rows = [leaf.candidates for leaf in leaves]
        lengths = [leaf.length for leaf in leaves for _ in range(leaf.candidates)]
        plan = self.plan([leaf.node for leaf in leaves], rows, [length - 1 for length in lengths])
        steps = self._prepared(Shape.of(leaves, plan, sampling), any(leaf.processor for leaf in leaves))
        steps.load(leaves, plan)
        for _ in range(1, max(lengths)):
            if self.device.type == "cpu" and not steps.alive.any():
                break
            steps.advance()
        draws = iter(_draws(steps, plan.branches))
        return [[next(draws) for _ in range(n)] for n in rows]

    def _prepared(self, shape: Shape, processed: bool) -> Steps:
        """Tensors for a proposal of this shape. A user's logits processors run on the host: no graph holds them."""
        if processed or not self.padded:
            return Steps(self, shape)
        shape = shape.padded(*self._room)
        if shape not in self._steps:
            self._steps[shape] = self._captured(shape)
        return self._steps[shape]

    def _captured(self, shape: Shape) -> Steps:
        steps = Steps(self, shape)
        if self.device.type != "cuda":
            return steps
        if self.torch_compile:
            from stars_fast.tree.compiled import CompilationError, compiled_layers  # imports torch's compiler: a second

            try:
                with compiled_layers(self.model):
                    steps.capture()
                return steps
            except CompilationError as error:
                self.torch_compile = False
                warnings.warn(
                    f"the layers of {type(self.model).__name__} do not compile, so decode steps run without: {error}",
                    stacklevel=2,
                )
                steps = Steps(self, shape)
        steps.capture()
        return steps


def _addresses(model: PreTrainedModel) -> tuple[Any, ...]:
    """What a captured graph takes for granted: where weights lie, and which adapters are on."""
    adapters = tuple(
        (str(module.active_adapters), module.disable_adapters, module.merged)
        for module in model.modules()
        if hasattr(module, "active_adapters") and hasattr(module, "disable_adapters") and hasattr(module, "merged")
    )
    return (*(parameter.data_ptr() for parameter in model.parameters()), adapters)


def _draws(steps: Steps, branches: Sequence[int]) -> list[Draw]:
    """Copy what was drawn to the host: the one look per heartbeat."""
    rows, eos = len(branches), set(steps.shape.sampling.eos_token_ids)
    lengths = steps.position[:rows].tolist()
    tokens, logprobs, sampling_logprobs = (
        column[:rows].tolist() for column in (steps.tokens, steps.logprobs, steps.sampling_logprobs)
    )
    draws = []
    for row, (node, length) in enumerate(zip(branches, lengths, strict=True)):
        ids = tokens[row][:length]
        draws.append(
            Draw(
                node=node,
                tokens=ids,
                logprobs=logprobs[row][:length],
                sampling_logprobs=sampling_logprobs[row][:length],
                ended=bool(ids) and ids[-1] in eos,
                # Logits that are not finite end a row with a NaN log-probability.
                finite=not any(math.isnan(value) for value in sampling_logprobs[row][: length + 1]),
            )
        )
    return draws

"""Decoder layers compiled by torch: norms, rotary embeddings and activations become few kernels."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch._dynamo
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from stars_fast.locks import Lock
from stars_fast.tree.attention import TreeContext
from stars_fast.tree.difference import probe, relative, relative_tolerance, values
from stars_fast.tree.joined import join
from stars_fast.tree.segment_tree import SegmentTree, plan
from stars_fast.tree.slots import SlotPool

CompilationError = (TorchDynamoException, FailOnRecompileLimitHit)
_MOST_COMPILATIONS = 256  # all families share one function in transformers, and so one limit
# What tells layers apart. All else of a layer is a constant: with a head size that is none, the rotary embedding
# divides 64-bit integers some ten times an element.
_SYMBOLIC = r".*\.layer_idx"
_running: dict[int, tuple[int, list[nn.Module]]] = {}  # id of a model -> how many run its layers compiled, and which
_running_lock = Lock()
_here = threading.local()  # whose layers this thread runs


def _inductor(module: torch.fx.GraphModule, inputs: list[torch.Tensor], **options: Any) -> Any:
    """Inductor, counted. One function for all: Dynamo compiles again for every backend that is another."""
    _here.layers.compilations += 1
    join(module)
    return torch._dynamo.lookup_backend("inductor")(module, inputs, **options)


class CompiledLayers:
    """The decoder layers of ``model``, which run compiled inside :meth:`running`.

    Layers of one class share their compiled code, for any number of rows and for every engine: what tells them apart
    are weights, which are arguments, and ``layer_idx``, which is kept symbolic. So a model costs the compilation of a
    layer or two. Layers whose ``forward`` somebody has replaced (accelerate's hooks) are left alone.

    Parameters
    ----------
    model : transformers model
    backend : str or callable
        What compiles, as ``torch.compile`` takes it. Default: Inductor.

    Attributes
    ----------
    compilations : int
        By Inductor so far, while these layers ran.
    """

    def __init__(self, model: PreTrainedModel, backend: str | Callable[..., Any] = _inductor) -> None:
        layers = [module for module in model.modules() if _is_plain_layer(module)]
        compiled = {
            kind: torch.compile(kind.forward, fullgraph=True, dynamic=True, backend=backend)
            for kind in {type(layer) for layer in layers}
        }
        self.compilations = 0
        self._compared: set[bool] = set()  # passes of one token, and of more
        self._model_id = id(model)
        self._forwards = [(layer, partial(_forward, compiled[type(layer)], layer)) for layer in layers]

    def __len__(self) -> int:
        return len(self._forwards)

    @torch.no_grad()
    def disagreement(self, model: Any, single: bool) -> str:
        """What a tree model that runs these layers does otherwise than without them, in words; empty where it does not.

        Asked of a few tokens in slots of their own, once of passes of a ``single`` token and once of others: code for
        one row is code of its own to torch, and any other number of rows shares what has just run. Not while a graph is
        captured.
        """
        if single in self._compared:
            return ""
        trunk, branches = probe(model.vocab_size, model.max_positions)
        slots = len(trunk) + sum(len(branch) for branch in branches) + 1
        pool, tree = SlotPool(model.shapes, slots, model.dtype, model.device), SegmentTree(slots)

        def inputs(leaf: int, branches: list[list[int]]) -> tuple[list[int], Any]:
            lengths, ids = [len(branch) for branch in branches], [token for branch in branches for token in branch]
            step = plan(tree, [leaf], [len(branches)], lengths, model.device, ids)
            context = TreeContext.of_whole_branches(pool, step, len(branches))
            return step.branches, (step.ids.long(), step.positions.long(), context)

        (leaf,), first = inputs(-1, [trunk])
        model.call_body(*first)
        passes = [[branch[:1]] for branch in branches] if single else [branches]
        packed = [inputs(leaf, one)[1] for one in passes]
        expected = torch.cat([values(model.call_body(*one)) for one in packed])
        with self.running():
            found = torch.cat([values(model.call_body(*one)) for one in packed])
        self._compared.add(single)
        error, rounding = relative(found, expected), relative_tolerance(model.dtype)
        if error <= rounding:
            return ""
        return (
            f"compute something else compiled, so they run without: outputs differ by {error:.0%}, where rounding "
            f"explains {rounding:.0%}"
        )

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the layers compiled inside. May be nested, and entered by several threads at once."""
        before, _here.layers = getattr(_here, "layers", None), self
        with _running_lock.held():
            depth, changed = _running.get(self._model_id, (0, []))
            if not depth:
                for layer, forward in self._forwards:
                    if _is_plain_layer(layer):
                        vars(layer)["forward"] = forward  # past nn.Module's own, which looks for parameters first
                        changed.append(layer)
            _running[self._model_id] = depth + 1, changed
        try:
            with (
                torch.compiler.config.patch(dynamic_sources=_SYMBOLIC),  # type: ignore[attr-defined]
                torch._dynamo.config.patch(
                    skip_nnmodule_hook_guards=False,  # hooks may come and go between calls
                    recompile_limit=_MOST_COMPILATIONS,
                    accumulated_recompile_limit=4 * _MOST_COMPILATIONS,
                ),
            ):
                yield
        finally:
            _here.layers = before
            with _running_lock.held():
                depth, changed = _running.pop(self._model_id)
                if depth > 1:
                    _running[self._model_id] = depth - 1, changed
                else:
                    for layer in changed:
                        vars(layer).pop("forward", None)


def _forward(compiled: Callable[..., Any], layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The layer's forward, compiled where this thread runs it so: others may use the model meanwhile."""
    ours = not torch.compiler.is_compiling() and getattr(_here, "layers", None) is not None
    return compiled(layer, *args, **kwargs) if ours else type(layer).forward(layer, *args, **kwargs)


def _is_plain_layer(module: nn.Module) -> bool:
    return isinstance(module, GradientCheckpointingLayer) and "forward" not in vars(module)

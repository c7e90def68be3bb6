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
from stars_fast.tree.joined import join

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
        self._model_id = id(model)
        self._forwards = [(layer, partial(_forward, compiled[type(layer)], layer)) for layer in layers]

    def __len__(self) -> int:
        return len(self._forwards)

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

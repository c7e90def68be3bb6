"""Decoder layers compiled by torch: norms, rotary embeddings and activations become few kernels."""

from __future__ import annotations

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

from stars_fast.tree.graphs import Graphs
from stars_fast.tree.shared_products import SharedProducts, merge_equal_products

__all__ = ["CompilationError", "CompiledLayers"]

CompilationError = (TorchDynamoException, FailOnRecompileLimitHit)
_MOST_COMPILATIONS = 256  # all families share one function in transformers, and so one limit


class CompiledLayers:
    """The decoder layers of ``model``, which run compiled inside :meth:`running`.

    Layers of one class share their compiled code, for any number of rows: what tells them apart are weights, which are
    arguments, and ``layer_idx``, which is kept symbolic. So a model costs the compilation of a layer or two. Layers
    whose ``forward`` somebody has replaced (accelerate's hooks) are left alone.

    Parameters
    ----------
    model : transformers model
    backend : str or callable
        What compiles, as ``torch.compile`` takes it.
    """

    def __init__(self, model: PreTrainedModel, backend: str | Callable[..., Any] = "inductor") -> None:
        layers = [module for module in model.modules() if _is_plain_layer(module)]
        compile_graph = partial(_compile_graph, torch._dynamo.lookup_backend(backend))
        compiled = {
            kind: torch.compile(kind.forward, fullgraph=True, dynamic=True, backend=compile_graph)
            for kind in {type(layer) for layer in layers}
        }
        self._forwards = [(layer, partial(compiled[type(layer)], layer)) for layer in layers]
        self.products = SharedProducts(layers)

    def __len__(self) -> int:
        return len(self._forwards)

    def refresh(self) -> None:
        """Look again where weights lie."""
        self.products.refresh()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the layers compiled inside."""
        mine = [(layer, forward) for layer, forward in self._forwards if _is_plain_layer(layer)]
        limits = torch._dynamo.config.patch(
            allow_unspec_int_on_nn_module=True,
            recompile_limit=_MOST_COMPILATIONS,
            accumulated_recompile_limit=4 * _MOST_COMPILATIONS,
        )
        try:
            for layer, forward in mine:
                vars(layer)["forward"] = forward  # past nn.Module's own, which looks for parameters first
            with self.products.running(), limits:
                yield
        finally:
            for layer, _ in mine:
                vars(layer).pop("forward", None)


def _compile_graph(
    backend: Callable[..., Any], module: torch.fx.GraphModule, inputs: list[torch.Tensor], **options: Any
) -> Any:
    """What Dynamo calls with a layer's graph."""
    Graphs.prepared_by_all += 1
    merge_equal_products(module.graph)
    module.recompile()
    return backend(module, inputs, **options)


def _is_plain_layer(module: nn.Module) -> bool:
    return isinstance(module, GradientCheckpointingLayer) and "forward" not in vars(module)

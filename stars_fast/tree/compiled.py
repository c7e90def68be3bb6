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

__all__ = ["CompilationError", "compiled_layers"]

CompilationError = (TorchDynamoException, FailOnRecompileLimitHit)
_MOST_COMPILATIONS = 256  # all families share one function in transformers, and so one limit


@contextmanager
def compiled_layers(model: PreTrainedModel, backend: str | Callable[..., Any] = "inductor") -> Iterator[int]:
    """Run the decoder layers of ``model`` compiled inside; yields how many they are.

    Layers of one class share their compiled code, for any number of rows: what tells them apart are weights, which are
    arguments, and ``layer_idx``, which is kept symbolic. So a model costs the compilation of a layer or two. Layers
    whose ``forward`` somebody has replaced (accelerate's hooks) are left alone.
    """
    layers = [module for module in model.modules() if _is_plain_layer(module)]
    kinds = {type(layer) for layer in layers}
    compiled = {kind: torch.compile(kind.forward, fullgraph=True, dynamic=True, backend=backend) for kind in kinds}
    try:
        for layer in layers:
            layer.forward = partial(compiled[type(layer)], layer)
        with torch._dynamo.config.patch(
            allow_unspec_int_on_nn_module=True,
            recompile_limit=_MOST_COMPILATIONS,
            accumulated_recompile_limit=4 * _MOST_COMPILATIONS,
        ):
            yield len(layers)
    finally:
        for layer in layers:
            del layer.forward


def _is_plain_layer(module: nn.Module) -> bool:
    return isinstance(module, GradientCheckpointingLayer) and "forward" not in vars(module)

"""The ``torch.library`` namespace of the operators, and which implementation a CPU tensor gets."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import torch

library = torch.library.Library("stars_fast", "DEF")

FLOAT_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # as in csrc/row_math.h


def native(name: str) -> Callable[..., Any] | None:
    """The C++ function of that name; None if it was not built or ``STARS_FAST_KERNELS=reference`` asks for torch."""
    if os.environ.get("STARS_FAST_KERNELS") == "reference":
        return None
    try:
        return getattr(importlib.import_module("stars_fast._C"), name, None)
    except ImportError:
        return None


def define(
    name: str,
    schema: str,
    *,
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
    fake: Callable[..., Any],
) -> Callable[..., Any]:
    """Define ``stars_fast::name`` and return its overload, which costs less to call than the packet."""
    library.define(name + schema)
    library.impl(name, cpu, "CPU")
    library.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"stars_fast::{name}", fake, lib=library)
    return getattr(torch.ops.stars_fast, name).default


def address(tensor: torch.Tensor, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Where a contiguous tensor lies in memory, for C++, which sees neither its dtype nor its shape.

    Raises
    ------
    ValueError
        If the tensor is not what the C++ code will take it for.
    """
    if tensor.dtype != dtype or tensor.shape != shape:
        expected = f"{dtype} {list(shape)}"
        raise ValueError(f"{name} must be {expected}, got {tensor.dtype} {list(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()} for shape {list(shape)}")
    return tensor.data_ptr()

"""The ``torch.library`` namespace of the operators, and which implementation a CPU tensor gets."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

library = torch.library.Library("stars_fast", "DEF")


class Operator(NamedTuple):
    """What runs on which kind of device."""

    cpu: Callable[..., Any]
    cuda: Callable[..., Any]

    def kernel(self, device_type: str) -> str:
        """In words. References are named ``..._reference`` throughout."""
        function = self.cpu if device_type == "cpu" else self.cuda
        if function.__name__.endswith("_reference"):
            return "torch reference"
        return "C++" if device_type == "cpu" else "Triton"


operators: dict[str, Operator] = {}  # by name, as far as their modules are imported

FLOAT_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # as in csrc/row_math.h


def native(name: str) -> Any:
    """The C++ function of that name, or None if it was not built or ``STARS_FAST_KERNELS=reference`` asks for torch."""
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
    operators[name] = Operator(cpu, cuda)
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

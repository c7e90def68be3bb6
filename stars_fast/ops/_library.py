"""The ``torch.library`` namespace of the operators, and which implementation a tensor's device gets.

=====================  ==================  ==============
STARS_FAST_KERNELS     CPU                 CUDA and ROCm
=====================  ==================  ==============
not set                C++                 Triton
``reference``          torch reference     torch reference
``interpret``          Triton interpreter  Triton interpreter
=====================  ==================  ==============

``STARS_FAST_PRODUCTS=triton`` lets compiled layers take our own products of few rows (:mod:`stars_fast.tree.joined`).

What stands in the arguments (slots, lengths, row pointers, tokens) and whether they share memory is checked on every
call on a CPU, before anything is written. On a GPU that would wait for the device: there it is done where
``STARS_FAST_CHECKS`` is 1, for all calls but those that a CUDA graph replays.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch

library = torch.library.Library("stars_fast", "DEF")

P = ParamSpec("P")
R = TypeVar("R")

_SETTING = "STARS_FAST_KERNELS"
PRODUCTS = os.environ.get("STARS_FAST_PRODUCTS", "")
if PRODUCTS not in ("", "triton"):
    raise ValueError(f"STARS_FAST_PRODUCTS must be 'triton' or not set, got {PRODUCTS!r}")
_MODE = os.environ.get(_SETTING, "")
if _MODE not in ("", "reference", "interpret"):
    raise ValueError(f"{_SETTING} must be 'reference' or 'interpret' or not set, got {_MODE!r}")
CHECKS = os.environ.get("STARS_FAST_CHECKS", "")
if CHECKS not in ("", "1"):
    raise ValueError(f"STARS_FAST_CHECKS must be '1' or not set, got {CHECKS!r}")
if _MODE == "interpret" and os.environ.get("TRITON_INTERPRET") != "1":
    # Triton asks when its own functions are defined, and other libraries may have imported it already.
    raise RuntimeError(f"{_SETTING}=interpret needs TRITON_INTERPRET=1 in the environment too")


class Kernel(NamedTuple):
    """A function, and in words what it runs."""

    function: Callable[..., Any]
    name: str


class Operator(NamedTuple):
    """What runs on which kind of device."""

    cpu: Kernel
    cuda: Kernel

    def kernel(self, device_type: str) -> str:
        """In words."""
        return (self.cpu if device_type == "cpu" else self.cuda).name


operators: dict[str, Operator] = {}  # by name, as far as their modules are imported

FLOAT_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # as in csrc/row_math.h


def native(name: str) -> Any:
    """The C++ function of that name, or None if there is none or the kernels are set to others."""
    return None if _MODE else _built(name)


def _built(name: str) -> Any:
    return getattr(importlib.import_module("stars_fast._C"), name, None)


def define(
    name: str,
    *,
    reference: Callable[P, R],
    call: Callable[..., Any] | None = None,
    fake: Callable[..., Any],
    written: Collection[str] = (),
) -> Callable[P, R]:
    """Define ``stars_fast::name`` and return its overload, which costs less to call than the packet.

    Parameters
    ----------
    name
        Of the operator, of its C++ function, and of the function in ``stars_fast.kernels.<name>`` that launches its
        Triton kernels on the same arguments.
    reference
        In plain torch. Its signature and its docstring are the operator's.
    call
        Calls the C++ function that is its first argument; takes the operator's own behind it, by position. None where
        there is no such function: CPUs run the reference then, and contents are not checked.
    fake
        What is returned, with shapes and dtypes but not yet with values.
    written
        Arguments that the operator changes in place.
    """
    in_torch = Kernel(reference, "torch reference")
    function = native(name)
    compiled = Kernel(functools.partial(call, function), "C++") if call and function else in_torch
    triton = Kernel(_triton(name), "Triton interpreter" if _MODE == "interpret" else "Triton")
    operator = {
        "": Operator(compiled, triton),
        "reference": Operator(in_torch, in_torch),
        "interpret": Operator(triton, triton),
    }[_MODE]
    if call and (check := _built(f"check_{name}")):  # which the C++ kernel begins with by itself
        cpu, cuda = operator
        cpu = cpu if cpu is compiled and function else _checked(cpu, call, check)
        operator = Operator(cpu, _checked(cuda, call, check) if CHECKS else cuda)
    operators[name] = operator
    # Launchers choose tiles by integers, so a symbolic one would be turned into a number there anyway.
    schema = torch.library.infer_schema(reference, mutates_args=written).replace("SymInt", "int")
    library.define(name + schema)
    library.impl(name, operator.cpu.function, "CPU")
    library.impl(name, operator.cuda.function, "CUDA")
    torch.library.register_fake(f"stars_fast::{name}", fake, lib=library)
    overload = getattr(torch.ops.stars_fast, name).default
    overload.__signature__ = inspect.signature(reference)
    overload.__doc__ = f"{name}{schema}\n\n{inspect.getdoc(reference)}"
    return overload


def _checked(kernel: Kernel, call: Callable[..., Any], check: Callable[..., None]) -> Kernel:
    """The kernel, which runs once its arguments have passed the C++ kernel's check."""

    def run(*arguments: Any) -> Any:
        if not (arguments[0].is_cuda and torch.cuda.is_current_stream_capturing()):
            call(check, *(_readable(argument) for argument in arguments))
        return kernel.function(*arguments)

    return kernel._replace(function=run)


def _readable(argument: Any) -> Any:
    """Integers where the host can read them."""
    if isinstance(argument, torch.Tensor) and argument.dtype in (torch.int32, torch.int64):
        return argument.cpu()
    return argument


def triton_kernel(name: str) -> Any:
    """The module ``stars_fast.kernels.<name>``.

    Raises
    ------
    RuntimeError
        If Triton cannot be imported.
    """
    try:
        return importlib.import_module(f"stars_fast.kernels.{name}")
    except ImportError as error:
        if not (error.name or "").startswith("triton"):
            raise
        raise RuntimeError(
            f"the kernel of {name} needs Triton, which comes with torch's builds for GPUs ({error}); "
            f"{_SETTING}=reference runs slow torch code instead"
        ) from error


def _triton(name: str) -> Callable[..., Any]:
    """A launcher that imports Triton when it is first called."""

    @functools.cache
    def launcher() -> Callable[..., Any]:
        return getattr(triton_kernel(name), name)

    def launch(*args: Any) -> Any:
        with on(args[0].device):
            return launcher()(*args)

    return launch


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, wherever the tensors are."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


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


Layout = Sequence[tuple[str, torch.dtype, str]]  # an operator's arguments: name, dtype, and the name of the shape


def addresses(
    tensors: Sequence[torch.Tensor | None], layout: Layout, shapes: Mapping[str, tuple[int, ...]]
) -> list[int]:
    """:func:`address` of each argument, 0 for None; ``shapes`` are those that the layout names.

    Raises
    ------
    ValueError
        If a tensor is not what a kernel will take it for.
    """
    return [
        0
        if tensor is None
        else tensor.data_ptr()
        if tensor.dtype is dtype and tensor.shape == shapes[shape] and tensor.is_contiguous()
        else address(tensor, name, dtype, shapes[shape])  # says what is wrong
        for tensor, (name, dtype, shape) in zip(tensors, layout, strict=True)
    ]

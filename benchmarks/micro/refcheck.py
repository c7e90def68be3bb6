"""A case, those that compete in it, and the check that they compute the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from stars_fast.ops._library import operators, triton_kernel

OURS = {"cpu": "C++", "cuda": "Triton"}
REFERENCE = "torch reference"
_CPU_CACHE = 32 * 2**20  # bytes; torch does not tell
_MOST_SETS = 256


class Absent(Exception):
    """What a contender needs and this machine lacks."""


class Prepared(NamedTuple):
    """A contender with its inputs laid out."""

    call: Callable[[int], Any]  # on the i-th set of inputs, counted modulo `sets`
    observe: Callable[[Any], dict[str, torch.Tensor]]  # what call(0) returned or wrote, under the reference's names
    sets: int = 1


@dataclass(frozen=True)
class Case:
    """One operator on inputs of one shape."""

    operator: str
    name: str
    device: torch.device
    bytes: int  # that must cross the memory bus at least: each input read once, each output written once
    contenders: dict[str, Callable[[], Prepared]]  # by name, what prepares them; raises Absent
    expected: dict[str, torch.Tensor]  # what the operator's reference makes of the first set of inputs
    tolerance: dict[str, float]  # of each of these, the largest deviation
    restore: Callable[[], None] = lambda: None  # puts back what calls have written to
    operations: int = 0  # of matrix products, a multiplication and an addition being two

    def prepared(self, contender: str) -> Prepared:
        """One that competes, its inputs laid out. Raises :class:`Absent`, also where ours is not its own kernel."""
        if contender == OURS[self.device.type]:
            _require_kernel(self.operator, self.device)
        return self.contenders[contender]()


def refcheck(case: Case, contender: str, prepared: Prepared) -> None:
    """Compare one call on restored inputs with the reference.

    Raises
    ------
    AssertionError
        Naming the output that deviates, by how much, and the tolerance.
    """
    case.restore()
    found = prepared.observe(prepared.call(0))
    for name, value in found.items():
        error, tolerance = deviation(value, case.expected[name]), case.tolerance[name]
        if not error <= tolerance:
            raise AssertionError(
                f"{case.operator} {case.name}, {contender}: {name} deviates from the reference by {error:.2g}, "
                f"more than {tolerance:.2g}"
            )


def deviation(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Of floats: the largest RMS error of a vector along the last dimension, relative to the RMS of all expected ones.

    One-dimensional floats count as vectors of one; a NaN gives NaN. Of others: the share of elements that differ.
    """
    if value.shape != expected.shape:
        raise AssertionError(f"the shape is {list(value.shape)}, the reference's {list(expected.shape)}")
    if not expected.is_floating_point():
        return (value != expected).double().mean().item()
    error = (value.float() - expected.float()).square()
    if error.ndim > 1:
        error = error.mean(-1)
    scale = expected.float().square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    return (error.amax().sqrt() / scale).item()


def copies(size: int, device: torch.device) -> int:
    """Sets of ``size`` bytes to rotate through so that each is out of the cache when its turn comes again.

    As an engine meets them: between two calls on one layer lie the weights and caches of all the others. Sets of a few
    kilobytes are so many that they stay in the cache all the same, but they are bound by the launch anyway.
    """
    cache = _CPU_CACHE
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(_MOST_SETS, 1 + 2 * cache // max(size, 1))


def _require_kernel(operator: str, device: torch.device) -> None:
    """Raise :class:`Absent` unless the operator runs its own kernel on this device."""
    wanted, found = OURS[device.type], operators[operator].kernel(device.type)
    if found != wanted:
        raise Absent(f"no {wanted} kernel: {operator} runs as {found}")
    if wanted == "Triton":
        try:
            triton_kernel(operator)
        except RuntimeError as error:
            raise Absent(str(error)) from error


def short(dtype: torch.dtype) -> str:
    """``bf16`` and the like."""
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]

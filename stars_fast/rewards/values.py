"""What scorers return, read as one number per completion: whatever shape libraries give it, if that has one meaning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from typing import Any

import torch

from stars_fast.outputs import Cause

# The acceptance test compares in float32.
_LARGEST = torch.finfo(torch.float32).max

Score = tuple[float, str | None]


def one_each(values: Any, count: int) -> list[Any] | torch.Tensor:
    """One value per completion, not looked at yet: a float tensor ``[count]`` as it is, anything else as a list.

    Arrays may have further axes of length 1, as ``[count, 1]``; for one completion they may have none, as ``squeeze()``
    leaves it.

    Raises
    ------
    ValueError
        For values of another number or shape, and what is neither an array nor a list, with what is expected.
    """
    shape = getattr(values, "shape", None)
    if isinstance(values, torch.Tensor) and values.shape == (count,) and values.is_floating_point():
        return values
    if shape is not None and hasattr(values, "tolist"):
        kind, sizes = type(values).__name__, list(shape)
        if any(size != 1 for size in sizes[1:]) or (not sizes and count != 1):
            raise ValueError(_expected(count, f"a {kind} of shape {sizes}"))
        values = (values if len(sizes) == 1 else values.reshape(-1)).tolist()
    elif isinstance(values, Mapping):
        remedy = "return its logits[:, 0]" if hasattr(values, "logits") else "return the list of numbers in it"
        raise ValueError(_expected(count, f"a {type(values).__name__} of {', '.join(map(str, values))} ({remedy})"))
    elif isinstance(values, (str, bytes, Set)) or not isinstance(values, Iterable):
        raise ValueError(_expected(count, f"{values!r:.80}"))
    values = list(values)
    if len(values) != count:
        raise ValueError(f"the reward returned {len(values)} values for {count} completions: return one for each")
    return values


def as_float(value: Any) -> Score:
    """The reward, or NaN and the cause in words."""
    if value is None:
        return float("nan"), "the reward returned None"
    if isinstance(value, Exception):
        return float("nan"), raised(value)
    try:
        number = float(_single(value))
    except (OverflowError, TypeError, ValueError, RuntimeError):
        return float("nan"), f"the reward returned {_described(value)} for one completion; it must be one number"
    if not number < _LARGEST:
        return float("nan"), f"the reward returned {number}; it must be finite, or -inf to reject"
    return number, None


def raised(error: Exception) -> Cause:
    """What an error of the reward is reported as."""
    return Cause.of(error, "the reward raised ")


def _single(value: Any) -> Any:
    """What stands in lists, tuples and arrays of one, and by its name alone."""
    while isinstance(value, (list, tuple, Mapping)) and len(value) == 1:
        if isinstance(value, Mapping) and not value.keys() <= {"score", "reward"}:
            break
        (value,) = value.values() if isinstance(value, Mapping) else value
    return value.item() if hasattr(value, "item") else value


def _described(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return f"{value!r:.80}" if shape is None else f"a {type(value).__name__} of shape {list(shape)}"


def _expected(count: int, found: str) -> str:
    return f"it must return one number per completion, {count} here, and returned {found}"

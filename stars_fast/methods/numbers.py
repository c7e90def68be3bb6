"""Checks of the numbers that users set, which name the argument, the value and the limit."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any


def plain(value: Any) -> Any:
    """Tensors and arrays as numbers and lists; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def integer(name: str, value: Any, least: int | None = None, *, hint: str = "") -> int:
    """The value as an int, whatever library's integer it is.

    Raises
    ------
    TypeError, ValueError
        If it is no integer, or less than ``least``. ``hint`` ends the message.
    """
    number, limit = plain(value), "" if least is None else f" of at least {least}"
    if isinstance(number, bool) or not isinstance(number, Integral):
        raise TypeError(f"{name}={value!r} must be an integer{limit}{hint}")
    if least is not None and number < least:
        raise ValueError(f"{name}={number} must be at least {least}{hint}")
    return int(number)


def real(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    open_below: bool = False,
    open_above: bool = False,
    hint: str = "",
) -> float:
    """The value as a float, whatever library's number it is.

    Raises
    ------
    TypeError, ValueError
        If it is no number, or outside the interval. ``hint`` ends the message.
    """
    plain_value = plain(value)
    if isinstance(plain_value, bool) or not isinstance(plain_value, Real):
        raise TypeError(f"{name}={value!r} must be a number{hint}")
    number = float(plain_value)
    above = number > low if open_below else number >= low
    below = number < high if open_above else number <= high
    if not (above and below):
        limits = f"lie in {'(' if open_below else '['}{low:g}, {high:g}{')' if open_above else ']'}"
        limits = "not be NaN" if low == -math.inf and high == math.inf else limits
        raise ValueError(f"{name}={number} must {limits}{hint}")
    return number

"""Checks of the numbers that users set, which name the argument, the value and the limit."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Sequence
from decimal import Decimal
from numbers import Integral, Real
from typing import Any

# Lengths, counts, slots and ids lie in 32-bit tensors.
MOST = 2**31 - 1
# Answers to one prompt that are under way, or kept to be compared: each is a request of its own, of some kilobytes with
# its ids and log-probabilities.
MOST_ANSWERS = 2**16

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


def plain(value: Any) -> Any:
    """Tensors and arrays as numbers and lists; anything else as it is."""
    try:
        return value.tolist() if hasattr(value, "tolist") else value
    except Exception:  # of a class, of a tensor without data
        return value


def shown(value: Any) -> str:
    """The value as error messages show it: on one line, and cut off where it is long."""
    try:
        return re.sub(r"\s*\n\s*", " ", _short.repr(value))
    except Exception:  # of its own making, or an integer of thousands of digits
        return f"<{type(value).__name__}>"


def integer(name: str, value: Any, least: int | None = None, most: int | None = None, *, hint: str = "") -> int:
    """The value as an int, whatever library's integer it is.

    Raises
    ------
    TypeError, ValueError
        If it is no integer, less than ``least`` or more than ``most``. ``hint`` ends the message.
    """
    number, limit = plain(value), "" if least is None else f" of at least {least}"
    if isinstance(number, bool) or not isinstance(number, Integral):
        raise TypeError(f"{name}={shown(value)} must be an integer{limit}{hint}")
    number = int(number)
    if least is not None and number < least:
        raise ValueError(f"{name}={shown(number)} must be at least {least}{hint}")
    if most is not None and number > most:
        raise ValueError(f"{name}={shown(number)} must be at most {most}{hint}")
    return number


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
    if isinstance(plain_value, bool) or not isinstance(plain_value, (Real, Decimal)):
        raise TypeError(f"{name}={shown(value)} must be a number{hint}")
    try:
        number = float(plain_value)
    except (OverflowError, ValueError) as error:  # beyond a float's range, a signalling NaN
        raise ValueError(f"{name}={shown(value)} must be a number that a float can hold{hint}") from error
    above = number > low if open_below else number >= low
    below = number < high if open_above else number <= high
    if not (above and below):
        limits = f"lie in {'(' if open_below else '['}{low:g}, {high:g}{')' if open_above else ']'}"
        limits = "not be NaN" if low == -math.inf and high == math.inf and not open_above else limits
        raise ValueError(f"{name}={number} must {limits}{hint}")
    return number


def text_or_ids(name: str, value: Any) -> str | tuple[int, ...]:
    """Text as it is, anything else as token ids. Raises TypeError or ValueError for what is neither."""
    if isinstance(value := plain(value), str):
        return value
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        raise TypeError(f"{name}={shown(value)} must be text, or a sequence of ids")
    return tuple(integer(f"{name}[{place}]", token, 0, MOST) for place, token in enumerate(value))


def truth(name: str, value: Any) -> bool:
    """The value as a bool, numpy's and torch's included. Raises TypeError for anything else."""
    flag = plain(value)
    if not isinstance(flag, bool):
        raise TypeError(f"{name}={shown(value)} must be True or False")
    return flag

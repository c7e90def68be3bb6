"""All cases, by operator: their shapes on each kind of device, who competes, and what builds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from . import attention, sampling, tables
from .refcheck import OURS, REFERENCE, Absent, Case, Prepared, refcheck

__all__ = ["OPERATORS", "Absent", "Case", "Operator", "Prepared", "contenders", "refcheck"]


class Operator(NamedTuple):
    """What can be measured of an operator."""

    shapes: dict[str, list[Any]]  # by type of device; each has a name
    build: Callable[[Any, torch.device], Case]
    others: tuple[str, ...] = ()  # that compete on every device
    on_cuda: tuple[str, ...] = ()


OPERATORS = {
    "kv_append": Operator(tables.APPENDS, tables.build_append, (tables.COPY,)),
    "tree_attention": Operator(
        attention.SHAPES, attention.build, (attention.PER_ROW,), (attention.FLASH, attention.CASCADE)
    ),
    "sample_step": Operator(sampling.DRAWS, sampling.build_draw, (sampling.MULTINOMIAL,)),
    "select_and_commit": Operator(tables.SELECTS, tables.build_select),
    "gather_logprobs": Operator(sampling.GATHERS, sampling.build_gather, (sampling.CROSS_ENTROPY,)),
}


def contenders(operator: str, device_type: str) -> tuple[str, ...]:
    """Names of those that compete, ours first, whether or not this machine has them."""
    found = OPERATORS[operator]
    return (OURS[device_type], REFERENCE, *found.others, *(found.on_cuda if device_type == "cuda" else ()))

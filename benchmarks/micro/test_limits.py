"""Kernels beside their torch references. Limits are generous: they catch losses, not noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from .attention import Tree
from .cases import OPERATORS
from .conftest import Report
from .limits import alternating, clocked
from .refcheck import OURS, REFERENCE
from .sampling import Draw
from .tables import Select
from .timing import round_of

CPU = torch.device("cpu")
# Operator, shape, and how many times as fast as its torch reference the C++ kernel must be.
KERNELS: list[tuple[str, Any, float]] = [
    ("tree_attention", Tree("llama-3.2-1b", 2, 8, 256, 8, 1, torch.float32), 1.2),
    ("tree_attention", Tree("llama-3.2-1b", 2, 8, 256, 8, 1, torch.bfloat16), 1.5),
    ("sample_step", Draw(8, 32_000, "top_k50", torch.float32), 1.5),
    ("select_and_commit", Select(64, 8), 5.0),
]


@pytest.mark.parametrize(("operator", "shape", "at_least"), KERNELS, ids=lambda x: getattr(x, "name", str(x)))
def test_kernels_beat_their_references(operator: str, shape: Any, at_least: float, report: Report) -> None:
    case = OPERATORS[operator].build(shape, CPU)

    def one(contender: str) -> tuple[str, Callable[[], float]]:
        prepared = case.prepared(contender)
        prepared.call(0)
        found = round_of(case, prepared)

        def seconds() -> float:
            found.reset()
            return clocked(found.run)() / found.calls

        return f"{operator} {case.name}, {contender}", seconds

    report.require(alternating(one(OURS["cpu"]), one(REFERENCE), at_least))

"""What is varied, over which values, and who runs there."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from stars_fast.bench.contestants import ACCEPTING, BEST, ENGINE, GENERATE, ONE, PLAIN, STRONG

SIDE_BY_SIDE = (ENGINE, ONE, PLAIN, STRONG, BEST, ACCEPTING, GENERATE)


class Sweep(NamedTuple):
    """One field of the workload over some values; ``fixed`` are other fields that this asks for."""

    field: str
    values: tuple[Any, ...]
    contestants: tuple[str, ...]
    fixed: Mapping[str, Any] = MappingProxyType({})


# Speed beside others where a run takes seconds; where work grows to minutes, the cost of the engine alone.
SWEEPS = {
    "batch": Sweep("batch", (1, 2, 4, 8, 16), (ENGINE, ONE, STRONG, PLAIN)),
    "candidates": Sweep("candidates", (1, 2, 4, 8, 16, 32, 64), (ENGINE,), {"batch": 1, "max_attempts": 64}),
    "acceptance": Sweep("acceptance", (0.1, 1 / 6, 0.3, 0.5, 0.8), (ENGINE, ONE, STRONG)),
    "segment-length": Sweep("segment_length", (4, 8, 16, 32), (ENGINE, ONE, STRONG)),
    "prompts": Sweep("batch", (1, 4, 16, 64, 256), (ENGINE,)),
    "prompt-length": Sweep("prompt_length", (16, 64, 256, 1024, 2048), (ENGINE,), {"batch": 1}),
    "new-tokens": Sweep("max_new_tokens", (32, 64, 128, 256, 512, 1024), (ENGINE,), {"batch": 1}),
}


def sweep_named(name: str) -> Sweep:
    """Raises ValueError for one that is not there."""
    if name not in SWEEPS:
        raise ValueError(f"sweep={name!r}: choose from {', '.join(SWEEPS)}")
    return SWEEPS[name]

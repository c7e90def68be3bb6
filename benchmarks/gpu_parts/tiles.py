"""Tree attention with the tiles it chooses and with others, twice over, beside SDPA on a cache per row."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.gpu_parts.models import machine
from benchmarks.gpu_parts.runner import Runner
from benchmarks.micro.attention import PER_ROW, Tree
from benchmarks.micro.cases import OPERATORS, refcheck
from benchmarks.micro.refcheck import OURS
from benchmarks.micro.timing import Rates, floor_seconds, median_seconds

_ROUNDS = 2
CHOSEN = "chosen"
# The queries of a tile that each case takes are those of its candidates (``stars_fast.kernels.tiles``).
CASES = [
    (Tree("llama-2-7b", 64, 4, 256, 8, 1), 16),
    (Tree("llama-2-7b", 64, 4, 256, 16, 16), 64),
    (Tree("qwen2.5-7b", 64, 4, 256, 8, 1), 32),
    (Tree("llama-2-7b", 64, 1, 256, 8, 1), 16),
    (Tree("llama-2-7b", 1, 11, 256, 8, 1), 16),
]
_TINY = [(Tree("llama-3.2-1b", 2, 2, 16, 4, 1, torch.float32), 16)]


def measure_tiles(runner: Runner) -> None:
    """Attention with today's tiles and with 5 and 7 stages, against its floor and SDPA."""
    gpu, ours = machine(runner), OURS[runner.device.type]
    kernels = importlib.import_module("stars_fast.kernels.tiles") if runner.on_gpu else None
    candidates = getattr(kernels, "CANDIDATES", {})
    if not candidates:
        runner.add("absent", what="candidate tiles")
    for shape, queries in _TINY if runner.tiny else CASES:
        if not runner.time_for(4):
            return
        case = OPERATORS["tree_attention"].build(shape, runner.device)
        floor = floor_seconds(case, Rates(gpu.bandwidth, gpu.matrix_rate)) * 1e6
        spent: dict[Any, list[float]] = {}
        for _ in range(_ROUNDS):
            for tile in (CHOSEN, *candidates.get(queries, ()), PER_ROW):
                with runner.guarded(f"{case.name}, {tile}"), _forced(tile):
                    prepared = case.prepared(PER_ROW if tile == PER_ROW else ours)
                    refcheck(case, str(tile), prepared)
                    spent.setdefault(tile, []).append(median_seconds(case, prepared) * 1e6)
                    del prepared
        for tile, each in spent.items():
            over = min(each) / floor if floor else None
            runner.add("tile", case=case.name, tile=tile, microseconds=each, floor_microseconds=floor, over_floor=over)
        if ours_alone := [tile for tile, each in spent.items() if tile != PER_ROW and len(each) == _ROUNDS]:
            best = min(ours_alone, key=lambda tile: sum(spent[tile]))
            runner.add("best_tile", case=case.name, tile=best, microseconds=spent[best])
        del case


@contextmanager
def _forced(tile: Any) -> Iterator[None]:
    """Let every launch inside take this tile; where it is none, the one that is chosen."""
    if not isinstance(tile, tuple):
        yield
        return
    kernels = importlib.import_module("stars_fast.kernels.tree_attention")
    with patch.multiple(kernels, choose_tile=lambda *_, **__: tile, fit_warps=lambda one, *_: one):
        yield

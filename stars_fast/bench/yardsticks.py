"""How fast a device copies and multiplies: what the rates of anything measured in the same run are compared with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Rates(NamedTuple):
    """What the device reaches on plain work."""

    copy: float  # bytes/s, read and written both counted
    matrix: float  # operations/s of a large product


def rates(device: torch.device, dtype: torch.dtype | None = None) -> Rates:
    """Measure both yardsticks: a copy far larger than the caches, and a large product.

    ``dtype`` is the product's; by default bfloat16 on a GPU, float32 on a CPU.
    """
    on_gpu = device.type == "cuda"
    source = torch.ones((2**30 if on_gpu else 2**27) // 4, device=device)
    target = torch.empty_like(source)
    copy_seconds = seconds(lambda: target.copy_(source), device)
    n, dtype = (8192 if on_gpu else 1024), dtype or (torch.bfloat16 if on_gpu else torch.float32)
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)
    return Rates(2 * source.nbytes / copy_seconds, 2 * n**3 / seconds(lambda: a @ b, device))


def seconds(call: Callable[[], Any], device: torch.device, rounds: int = 9) -> float:
    """Median of single calls, each waited for, after one that is not counted."""
    taken = []
    for _ in range(rounds + 1):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; a CPU is always done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

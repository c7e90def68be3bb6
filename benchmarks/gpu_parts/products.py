"""Matrix products of decode steps: who computes them fastest, by shape and rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu_parts.runner import Runner
from benchmarks.micro.refcheck import deviation
from stars_fast.bench.yardsticks import seconds, synchronize

ROWS = (192, 16, 1, 64, 96, 128, 256)  # the telling ones first
# Outputs and inputs, and how many of them a layer of Llama-2-7B has; then the same joined, its head, and a wide one.
SHAPES = {
    "q, k, v, o": (4096, 4096, 4),
    "gate, up": (11008, 4096, 2),
    "down": (4096, 11008, 1),
    "q+k+v": (12288, 4096, 0),
    "gate+up": (22016, 4096, 0),
    "head": (32000, 4096, 0),
    "gate, up of Qwen2.5-7B": (18944, 3584, 0),
}
TORCH = "torch"  # cuBLAS, as torch calls it where nobody chooses
_ROTATED = 2**30  # bytes of weights in turn, so that none is in the cache
_ROUND = 20e-3  # seconds of a measurement, at least
_REPEATS = 3
_TOLERANCE = 3e-2  # of a 16-bit product

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@contextmanager
def _library(name: str) -> Iterator[None]:
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library(name)
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(before)


def _of_library(name: str) -> Product:
    def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        with _library(name):
            return F.linear(x, weight)

    return product


def contenders(runner: Runner) -> dict[str, Product]:
    """By name, what computes ``x @ weight.T``; first what torch takes by itself."""
    found: dict[str, Product] = {TORCH: F.linear}
    if runner.on_gpu:
        found |= {name: _of_library(name) for name in ("cublas", "cublaslt")}
        from stars_fast.ops import skinny_product

        found["Triton"] = lambda x, weight: skinny_product(x, [weight], [])[0]
    return found


def measure_products(runner: Runner) -> None:
    """Products of a decode step by torch's libraries and others, with TB/s and TFLOP/s."""
    shapes = {"q, k, v, o": (64, 32, 4), "down": (32, 64, 1)} if runner.tiny else SHAPES
    dtype = torch.bfloat16 if runner.on_gpu else torch.float32
    pool = torch.randn(2**14 if runner.tiny else _ROTATED // dtype.itemsize, device=runner.device).to(dtype)
    for rows in (1, 16) if runner.tiny else ROWS:
        layer: dict[str, list[list[float]]] = defaultdict(list)  # microseconds of each product of a layer
        for name, (columns, inner, count) in shapes.items():
            if not runner.time_for(0.5):
                return
            x = torch.randn(rows, inner, device=runner.device, dtype=dtype)
            size = columns * inner
            weights = [pool[at : at + size].view(columns, inner) for at in range(0, len(pool) - size + 1, size)]
            expected = x.float() @ weights[0].float().T
            for contender, product in contenders(runner).items():
                fields: dict[str, Any] = {"shape": name, "columns": columns, "inner": inner, "rows": rows}
                fields |= {"contender": contender}
                with runner.guarded(f"product {name}, {rows} rows, {contender}"):
                    error = deviation(product(x, weights[0]).float(), expected)
                    if not error <= _TOLERANCE:
                        raise AssertionError(f"{contender} deviates by {error:.2g}, more than {_TOLERANCE:g}")
                    spent = timed(runner, partial(_each, product, x, weights), len(weights))
                    mean = sum(spent) / len(spent)
                    runner.add(
                        "product",
                        **fields,
                        microseconds=[one * 1e6 for one in spent],
                        terabytes_per_second=dtype.itemsize * (size + x.numel() + rows * columns) / mean / 1e12,
                        teraflops=2 * rows * size / mean / 1e12,
                    )
                    layer[contender] += [spent] * count
            del weights
        _add_gain(runner, rows, layer, sum(count for *_, count in shapes.values()))


def _add_gain(runner: Runner, rows: int, layer: dict[str, list[list[float]]], products: int) -> None:
    """What the fastest for each shape of a layer gains over what torch takes for all; round by round."""
    alone = layer[TORCH]
    others = [spent for name, spent in layer.items() if name != TORCH and len(spent) == products]
    if others and len(alone) == products:
        best = [min(same, key=sum) for same in zip(alone, *others, strict=True)]
        pairs = zip(zip(*alone, strict=True), zip(*best, strict=True), strict=True)
        runner.add("product_gain", rows=rows, gain=[sum(usual) / sum(fastest) for usual, fastest in pairs])


def _each(product: Product, x: torch.Tensor, weights: list[torch.Tensor]) -> None:
    for weight in weights:
        product(x, weight)


def timed(runner: Runner, work: Callable[[], Any], calls: int) -> list[float]:
    """Seconds of one of the ``calls`` that ``work`` makes, a few times over; on a GPU in a graph, whose replays launch
    nothing.
    """
    run = work
    if runner.on_gpu:
        work()
        synchronize(runner.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        run = graph.replay
    once = seconds(run, runner.device, 1)
    times = 1 if runner.tiny else max(1, round(_ROUND / once))

    def several() -> None:
        for _ in range(times):
            run()

    return [seconds(several, runner.device, 1) / times / calls for _ in range(_REPEATS)]

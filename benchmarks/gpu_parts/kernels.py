"""The kernels of a profile, by what they are for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType

from stars_fast.bench.yardsticks import synchronize

# The first that a kernel's name matches. Inductor names a kernel by what it fuses.
_CLASSES = {
    "split-K reduce": r"splitk_?reduce",
    "product": r"nvjet|gemm|gemv|cutlass|wgmma|skinny_product|aten::(add)?mm_?$",
    "merge": r"merge_parts",
    "attention": r"tree_(attention|work)",
    "append": r"(kv|rotary)_append",
    "sampling": r"draw_kernel|tile_sums|rank_|sample_step|gather_logprobs|select_and_commit",
    "copy": r"memcpy|memset|direct_copy|CatArray",
    "rotary": r"triton_.*(cat.*neg|neg.*cat|cos|sin)",
    "norm": r"triton_.*(rsqrt|mean)",
    "activation": r"triton_.*(silu|gelu)",
    "residual": r"triton_.*add",
    "not compiled": r"at::native|aten::",
}
OTHER = "other"
# Operators, and where their matrices begin: behind a bias, or what the product is added to.
_PRODUCTS = {"aten::mm": 0, "aten::addmm": 1, "aten::addmm_": 1}
LARGE = ("product", "attention")  # the other classes are small kernels
_MARK = "stage: "


class Kernel(NamedTuple):
    """One run of a kernel; times in microseconds."""

    name: str
    start: float
    duration: float

    @property
    def end(self) -> float:
        return self.start + self.duration


class Product(NamedTuple):
    """One matrix product, from the operator that launched it."""

    rows: int
    inner: int
    columns: int
    duration: float  # of its kernels, microseconds


class Profile(NamedTuple):
    """What ran on the device, and where the host was."""

    kernels: list[Kernel]  # by their start
    products: list[Product]  # where shapes were asked for
    stages: list[Kernel]  # of the host, where they are marked (:func:`marked`)
    waits: list[Kernel]  # of the host for the device


def profiler_of(device: torch.device, host: bool, shapes: bool = False) -> torch.profiler.profile:
    """What to start and stop around the work, and :func:`read` then. To look at the ``host`` too makes it slower; with
    ``shapes``, also at what operators are given.
    """
    from torch.profiler import ProfilerActivity

    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CUDA] * on_gpu + [ProfilerActivity.CPU] * (host or not on_gpu)
    return torch.profiler.profile(activities=activities, record_shapes=shapes)


def profiled(call: Callable[[], Any], device: torch.device, shapes: bool = False) -> Profile:
    """Run ``call`` under torch's profiler; with ``shapes``, tell its products, of which a graph's replay has none."""
    synchronize(device)
    with profiler_of(device, shapes, shapes) as profiler:
        call()
        synchronize(device)
    return read(profiler, device)


def read(profiler: torch.profiler.profile, device: torch.device) -> Profile:
    """What a profiler that has stopped has seen. On a CPU, operators that call no other stand for kernels."""
    on_gpu = device.type == "cuda"
    kernels, stages, waits = list[Kernel](), list[Kernel](), list[Kernel]()
    products = list[Product]()
    for event in profiler.events():
        one = Kernel(event.name, event.time_range.start, event.time_range.elapsed_us())
        of_device = event.device_type != DeviceType.CPU
        if event.name.startswith(_MARK):
            if not of_device:  # the profiler draws a mark over the kernels launched in it too
                stages.append(one._replace(name=event.name.removeprefix(_MARK)))
        elif getattr(event, "is_user_annotation", False):
            continue
        elif of_device or (not on_gpu and (event.name in _PRODUCTS or not event.cpu_children)):
            kernels.append(one)
        elif re.match(r"cuda\w*Synchronize", event.name):
            waits.append(one)
        if not of_device and (shapes := _product_shapes(event)) is not None:
            spent = sum(kernel.duration for kernel in event.kernels) if on_gpu else one.duration
            products.append(Product(*shapes, spent))
    return Profile(sorted(kernels, key=lambda one: one.start), products, stages, waits)


def marked(name: str) -> torch.profiler.record_function:
    """A context in which the host is in this stage."""
    return torch.profiler.record_function(_MARK + name)


def class_of(name: str) -> str:
    """What a kernel of that name is for."""
    return next((one for one, pattern in _CLASSES.items() if re.search(pattern, name, re.IGNORECASE)), OTHER)


def by_class(kernels: Iterable[tuple[str, float, int]]) -> dict[str, tuple[float, int]]:
    """Time and count of each class, the longest first, from names, times and counts."""
    found: dict[str, tuple[float, int]] = {}
    for name, time, count in kernels:
        before = found.get(class_of(name), (0.0, 0))
        found[class_of(name)] = before[0] + time, before[1] + count
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))


def busy(kernels: Iterable[Kernel], longest_gap: float = 0.0) -> tuple[float, list[Kernel]]:
    """Microseconds in which any of them ran, of kernels by their start; and the gaps longer than so many."""
    total, end, gaps = 0.0, None, list[Kernel]()
    for one in kernels:
        if end is not None and one.start - end > longest_gap:
            gaps.append(Kernel("", end, one.start - end))
        total += max(0.0, one.end - max(one.start, one.start if end is None else end))
        end = one.end if end is None else max(end, one.end)
    return total, gaps


def _product_shapes(event: Any) -> tuple[int, int, int] | None:
    """Rows, inner size and columns of a product's operator; None of another."""
    first = _PRODUCTS.get(event.name)
    if first is None or not event.input_shapes:
        return None
    (rows, inner), (_, columns) = event.input_shapes[first : first + 2]
    return rows, inner, columns

"""What GPUs can do at most, from their makers' public data sheets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Achievable:
    """What good kernels reach of the peaks, and what surrounds them.

    ValueError for shares outside (0, 1], or negative times.
    """

    bandwidth: float = 0.85  # share of the peak
    matrix: float = 0.6067  # share of the peak; by default 600 TFLOP/s on an H200
    launch_s: float = 1.3e-6  # from the end of a kernel to the start of the next inside a CUDA graph, as on an H100
    # Norm with the residual, QKV product, rotary with the append to the slots, attention, output product, norm with the
    # residual, gate and up product, activation, down product.
    kernels_per_layer: int = 9
    host_s: float = 100e-6  # that a heartbeat waits for the host: the plan, and one small read from the device

    def __post_init__(self) -> None:
        for name in ("bandwidth", "matrix"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"the fraction of {name} is {getattr(self, name)}: above 0 and at most 1, the peak")
        for name in ("launch_s", "kernels_per_layer", "host_s"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} is negative")


@dataclass(frozen=True)
class Gpu:
    """Peak rates of one device."""

    name: str
    bandwidth: float  # of device memory, bytes/s
    matrix_rate: float  # dense products of bfloat16 or float16, operations/s: a multiplication and an addition are two
    memory: float  # bytes
    source: str  # where the figures stand
    achievable: Achievable = Achievable()  # how much of this good kernels reach


# Data sheets print 16-bit rates "with sparsity": 2:4 pruned weights at twice the dense rate. Dense ones stand here.
GPUS = {
    gpu.name: gpu
    for gpu in (
        # Measured on one: a device copy moves 4.17 TB/s (read + write), a large product runs at 774 TFLOP/s.
        Gpu("h200", 4.8e12, 989e12, 141e9, "NVIDIA H200 data sheet, SXM: 4.8 TB/s, 1,979 TFLOPS with sparsity, 141 GB"),
        Gpu("h100-sxm", 3.35e12, 989e12, 80e9, "NVIDIA H100 data sheet, SXM: 3.35 TB/s, 1,979 TFLOPS with sparsity"),
        Gpu("a100-80gb", 2.039e12, 312e12, 80e9, "NVIDIA A100 data sheet, 80 GB SXM: 2,039 GB/s, 312 TFLOPS dense"),
        Gpu("l40s", 0.864e12, 362.05e12, 48e9, "NVIDIA L40S data sheet: 864 GB/s, 362.05 TFLOPS dense, 48 GB"),
        Gpu("b200", 8.0e12, 2250e12, 180e9, "NVIDIA DGX B200 data sheet / 8: 64 TB/s, 72 PFLOPS sparse FP8, 1,440 GB"),
    )
}


def gpu_named(name: str) -> Gpu:
    """A GPU of the table, in any case of letters. Raises ValueError for another, with the names there are."""
    try:
        return GPUS[name.lower()]
    except KeyError:
        raise ValueError(f"gpu={name!r} is not in the table: choose from {', '.join(sorted(GPUS))}") from None


def gpu_called(name: str) -> Gpu | None:
    """The data sheet of a GPU by what its driver calls it, or None."""
    words = name.lower().replace("-", " ").split()
    return next((gpu for gpu in GPUS.values() if gpu.name.split("-")[0] in words), None)

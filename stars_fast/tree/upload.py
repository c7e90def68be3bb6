"""Arrays of the host in one copy to a device, behind which nothing waits."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch

_ALIGN = 16  # bytes, where each array begins


def uploaded(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Tensors of these arrays on the device. On a CPU they share the arrays' memory; elsewhere they are views of one
    buffer, which one copy from pinned memory fills.
    """
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    host = packed(arrays)
    return views((host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True), arrays)


def aligned(rows: Sequence[Sequence[float]], dtype: Any) -> np.ndarray:
    """Rows of equal length, padded so that each begins at a multiple of 16 bytes: Triton compiles a kernel again where
    a pointer is one and was none.
    """
    step = _ALIGN // np.dtype(dtype).itemsize
    table = np.zeros((len(rows), -(-len(rows[0]) // step) * step), dtype=dtype)
    table[:, : len(rows[0])] = rows
    return table


def packed(arrays: Sequence[np.ndarray]) -> torch.Tensor:
    """All of them in one row of bytes, each at a multiple of 16."""
    host = np.empty(_starts(arrays)[-1], dtype=np.uint8)
    for array, start in zip(arrays, _starts(arrays), strict=False):
        host[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return torch.from_numpy(host)


def views(buffer: torch.Tensor, arrays: Sequence[np.ndarray]) -> list[torch.Tensor]:
    """The arrays in what :func:`packed` has made of them, wherever that lies now."""
    return [
        buffer[start : start + array.nbytes].view(torch.from_numpy(array).dtype).view(array.shape)
        for array, start in zip(arrays, _starts(arrays), strict=False)
    ]


def _starts(arrays: Sequence[np.ndarray]) -> list[int]:
    """Where each begins, and where the last ends."""
    return [0, *accumulate(-(-array.nbytes // _ALIGN) * _ALIGN for array in arrays)]

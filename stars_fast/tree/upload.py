"""Arrays of the host in one copy to a device, behind which nothing waits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

_ALIGN = 16  # bytes, where each array begins


def uploaded(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Tensors of these arrays on the device. On a CPU they share the arrays' memory; elsewhere they are views of one
    buffer, which one copy from pinned memory fills.
    """
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    starts = np.cumsum([0, *(-(-array.nbytes // _ALIGN) * _ALIGN for array in arrays)])
    host = torch.empty(int(starts[-1]), dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda")
    raw = host.numpy()
    for array, start in zip(arrays, starts[:-1], strict=True):
        raw[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    there = host.to(device, non_blocking=True)
    return [
        there[start : start + array.nbytes].view(torch.from_numpy(array).dtype).view(array.shape)
        for array, start in zip(arrays, starts[:-1].tolist(), strict=True)
    ]

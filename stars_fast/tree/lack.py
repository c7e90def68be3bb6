"""Lack of memory told from other failures, in whatever words a device says it."""

from __future__ import annotations

import re

import torch

from stars_fast.tree.segment_tree import SlotsExhausted

# What is raised as a plain RuntimeError, or as what any failure of a device is: by torch's allocators for a CPU and for
# Apple's devices; by drivers, where graphs and kernels are loaded; by libraries, for their own workspaces.
_REFUSALS = re.compile(
    r"can't allocate memory|not enough memory|(CUDA|HIP|XPU|MPS)\b.{0,40}\bout of memory|_STATUS_ALLOC_FAILED"
)


def is_lack_of_memory(error: BaseException | None) -> bool:
    """Whether a smaller pass may succeed where this one failed."""
    if isinstance(error, (torch.OutOfMemoryError, SlotsExhausted, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and _REFUSALS.search(str(error)) is not None

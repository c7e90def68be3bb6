"""Lack of memory is told from other failures."""

import pytest
import torch

from stars_fast.tree.lack import is_lack_of_memory
from stars_fast.tree.segment_tree import SlotsExhausted


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        SlotsExhausted("4 slots requested, 3 free"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
        torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("HIP out of memory. Tried to allocate 2 GiB."),
        RuntimeError("HIP error: out of memory"),
        RuntimeError("XPU out of memory. Tried to allocate 2 GiB."),
        RuntimeError("MPS backend out of memory (MPS allocated: 17.99 GB, other allocations: 30 MB)."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    ],
    ids=str,
)
def test_every_devices_words_for_it_are_known(error):
    assert is_lack_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        None,
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        RuntimeError("the judge's server is out of memory"),
        ValueError("CUDA out of memory"),
    ],
    ids=str,
)
def test_other_failures_are_none(error):
    assert not is_lack_of_memory(error)

"""The Triton kernel writes what the reference writes, and nowhere else."""

import importlib

import pytest
import torch
from conftest import KERNEL_DEVICE, KERNEL_DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st

from stars_fast.ops.kv_append import kv_append_reference

pytest.importorskip("triton")
kernel = importlib.import_module("stars_fast.kernels.kv_append")


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 9),
    heads=st.sampled_from([1, 2, 3, 8, 40]),
    sizes=st.sampled_from([(8, 8), (80, 80), (96, 64), (192, 128), (256, 256)]),
    dtypes=st.tuples(st.sampled_from(KERNEL_DTYPES), st.sampled_from(KERNEL_DTYPES)),
    transposed=st.booleans(),
    seed=st.integers(0, 999),
)
def test_every_slot_gets_its_token_and_no_other_slot_changes(tokens, heads, sizes, dtypes, transposed, seed):
    generator = torch.Generator().manual_seed(seed)
    new, pools = [], []
    for size in sizes:
        shape = (heads, tokens, size) if transposed else (tokens, heads, size)
        x = torch.randn(shape, generator=generator).to(KERNEL_DEVICE, dtypes[0])
        new.append(x.transpose(0, 1) if transposed else x)
        pools.append(torch.full((tokens + 4, heads, size), torch.nan, dtype=dtypes[1], device=KERNEL_DEVICE))
    slots = (torch.randperm(tokens + 3, generator=generator)[:tokens] + 1).int().to(KERNEL_DEVICE)
    expected = [pool.clone() for pool in pools]
    kernel.kv_append(*new, *pools, slots)
    kv_append_reference(*new, *expected, slots)
    for pool, wanted in zip(pools, expected, strict=True):
        assert torch.equal(pool.nan_to_num(nan=9e4), wanted.nan_to_num(nan=9e4))


def test_a_pool_of_another_shape_is_refused_by_name():
    new, pool = torch.zeros(2, 3, 8), torch.zeros(5, 3, 16)
    with pytest.raises(ValueError, match=r"k_pool must be contiguous \[slots, 3, 8\], got \[5, 3, 16\]"):
        kernel.kv_append(new, new, pool, pool, torch.zeros(2, dtype=torch.int32))

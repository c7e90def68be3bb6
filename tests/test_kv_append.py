"""Keys and values reach their slots and no others."""

import pytest
import torch

from stars_fast.ops import kv_append


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tokens_are_written_to_their_slots_and_nowhere_else(dtype):
    k, v = torch.randn(3, 2, 8), torch.randn(3, 2, 5)
    k_pool, v_pool = torch.zeros(10, 2, 8, dtype=dtype), torch.zeros(10, 2, 5, dtype=dtype)
    kv_append(k, v, k_pool, v_pool, torch.tensor([7, 1, 4], dtype=torch.int32))
    for pool, new in ((k_pool, k), (v_pool, v)):
        assert torch.equal(pool[[7, 1, 4]], new.to(dtype))
        assert pool[[0, 2, 3, 5, 6, 8, 9]].eq(0).all()


def test_slot_0_absorbs_padding_and_stays_finite():
    pool = torch.zeros(4, 1, 2)
    kv_append(torch.ones(5, 1, 2), torch.ones(5, 1, 2), pool, pool.clone(), torch.zeros(5, dtype=torch.int32))
    assert pool[0].isfinite().all()
    assert pool[1:].eq(0).all()


def test_strided_keys_are_taken_as_transformers_gives_them():
    k = torch.randn(2, 3, 8).transpose(0, 1)  # [T = 3, Hkv = 2, 8] of a [1, Hkv, T, D] tensor
    k_pool, v_pool = torch.zeros(5, 2, 8), torch.zeros(5, 2, 8)
    kv_append(k, k, k_pool, v_pool, torch.tensor([3, 1, 2], dtype=torch.int32))
    assert torch.equal(k_pool[[3, 1, 2]], k)

"""The Triton kernel rotates and appends what the reference does; the reference does what transformers does."""

import importlib

import pytest
import torch
from conftest import KERNEL_DEVICE, KERNEL_DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as apply_to_first_elements

from stars_fast.ops.rotary_append import rotary_append_reference

pytest.importorskip("triton")
kernel = importlib.import_module("stars_fast.kernels.rotary_append")


@pytest.mark.parametrize(("rotary", "apply"), [(16, apply_rotary_pos_emb), (4, apply_to_first_elements)])
def test_rotated_as_transformers_does(rotary, apply):
    size = 16
    q, k, v = torch.randn(5, 4, size), torch.randn(5, 2, size), torch.randn(5, 2, size)
    cos, sin = torch.randn(2, 5, rotary)
    k_pool, v_pool, slots = torch.zeros(9, 2, size), torch.zeros(9, 2, size), torch.tensor([3, 1, 8, 2, 5]).int()
    heads_first = [x.transpose(0, 1)[None] for x in (q, k)]
    queries, keys = (x[0].transpose(0, 1) for x in apply(*heads_first, cos[None], sin[None]))
    torch.testing.assert_close(rotary_append_reference(q, k, v, cos, sin, k_pool, v_pool, slots), queries)
    torch.testing.assert_close(k_pool[slots.long()], keys)
    assert torch.equal(v_pool[slots.long()], v)


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(0, 5),
    heads=st.sampled_from([(1, 1), (3, 1), (8, 2), (28, 4), (6, 6)]),
    sizes=st.sampled_from([(8, 8, 8), (80, 32, 80), (96, 96, 64), (192, 64, 128), (256, 256, 256)]),
    dtypes=st.tuples(*[st.sampled_from(KERNEL_DTYPES)] * 3),
    transposed=st.booleans(),
    seed=st.integers(0, 999),
)
def test_queries_and_slots_are_those_of_the_reference(tokens, heads, sizes, dtypes, transposed, seed):
    generator, (size, rotary, value_size) = torch.Generator().manual_seed(seed), sizes
    given, angles, pools = dtypes

    def made(count, width, dtype):
        shape = (count, tokens, width) if transposed else (tokens, count, width)
        x = torch.randn(shape, generator=generator).to(KERNEL_DEVICE, dtype)
        return x.transpose(0, 1) if transposed else x

    q, k, v = made(heads[0], size, given), made(heads[1], size, given), made(heads[1], value_size, given)
    if tokens:
        v[0, 0, 0] = torch.inf  # its key is then NaN
    cos, sin = torch.randn(2, tokens, rotary, generator=generator).to(KERNEL_DEVICE, angles)
    ours, theirs = (
        [torch.full((tokens + 4, heads[1], x), 7.0, dtype=pools, device=KERNEL_DEVICE) for x in (size, value_size)]
        for _ in range(2)
    )
    slots = (torch.randperm(tokens + 3, generator=generator)[:tokens] + 1).int().to(KERNEL_DEVICE)
    rotated = kernel.rotary_append(q, k, v, cos, sin, *ours, slots)
    expected = rotary_append_reference(q, k, v, cos, sin, *theirs, slots)
    if tokens:
        first = slots[0].long()
        assert ours[0][first, 0].isnan().all() and ours[1][first, 0, 0] == 0
        for pool in (*ours, *theirs):
            pool[first, 0] = 0
    close = {"atol": 1e-5, "rtol": 1e-5} if given == torch.float32 == pools else {"atol": 2e-2, "rtol": 1e-2}
    assert rotated.dtype == given and rotated.is_contiguous()
    for one, other in zip((rotated, *ours), (expected, *theirs), strict=True):
        torch.testing.assert_close(one, other, **close)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cos": torch.zeros(2, 5)}, r"cos must be \[2, an even number up to 8\], got \[2, 5\]"),
        ({"sin": torch.zeros(3, 4)}, r"sin must be \[2, an even number up to 8\], got \[3, 4\]"),
        ({"k": torch.zeros(2, 3, 4)}, r"k must be \[2, heads, 8\], as q is, got \[2, 3, 4\]"),
        ({"k_pool": torch.zeros(5, 3, 16)}, r"rotary_append: k_pool must be contiguous \[slots, 3, 8\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_by_name(change, message):
    pool = torch.zeros(5, 3, 8)
    arguments = dict(q=pool[:2], k=pool[:2], v=pool[:2], cos=torch.zeros(2, 4), sin=torch.zeros(2, 4))
    arguments |= dict(k_pool=pool, v_pool=pool, slots=torch.zeros(2, dtype=torch.int32)) | change
    with pytest.raises(ValueError, match=message):
        kernel.rotary_append(**arguments)

"""Rotary embedding of queries and keys, and the append of keys and values, in one launch."""

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from stars_fast.ops._library import address
from stars_fast.ops.rotary_append import check_rotary

from .dependent import begin_dependent, dependent
from .kv_append import check_pools
from .variant import Variant

_MOST_ELEMENTS = 2048  # of one program


@triton.jit
def _rotated(x, cos, sin, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, mask):
    """Both halves of heads ``[BLOCK_HEADS, BLOCK_HALF]`` in float32."""
    d = tl.arange(0, BLOCK_HALF)[None, :]
    here = mask & (d < HALF)
    one, other = tl.load(x + d, here).to(tl.float32), tl.load(x + HALF + d, here).to(tl.float32)
    d = tl.arange(0, BLOCK_HALF)
    first_cos, last_cos = tl.load(cos + d, d < HALF).to(tl.float32), tl.load(cos + HALF + d, d < HALF).to(tl.float32)
    first_sin, last_sin = tl.load(sin + d, d < HALF).to(tl.float32), tl.load(sin + HALF + d, d < HALF).to(tl.float32)
    return one * first_cos - other * first_sin, other * last_cos + one * last_sin


@triton.jit(do_not_specialize=["heads", "kv_heads", "query_blocks"])
def rotary_append_kernel(
    q,
    k,
    v,
    cos,
    sin,
    rotated_q,
    k_pool,
    v_pool,
    slots,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    cos_token_stride,
    sin_token_stride,
    heads,
    kv_heads,
    query_blocks,
    HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PDL: tl.constexpr,
):
    """Some heads of one token: of queries, or of keys and values, whose NaNs are those of ``kv_append_kernel``."""
    begin_dependent(PDL)
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cos += token * cos_token_stride
    sin += token * sin_token_stride
    d, rest = tl.arange(0, BLOCK_HALF)[None, :], 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
    if block < query_blocks:
        head = block * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
        mask = head < heads
        x = q + token * q_token_stride + head.to(tl.int64) * q_head_stride
        one, other = _rotated(x, cos, sin, HALF, BLOCK_HALF, mask)
        out = rotated_q + (token * heads + head) * HEAD_SIZE
        tl.store(out + d, one.to(rotated_q.dtype.element_ty), mask & (d < HALF))
        tl.store(out + HALF + d, other.to(rotated_q.dtype.element_ty), mask & (d < HALF))
        if 2 * HALF < HEAD_SIZE:
            here = mask & (rest < HEAD_SIZE)
            tl.store(out + rest, tl.load(x + rest, here), here)
    else:
        slot = tl.load(slots + token).to(tl.int64)
        head = (block - query_blocks) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
        mask = head < kv_heads
        dv = tl.arange(0, BLOCK_DV)[None, :]
        here = mask & (dv < VALUE_SIZE)
        values = tl.load(v + token * v_token_stride + head.to(tl.int64) * v_head_stride + dv, here, other=0.0)
        rounded = values.to(v_pool.dtype.element_ty)
        magnitude = tl.abs(rounded.to(tl.float32))
        finite = tl.min((magnitude < float("inf")).to(tl.int32), 1, keep_dims=True) != 0
        tl.store(v_pool + (slot * kv_heads + head) * VALUE_SIZE + dv, tl.where(finite, rounded, 0.0), here)
        x = k + token * k_token_stride + head.to(tl.int64) * k_head_stride
        one, other = _rotated(x, cos, sin, HALF, BLOCK_HALF, mask)
        one, other = tl.where(finite, one, float("nan")), tl.where(finite, other, float("nan"))
        out = k_pool + (slot * kv_heads + head) * HEAD_SIZE
        tl.store(out + d, one.to(k.dtype.element_ty).to(k_pool.dtype.element_ty), mask & (d < HALF))
        tl.store(out + HALF + d, other.to(k.dtype.element_ty).to(k_pool.dtype.element_ty), mask & (d < HALF))
        if 2 * HALF < HEAD_SIZE:
            here = mask & (rest < HEAD_SIZE)
            kept = tl.where(finite, tl.load(x + rest, here).to(tl.float32), float("nan"))
            tl.store(out + rest, kept.to(k_pool.dtype.element_ty), here)


def _constants(head_size: int, value_size: int, rotary: int, heads: int) -> dict[str, int]:
    half, rest = rotary // 2, head_size - rotary
    block_half, block_dv = triton.next_power_of_2(half), triton.next_power_of_2(value_size)
    largest = max(2 * block_half, block_dv)
    return {
        "HEAD_SIZE": head_size,
        "VALUE_SIZE": value_size,
        "HALF": half,
        "BLOCK_HEADS": min(triton.next_power_of_2(heads), max(1, _MOST_ELEMENTS // largest)),
        "BLOCK_HALF": block_half,
        "BLOCK_REST": triton.next_power_of_2(max(rest, 1)),
        "BLOCK_DV": block_dv,
    }


def rotary_append(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    """:func:`stars_fast.ops.rotary_append` in Triton."""
    (tokens, heads, head_size), kv_heads, value_size = q.shape, k.shape[1], v.shape[-1]
    check_rotary(q, k, cos, sin)
    check_pools("rotary_append", k, v, k_pool, v_pool)
    address(slots, "slots", torch.int32, (tokens,))
    rotated = torch.empty((tokens, heads, head_size), dtype=q.dtype, device=q.device)
    if tokens == 0:
        return rotated
    q, k, v, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, cos, sin))
    constants = _constants(head_size, value_size, cos.shape[-1], max(heads, kv_heads))
    query_blocks = triton.cdiv(heads, constants["BLOCK_HEADS"])
    rotary_append_kernel[(tokens, query_blocks + triton.cdiv(kv_heads, constants["BLOCK_HEADS"]))](
        q,
        k,
        v,
        cos,
        sin,
        rotated,
        k_pool,
        v_pool,
        slots,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        cos.stride(0),
        sin.stride(0),
        heads,
        kv_heads,
        query_blocks,
        **constants,
        **dependent(q.device),
        num_warps=4,
        enable_fp_fusion=False,
    )
    return rotated


def variants(target: GPUTarget) -> list[Variant]:
    """Of common models, three dtypes; one that turns a quarter of its heads."""
    found = []
    cases = [("fp32", 128, 128, False), ("fp16", 128, 128, False), ("bf16", 128, 128, False), ("bf16", 256, 64, False)]
    if target.arch == 90:
        cases.append(("bf16", 128, 128, True))
    for dtype, size, rotary, pdl in cases:
        types = {name: "i32:16" for name in rotary_append_kernel.arg_names if name.islower()}
        types |= dict.fromkeys(("q", "k", "v", "cos", "sin", "rotated_q", "k_pool", "v_pool"), f"*{dtype}")
        types |= dict.fromkeys(("heads", "kv_heads", "query_blocks"), "i32") | {"slots": "*i32"}
        constants = _constants(size, size, rotary, 32) | {"PDL": pdl}
        name = f"rotary_append[{rotary}/{size},{dtype}{',dependent' if pdl else ''}]"
        found.append(Variant(name, rotary_append_kernel, types, constants))
    return found

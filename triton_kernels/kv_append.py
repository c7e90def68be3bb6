"""Keys and values of new tokens to their slots."""

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from stars_fast.ops._library import address

from .variant import Variant

_MOST_ELEMENTS = 4096  # of one program


@triton.jit(do_not_specialize=["heads"])
def kv_append_kernel(
    k,
    v,
    k_pool,
    v_pool,
    slots,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    heads,
    HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Some heads of one token. Tokens of slot 0 (padding) may write it at once: it is never read.

    In attention a weight of 0 times a NaN is NaN, so a value that is not finite would reach queries that share a tile
    with those that see it. It is written as 0, and the key as NaN, which only those that see it notice.
    """
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
    d, dv = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_DV)[None, :]
    here = (head < heads) & (dv < VALUE_SIZE)
    values = tl.load(v + token * v_token_stride + head.to(tl.int64) * v_head_stride + dv, here, other=0.0)
    rounded = values.to(v_pool.dtype.element_ty)
    magnitude = tl.abs(rounded.to(tl.float32))
    finite = tl.min((magnitude < float("inf")).to(tl.int32), 1, keep_dims=True) != 0  # a NaN is not less
    tl.store(v_pool + (slot * heads + head) * VALUE_SIZE + dv, tl.where(finite, rounded, 0.0), here)
    here = (head < heads) & (d < HEAD_SIZE)
    keys = tl.load(k + token * k_token_stride + head.to(tl.int64) * k_head_stride + d, here)
    keys = tl.where(finite, keys.to(tl.float32), float("nan")).to(k_pool.dtype.element_ty)
    tl.store(k_pool + (slot * heads + head) * HEAD_SIZE + d, keys, here)


def check_pools(operator: str, k: torch.Tensor, v: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor) -> None:
    """Refuse pools that these keys and values do not fit."""
    heads = k.shape[1]
    for name, pool, size in (("k_pool", k_pool, k.shape[2]), ("v_pool", v_pool, v.shape[2])):
        if pool.shape[1:] != (heads, size) or not pool.is_contiguous():
            raise ValueError(
                f"{operator}: {name} must be contiguous [slots, {heads}, {size}], got {list(pool.shape)} with strides "
                f"{pool.stride()}"
            )


def kv_append(
    k: torch.Tensor, v: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, slots: torch.Tensor
) -> None:
    """:func:`stars_fast.ops.kv_append` in Triton."""
    (tokens, heads, head_size), value_size = k.shape, v.shape[-1]
    check_pools("kv_append", k, v, k_pool, v_pool)
    address(slots, "slots", torch.int32, (tokens,))
    if tokens == 0:
        return
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    block_d, block_dv = triton.next_power_of_2(head_size), triton.next_power_of_2(value_size)
    block_heads = min(triton.next_power_of_2(heads), max(1, _MOST_ELEMENTS // max(block_d, block_dv)))
    kv_append_kernel[(tokens, triton.cdiv(heads, block_heads))](
        k,
        v,
        k_pool,
        v_pool,
        slots,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        heads,
        HEAD_SIZE=head_size,
        VALUE_SIZE=value_size,
        BLOCK_HEADS=block_heads,
        BLOCK_D=block_d,
        BLOCK_DV=block_dv,
        num_warps=4,
        enable_fp_fusion=False,
    )


def variants(target: GPUTarget) -> list[Variant]:
    """The largest of common models, three dtypes; one whose keys and values differ in size."""
    found = []
    for dtype, heads, size, value_size in (("fp32", 8, 128, 128), ("fp16", 8, 128, 128), ("bf16", 16, 192, 128)):
        types = {name: "i32:16" for name in kv_append_kernel.arg_names if name.islower()}
        types |= dict.fromkeys(("k", "v", "k_pool", "v_pool"), f"*{dtype}") | {"slots": "*i32", "heads": "i32"}
        constants = {
            "HEAD_SIZE": size,
            "VALUE_SIZE": value_size,
            "BLOCK_HEADS": heads,
            "BLOCK_D": triton.next_power_of_2(size),
            "BLOCK_DV": triton.next_power_of_2(value_size),
        }
        found.append(Variant(f"kv_append[{heads}x{size},{dtype}]", kv_append_kernel, types, constants))
    return found

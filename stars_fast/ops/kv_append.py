"""Write the keys and values of new tokens to their slots."""

from __future__ import annotations

from collections.abc import Callable

import torch

from stars_fast.ops._library import address, define


def kv_append_reference(
    k: torch.Tensor, v: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, slots: torch.Tensor
) -> None:
    """Write the keys and values of new tokens to their slots.

    Parameters
    ----------
    k, v
        ``[T, Hkv, D]`` and ``[T, Hkv, Dv]``, any strides.
    k_pool, v_pool
        ``[N, Hkv, D]`` and ``[N, Hkv, Dv]``: one layer's storage, written in place, rounded to its dtype.
    slots
        int32 ``[T]`` in ``[0, N)``. Slot 0 absorbs padding; the others must differ from one another.

    Raises
    ------
    ValueError
        For a dtype, shape or strides that a kernel would misread, and where ``_library`` says that contents are
        checked, for a slot that the pools do not have and for pools that share memory with another argument.

    Notes
    -----
    Where a token's value is not finite, attention gives NaN to the queries that see it, and to no others; an
    implementation may write another value and a key of NaN to that end.
    """
    index = slots.long()
    k_pool.index_copy_(0, index, k.to(k_pool.dtype))
    v_pool.index_copy_(0, index, v.to(v_pool.dtype))


def _call(
    function: Callable[..., None],
    k: torch.Tensor,
    v: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    (tokens, heads, head_size), value_size, pool_slots = k.shape, v.shape[-1], k_pool.shape[0]
    if v.shape != (tokens, heads, value_size):
        raise ValueError(f"v must be {[tokens, heads]} and one more size, as k is, got {list(v.shape)}")
    k, v = k.to(k_pool.dtype), v.to(v_pool.dtype)
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    k_width, v_width = k.element_size(), v.element_size()
    function(
        k.data_ptr(),
        k.stride(0) * k_width,
        k.stride(1) * k_width,
        address(k_pool, "k_pool", k.dtype, (pool_slots, heads, head_size)),
        head_size * k_width,
        v.data_ptr(),
        v.stride(0) * v_width,
        v.stride(1) * v_width,
        address(v_pool, "v_pool", v.dtype, (pool_slots, heads, value_size)),
        value_size * v_width,
        address(slots, "slots", torch.int32, (tokens,)),
        tokens,
        heads,
        pool_slots,
    )


kv_append = define(
    "kv_append", reference=kv_append_reference, call=_call, fake=lambda *_: None, written=("k_pool", "v_pool")
)

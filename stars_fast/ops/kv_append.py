"""Write the keys and values of new tokens to their slots."""

from __future__ import annotations

import torch

from stars_fast.ops._library import address, define, native

_native = native("kv_append")


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
        int32 ``[T]``. Slot 0 absorbs padding; the others must differ from one another.

    Notes
    -----
    Where a token's value is not finite, attention gives NaN to the queries that see it, and to no others; an
    implementation may write another value and a key of NaN to that end.
    """
    index = slots.long()
    k_pool.index_copy_(0, index, k.to(k_pool.dtype))
    v_pool.index_copy_(0, index, v.to(v_pool.dtype))


def _cpu(k: torch.Tensor, v: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, slots: torch.Tensor) -> None:
    for new, pool in ((k, k_pool), (v, v_pool)):
        tokens, heads, size = new.shape
        new = new.to(pool.dtype)
        if new.stride(-1) != 1:
            new = new.contiguous()
        width = pool.element_size()
        assert _native is not None
        _native(
            new.data_ptr(),
            new.stride(0) * width,
            new.stride(1) * width,
            address(pool, "pool", pool.dtype, (pool.shape[0], heads, size)),
            address(slots, "slots", torch.int32, (tokens,)),
            tokens,
            heads,
            size * width,
        )


kv_append = define(
    "kv_append", reference=kv_append_reference, cpu=_cpu, fake=lambda *_: None, written=("k_pool", "v_pool")
)

"""Rotate queries and keys, and write keys and values to their slots."""

from __future__ import annotations

import torch

from stars_fast.ops._library import define
from stars_fast.ops.kv_append import kv_append_reference


def rotary_append_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    """Rotate queries and keys, and write keys and values to their slots as :func:`stars_fast.ops.kv_append` does.

    Of the first R elements of a head, those of the one half are turned with those of the other (rotary embeddings as
    in arXiv 2104.09864, with halves for neighbours as in transformers' ``rotate_half``); the others stay. Computed in
    float32 and rounded once.

    Parameters
    ----------
    q, k, v
        ``[T, Hq, D]``, ``[T, Hkv, D]`` and ``[T, Hkv, Dv]``, any strides.
    cos, sin
        ``[T, R]`` of any float dtype, R even and at most D.
    k_pool, v_pool
        ``[N, Hkv, D]`` and ``[N, Hkv, Dv]``: one layer's storage, written in place, rounded to its dtype.
    slots
        int32 ``[T]`` in ``[0, N)``, as for ``kv_append``; not checked.

    Returns
    -------
    torch.Tensor
        Rotated queries ``[T, Hq, D]``, contiguous, of the dtype of q.

    Raises
    ------
    ValueError
        For shapes that do not fit, and as ``kv_append`` does.
    """
    check_rotary(q, k, cos, sin)
    kv_append_reference(_rotated(k, cos, sin), v, k_pool, v_pool, slots)
    return _rotated(q, cos, sin)


def check_rotary(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Refuse angles that are not those of these queries and keys."""
    tokens, size, rotary = q.shape[0], q.shape[2], cos.shape[-1]
    if k.shape[0] != tokens or k.shape[2] != size:
        raise ValueError(f"rotary_append: k must be [{tokens}, heads, {size}], as q is, got {list(k.shape)}")
    for name, angles in (("cos", cos), ("sin", sin)):
        if angles.shape != (tokens, rotary) or rotary % 2 or rotary > size:
            raise ValueError(
                f"rotary_append: {name} must be [{tokens}, an even number up to {size}], got {list(angles.shape)}"
            )


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    turned, rest = x[..., : cos.shape[-1]].float(), x[..., cos.shape[-1] :]
    one, other = turned.chunk(2, -1)
    turned = turned * cos.float()[:, None] + torch.cat((-other, one), -1) * sin.float()[:, None]
    return torch.cat((turned.to(x.dtype), rest), -1)


rotary_append = define(
    "rotary_append",
    reference=rotary_append_reference,
    fake=lambda q, *_: q.new_empty(q.shape),
    written=("k_pool", "v_pool"),
)

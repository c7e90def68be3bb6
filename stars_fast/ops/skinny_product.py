"""Products of few rows with up to three weights in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from stars_fast.ops._library import define


def skinny_product_reference(
    x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Products of the same rows with one to three weights, which stay where they are.

    Parameters
    ----------
    x
        ``[..., K]``; where it has more rows than a decode step, torch's own products are taken.
    weights
        ``[N, K]`` each, contiguous, of the dtype of x.
    biases
        ``[N]`` each, or none at all.

    Returns
    -------
    list of torch.Tensor
        ``[..., N]`` each, contiguous, summed in float32 and rounded once.

    Raises
    ------
    ValueError
        For weights of another size, dtype or layout, or too many.
    """
    return [F.linear(x, weight, *biases[i : i + 1]) for i, weight in enumerate(weights)]


skinny_product = define(
    "skinny_product",
    reference=skinny_product_reference,
    fake=lambda x, weights, biases: [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights],
)

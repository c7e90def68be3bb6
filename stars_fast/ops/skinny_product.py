"""Products of few rows with weights that are read once: up to three in one launch on a GPU, one by one on a CPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from stars_fast._C import floats_of_registers
from stars_fast.ops._library import address, define

# Up to here a CPU's products were measured to be faster than MKL's, on one machine, by the floats of a register
# (docs/findings/cpu-step.md). Where they hold four nothing was measured.
MOST_ROWS_ON_CPU = {16: 48, 8: 16}.get(floats_of_registers(), 0)


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
        ``[..., N]`` each, contiguous, summed in float32 and rounded once. On a CPU up to
        ``MOST_ROWS_ON_CPU`` float32 rows, of a multiple of 16, each get the same numbers, to the bit, whatever rows
        stand beside them and however many.

    Raises
    ------
    ValueError
        For weights of another size, dtype or layout, or too many.
    """
    return [F.linear(x, weight, *biases[i : i + 1]) for i, weight in enumerate(weights)]


def _call(
    function: Callable[..., None], x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    *batch, inputs = x.shape
    rows = math.prod(batch)
    if rows > MOST_ROWS_ON_CPU or inputs % 16 or x.dtype != torch.float32:
        return skinny_product_reference(x, weights, biases)
    if len(biases) not in (0, len(weights)):
        raise ValueError(f"skinny_product: as many biases or none, got {len(weights)} and {len(biases)}")
    x, products = x.contiguous(), []
    for i, weight in enumerate(weights):
        outputs = weight.shape[0]
        out = x.new_empty(*batch, outputs)
        function(
            x.data_ptr(),
            address(weight, "weight", torch.float32, (outputs, inputs)),
            address(biases[i], "bias", torch.float32, (outputs,)) if biases else 0,
            out.data_ptr(),
            rows,
            inputs,
            outputs,
            torch.get_num_threads(),
        )
        products.append(out)
    return products


skinny_product = define(
    "skinny_product",
    reference=skinny_product_reference,
    call=_call,
    fake=lambda x, weights, biases: [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights],
)

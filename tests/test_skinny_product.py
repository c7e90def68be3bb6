"""Products of few rows on a CPU. What Triton makes of them: test_triton_skinny_product.py."""

import pytest
import torch
import torch.nn.functional as F

from stars_fast.ops import skinny_product
from stars_fast.ops.skinny_product import MOST_ROWS_ON_CPU, skinny_product_reference

BOTH = [pytest.param(skinny_product, id="operator"), pytest.param(skinny_product_reference, id="reference")]


def made(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("product", BOTH)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 32, 33])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 16), (37, 96), (130, 64), (16, 0), (7, 5)])
def test_a_product_is_that_of_doubles(product, rows, outputs, inputs):
    x, weight, bias, other = made((1, rows, inputs), (outputs, inputs), (outputs,), (outputs + 2, inputs))
    expected = F.linear(x.double(), weight.double())
    for biases in ([], [bias, torch.ones(outputs + 2)]):
        first, second = product(x, [weight, other], biases)
        added = biases[0].double() if biases else 0.0
        torch.testing.assert_close(first.double(), expected + added, rtol=1e-5, atol=1e-5)
        assert first.is_contiguous() and second.shape == (1, rows, outputs + 2)


@pytest.mark.skipif(MOST_ROWS_ON_CPU < 2, reason="this processor's products are torch's")
def test_a_rows_numbers_depend_neither_on_other_rows_nor_on_threads():
    (x, weight, bias), threads = made((MOST_ROWS_ON_CPU, 80), (2001, 80), (2001,)), torch.get_num_threads()
    alone = torch.cat([skinny_product(row[None], [weight], [bias])[0] for row in x])
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for rows in range(1, MOST_ROWS_ON_CPU + 1):
                assert torch.equal(skinny_product(x[-rows:], [weight], [bias])[0], alone[-rows:])
    finally:
        torch.set_num_threads(threads)
    # nor on the outputs beside it
    assert torch.equal(skinny_product(x, [weight[3:8]], [bias[3:8]])[0], alone[:, 3:8])


def test_rows_may_lie_apart_and_other_dtypes_are_torchs():
    (x, weight) = made((64, 6), (9, 64))
    torch.testing.assert_close(skinny_product(x.t(), [weight], [])[0], F.linear(x.t(), weight))
    x, weight = x.t().bfloat16(), weight.bfloat16()
    assert torch.equal(skinny_product(x, [weight], [])[0], F.linear(x, weight))


def test_no_rows_and_what_is_not_a_number():
    x, weight = made((4, 32), (40, 32))
    assert skinny_product(x[:0], [weight], [])[0].shape == (0, 40)
    x[1, 31], x[2, 3] = torch.nan, torch.inf
    (product,) = skinny_product(x, [weight], [])
    assert product[1].isnan().all() and product[2].isinf().all() and product[[0, 3]].isfinite().all()


@pytest.mark.skipif(MOST_ROWS_ON_CPU < 2, reason="this processor's products are torch's")
@pytest.mark.parametrize(
    ("weights", "biases", "message"),
    [
        ([torch.zeros(3, 9)], [], r"weight must be torch.float32 \[3, 16\], got torch.float32 \[3, 9\]"),
        ([torch.zeros(16, 3).t()], [], r"weight must be contiguous, got strides \(1, 3\)"),
        ([torch.zeros(3, 16)], [torch.zeros(2)], r"bias must be torch.float32 \[3\]"),
        ([torch.zeros(3, 16)] * 2, [torch.zeros(3)], "as many biases or none, got 2 and 1"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights, biases, message):
    with pytest.raises(ValueError, match=message):
        skinny_product(torch.zeros(2, 16), weights, biases)

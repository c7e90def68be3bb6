"""Our own product is torch's, whatever its sizes, and takes part in a layer where the switch says so."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from conftest import KERNEL_DEVICE, KERNEL_DTYPES, sum_reward, tiny_policy

from stars_fast import StarsConfig, StarsEngine
from stars_fast.tree import joined
from stars_fast.tree.compiled import CompiledLayers

pytest.importorskip("triton")
kernel = importlib.import_module("stars_fast.kernels.skinny_product")


@pytest.mark.parametrize(
    ("rows", "columns", "inner", "biased"),
    [
        (1, [1], 32, False),
        (3, [64, 65], 80, True),  # no whole blocks
        (17, [65, 1, 200], 640, True),  # cut in parts
        (60, [64, 64, 64], 1024, False),
        (100, [130], 256, True),
        (150, [65, 200], 640, False),  # 128 rows and 64
        (193, [64], 336, True),
        (300, [7], 32, True),  # left to torch, as is the next
        (5, [7], 77, True),
    ],
)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_a_product_is_that_of_torch(rows, columns, inner, biased, dtype):
    generator = torch.Generator().manual_seed(0)

    def made(*shape):
        return torch.randn(shape, generator=generator).to(KERNEL_DEVICE, dtype)

    x, weights = made(1, rows, inner), [made(count, inner) for count in columns]
    biases = [made(count) for count in columns] if biased else []
    found = kernel.skinny_product(x, weights, biases)
    assert len(found) == len(weights)
    for i, (product, weight) in enumerate(zip(found, weights, strict=True)):
        wanted = F.linear(x.float(), weight.float(), *(bias.float() for bias in biases[i : i + 1]))
        assert product.dtype == dtype and product.is_contiguous()
        close = {"atol": 1e-3, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 6e-2, "rtol": 3e-3}
        torch.testing.assert_close(product.float(), wanted, **close)


@pytest.mark.parametrize(
    ("weights", "biases", "message"),
    [
        ([torch.zeros(3, 8)] * 4, [], "1 to 3 weights, and as many biases or none, got 4 and 0"),
        ([torch.zeros(3, 8)] * 2, [torch.zeros(3)], "got 2 and 1"),
        ([torch.zeros(3, 9)], [], r"contiguous \[columns, 8\] of torch.float32, as x is, got \[3, 9\]"),
        ([torch.zeros(8, 3).t()], [], r"with strides \(1, 3\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights, biases, message):
    with pytest.raises(ValueError, match=message):
        kernel.skinny_product(torch.zeros(2, 8), weights, biases)


def test_the_switch_joins_the_products_of_the_same_rows(monkeypatch):
    model, found = tiny_policy(64, hidden=32, attention_bias=True), []

    def backend(module, inputs):
        joined.join(module)
        found.append(sum(node.target is torch.ops.stars_fast.skinny_product.default for node in module.graph.nodes))
        return module.forward

    def answers():
        config = StarsConfig(max_new_tokens=4, target_reward=-1e9, base_reward=-1e9)
        return StarsEngine(model, sum_reward).generate([[1, 2, 3], [4, 5]], config, seed=0).completions

    plain = answers()
    monkeypatch.setattr(joined, "PRODUCTS", "triton")
    with CompiledLayers(model, backend=backend).running():
        assert answers() == plain
    assert set(found) == {3}, "q, k and v; o; gate and up: the down product goes with the residual"

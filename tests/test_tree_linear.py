"""Linear layers through oneDNN: the same numbers, and nothing left behind."""

import pytest
import torch
from torch import nn

from stars_fast.tree import linear
from stars_fast.tree.linear import onednn_linears


@pytest.fixture(autouse=True)
def worthwhile(monkeypatch):
    monkeypatch.setattr(linear, "_WORTHWHILE", torch.backends.mkldnn.is_available())


@pytest.mark.parametrize("bias", [True, False])
def test_the_numbers_stay_the_same_and_the_layer_is_as_it_was(bias):
    model, x = nn.Sequential(nn.Linear(24, 40, bias=bias), nn.Linear(40, 8, bias=bias)), torch.randn(1, 5, 24)
    with torch.no_grad():
        expected = model(x)
        with onednn_linears(model):
            torch.testing.assert_close(model(x), expected)
        assert torch.equal(model(x), expected)
    assert all(type(layer) is nn.Linear for layer in model)


def test_gradients_still_flow_inside():
    model, x = nn.Linear(6, 4), torch.randn(3, 6, requires_grad=True)
    with onednn_linears(model):
        model(x).sum().backward()
    assert x.grad is not None


def test_other_layers_are_left_alone():
    class Quantised(nn.Linear):
        pass

    replaced, half = nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.bfloat16)
    replaced.forward = own = lambda x: x
    model = nn.ModuleList([replaced, half, Quantised(4, 4)])
    with onednn_linears(model):
        assert replaced.forward is own
        assert [type(layer) for layer in model] == [nn.Linear, nn.Linear, Quantised]
    assert replaced.forward is own

"""Linear layers through oneDNN or our own products: the same numbers, and nothing left behind."""

import copy
import io
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from stars_fast.ops.skinny_product import MOST_ROWS_ON_CPU
from stars_fast.tree import linear
from stars_fast.tree.linear import faster_linears


@pytest.fixture(params=["_ONEDNN", "_SKINNY"])
def rule(request, monkeypatch):
    """Each rule, as on a machine where it holds."""
    available = {"_ONEDNN": torch.backends.mkldnn.is_available(), "_SKINNY": MOST_ROWS_ON_CPU > 0}
    for name in available:
        monkeypatch.setattr(linear, name, name == request.param and available[name])
    monkeypatch.setattr(linear, "_LEAST_WEIGHT", 0)
    for name in linear._CAPACITIES:  # what is set stays for good, and other tests have no part in it
        monkeypatch.setenv(name, "1024")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.usefixtures("rule")
def test_the_numbers_stay_the_same_and_the_layer_is_as_it_was(bias):
    model, x = nn.Sequential(nn.Linear(32, 48, bias=bias), nn.Linear(48, 8, bias=bias)), torch.randn(1, 5, 32)
    with torch.no_grad():
        expected = model(x)
        with faster_linears(model):
            torch.testing.assert_close(model(x), expected)
        assert torch.equal(model(x), expected)
    assert all(type(layer) is nn.Linear for layer in model)


@pytest.mark.usefixtures("rule")
def test_gradients_still_flow_inside():
    model, x = nn.Linear(16, 4), torch.randn(3, 16, requires_grad=True)
    with faster_linears(model):
        model(x).sum().backward()
    assert x.grad is not None


@pytest.mark.usefixtures("rule")
def test_a_copy_that_is_made_or_saved_inside_is_torchs():
    layer, saved = nn.Linear(16, 4), io.BytesIO()
    with faster_linears(layer):
        copied = copy.deepcopy(layer)
        torch.save(layer, saved)
    saved.seek(0)
    for other in (copied, torch.load(saved, weights_only=False)):
        assert type(other) is nn.Linear and torch.equal(other.weight, layer.weight)
    assert b"stars_fast" not in saved.getvalue()


@pytest.mark.usefixtures("rule")
def test_who_calls_a_layer_inside_autocast_gets_its_dtype():
    layer = nn.Linear(16, 4)
    with torch.no_grad(), faster_linears(layer), torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(3, 16)).dtype == torch.bfloat16


@pytest.mark.usefixtures("rule")
def test_a_layer_that_is_changed_inside_goes_on():
    layers, x = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)]), torch.randn(3, 16)
    with torch.no_grad(), faster_linears(layers):
        layers[0].weight = nn.Parameter(torch.randn(16, 16).t())
        nn.utils.parametrize.register_parametrization(layers[1], "weight", nn.Identity())
        inside = [layer(x) for layer in layers]
    for layer, before in zip(layers, inside, strict=True):
        torch.testing.assert_close(layer(x), before)


@pytest.mark.parametrize("rule", ["_SKINNY"], indirect=True)
def test_few_rows_get_their_own_numbers_whatever_is_beside_them_and_others_get_mkls(rule):
    if not MOST_ROWS_ON_CPU:
        pytest.skip("this processor's products are torch's")
    tied = nn.Embedding(70, 48)
    head, x = nn.Linear(48, 70, bias=False), torch.randn(1, MOST_ROWS_ON_CPU + 1, 48)
    head.weight = tied.weight
    with torch.no_grad():
        torchs, torchs_one = head(x), head(x[:, :1])
        with faster_linears(head):
            assert torch.equal(head(x), torchs) and torch.equal(head(x[:, :1]), torchs_one)
            few = head(x[:, 1:])
            torch.testing.assert_close(few, torchs[:, 1:])
            for row in range(MOST_ROWS_ON_CPU - 1):
                assert torch.equal(head(x[:, row + 1 : row + 3]), few[:, row : row + 2])
    assert head.weight is tied.weight


@pytest.mark.parametrize("rule", ["_SKINNY"], indirect=True)
def test_small_weights_and_those_that_lie_apart_stay_with_torch(rule, monkeypatch):
    monkeypatch.setattr(linear, "_LEAST_WEIGHT", 32 * 32)
    small, large, apart, uneven = nn.Linear(32, 31), nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(40, 32)
    apart.weight = nn.Parameter(torch.randn(32, 32).t())
    with faster_linears(nn.ModuleList([small, large, apart, uneven])):
        faster = linear._SkinnyLinear if MOST_ROWS_ON_CPU else nn.Linear
        assert [type(layer) for layer in (small, large, apart, uneven)] == [nn.Linear, faster, nn.Linear, nn.Linear]


@pytest.mark.usefixtures("rule")
def test_other_layers_are_left_alone():
    class Quantised(nn.Linear):
        pass

    replaced, half = nn.Linear(16, 4), nn.Linear(16, 4, dtype=torch.bfloat16)
    replaced.forward = own = lambda x: x
    model = nn.ModuleList([replaced, half, Quantised(16, 4)])
    with faster_linears(model):
        assert replaced.forward is own
        assert [type(layer) for layer in model] == [nn.Linear, nn.Linear, Quantised]
    assert replaced.forward is own


# In a process of its own: a thread asks once.
LENGTHS = """
import ctypes, resource
from pathlib import Path
import torch
from torch import nn
from stars_fast.ops.skinny_product import MOST_ROWS_ON_CPU
from stars_fast.tree import linear

def megabytes():
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6

linear._ONEDNN = True
layers = nn.ModuleList(nn.Linear(size, 32) for size in (8, 16, 24, 32))
with torch.no_grad(), linear.faster_linears(layers):
    layers[0](torch.zeros(1, 1, 8))
    before = megabytes()
    for rows in range(1, 400, 4):
        for layer in layers:
            layer(torch.zeros(1, rows, layer.in_features))
    print(megabytes() - before)
"""


def megabytes_kept(**environment):
    """Of 400 kernels, where the environment says this and no more."""
    unset = {name: value for name, value in os.environ.items() if name not in linear._CAPACITIES}
    command = [sys.executable, "-W", "ignore", "-c", LENGTHS]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, env=unset | environment)
    assert run.returncode == 0, run.stderr
    return float(run.stdout)


@pytest.mark.skipif(
    sys.platform != "linux" or not torch.backends.mkldnn.is_available(),
    reason="asks oneDNN for memory as Linux and glibc tell it",
)
def test_memory_does_not_grow_with_the_lengths_that_are_met():
    kept = megabytes_kept()
    assert kept < 100  # 64 numbers of rows and shapes are kept, of 400
    for name in linear._CAPACITIES:  # each is needed: other libraries may read so plain a name, too
        assert megabytes_kept(**{name: "1024"}) > 1.5 * kept, name

"""What torch makes tensors of by default is the caller's affair, and other threads change it while they load models."""

from contextlib import contextmanager

import pytest
import torch
from conftest import tiny_policy, tiny_reward
from test_methods import EVERY, generate

from stars_fast import StarsEngine


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


def engine():
    return StarsEngine(tiny_policy(32, hidden=32), tiny_reward(32, hidden=32))


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_default_dtype_changes_no_text(name, dtype):
    expected, guided = generate(engine(), EVERY[name]), engine()
    with default_dtype(dtype):
        found = generate(guided, EVERY[name])
    assert found.errors == expected.errors == [None] * 6
    assert found.completions == expected.completions
    assert found.rewards == pytest.approx(expected.rewards, abs=1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_the_default_device_changes_no_text(name):
    """Tensors on "meta" hold nothing: whatever is made there by mistake fails."""
    expected, guided = generate(engine(), EVERY[name]), engine()
    with default_device("meta"):
        found = generate(guided, EVERY[name])
    assert found.errors == [None] * 6
    assert found.completions == expected.completions

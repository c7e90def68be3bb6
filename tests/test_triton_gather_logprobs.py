"""The Triton kernel of the log-probabilities of given tokens."""

import importlib
from unittest import mock

import pytest
import torch
from conftest import KERNEL_DEVICE, KERNEL_DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
kernel = importlib.import_module("stars_fast.kernels.gather_logprobs")

empty = torch.empty


def launch(logits, tokens):
    """The kernel, on memory in which what it does not write shows."""
    with mock.patch.object(torch, "empty", lambda *args, **options: empty(*args, **options).fill_(12345.0)):
        return kernel.gather_logprobs(logits.to(KERNEL_DEVICE), tokens.to(KERNEL_DEVICE)).cpu()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 6),
    st.sampled_from([1, 2, 500, 1024, 4095, 4096, 4097, 32_003]),
    st.sampled_from([0.0, 1e-3, 1.0, 30.0]),
    st.sampled_from([0.0, 300.0, -300.0]),
    st.sampled_from(KERNEL_DTYPES),
    st.booleans(),
    st.integers(0, 10_000),
)
def test_log_softmax_at_the_token(rows, vocab, scale, offset, dtype, some_impossible, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, vocab, generator=generator) * scale + offset).to(dtype)
    if some_impossible:
        logits[:, : vocab // 2] = -torch.inf
    tokens = torch.randint(0, vocab, (rows,), generator=generator)
    expected = logits.double().log_softmax(1).gather(1, tokens[:, None])[:, 0].float()
    torch.testing.assert_close(launch(logits, tokens), expected, rtol=2e-6, atol=2e-6)


def test_the_ends_of_the_float_range_are_no_special_case():
    least = torch.finfo(torch.float32).min
    logits = torch.tensor([[least, least], [least, 0.0], [-torch.inf, least], [3e38, 3e38], [3e38, least]])
    assert launch(logits, torch.zeros(5, dtype=torch.int64)).tolist() == [
        pytest.approx(-0.6931472),
        least,
        -torch.inf,
        pytest.approx(-0.6931472),
        0.0,
    ]


@pytest.mark.parametrize("spoiled", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 1, 4999])
def test_a_row_without_a_softmax_is_nan_and_no_other(spoiled, place):
    logits = torch.zeros(3, 5000)
    logits[0, place] = spoiled
    logits[1] = -torch.inf
    assert launch(logits, torch.ones(3, dtype=torch.int64)).isnan().tolist() == [True, True, False]


def test_a_token_outside_the_vocabulary_is_nan_and_reads_nothing():
    logprobs = launch(torch.zeros(4, 5), torch.tensor([-1, 0, 5, 2**40]))
    assert logprobs.isnan().tolist() == [True, False, True, True]


@pytest.mark.parametrize("step", [1, 2])
def test_strided_logits_and_tokens_are_accepted(step):
    wide = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    logits = wide[:, ::2] if step == 2 else wide[:, :20]
    tokens = torch.arange(12)[::2]
    expected = logits.log_softmax(1)[torch.arange(6), tokens]
    torch.testing.assert_close(launch(logits, tokens), expected)


def test_no_rows_give_nothing():
    assert launch(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64)).shape == (0,)


def test_what_the_kernel_would_misread_is_refused_by_name():
    tokens = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"logits must be float32, float16 or bfloat16 .*got torch.float64 \[2, 5\]"):
        launch(torch.zeros(2, 5, dtype=torch.float64), tokens)
    with pytest.raises(ValueError, match=r"tokens must be torch.int64 \[2\], got torch.int32 \[2\]"):
        launch(torch.zeros(2, 5), tokens.int())

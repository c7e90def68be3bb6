"""Log-probabilities of given tokens."""

import pytest
import torch

from stars_fast.ops import gather_logprobs
from stars_fast.ops.gather_logprobs import gather_logprobs_reference

BOTH = [pytest.param(gather_logprobs, id="operator"), pytest.param(gather_logprobs_reference, id="reference")]


@pytest.mark.parametrize("gather", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 1000, 1024, 5001])
def test_log_softmax_at_the_token(gather, dtype, vocab):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(7, vocab, generator=generator) * 10).to(dtype)
    logits[0, : vocab // 2] = -torch.inf
    tokens = torch.randint(0, vocab, (7,), generator=generator)
    expected = logits.double().log_softmax(1).gather(1, tokens[:, None])[:, 0].float()
    torch.testing.assert_close(gather(logits, tokens), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_precision_value_is_read_exactly(dtype):
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[values.isfinite() & (values.abs() < 1e30)]
    pairs = torch.stack((values, values), 1)  # the log-probability of one of two equals shows an error in neither
    shifted = torch.stack((values, torch.zeros_like(values)), 1)
    zeros = torch.zeros(len(values), dtype=torch.int64)
    torch.testing.assert_close(gather_logprobs(pairs, zeros), torch.full((len(values),), 0.5).log())
    expected = shifted.double().log_softmax(1)[:, 0].float()
    torch.testing.assert_close(gather_logprobs(shifted, zeros), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("gather", BOTH)
def test_a_row_without_a_softmax_is_nan(gather):
    logits = torch.zeros(3, 5)
    logits[0, 2] = torch.nan
    logits[1] = -torch.inf
    assert gather(logits, torch.zeros(3, dtype=torch.int64)).isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("token", [-1, 5])
def test_a_token_outside_the_vocabulary_is_refused(token):
    with pytest.raises((ValueError, RuntimeError), match=r"out of bounds|tokens\[1\] = -?\d is outside"):
        gather_logprobs(torch.zeros(2, 5), torch.tensor([0, token]))


def test_strided_logits_are_accepted():
    logits = torch.randn(6, 40)[:, ::2]
    tokens = torch.arange(6)
    expected = logits.log_softmax(1)[tokens, tokens]
    torch.testing.assert_close(gather_logprobs(logits, tokens), expected)

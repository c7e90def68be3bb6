"""The draw of a token: its law, its filters, its bookkeeping, and the agreement of the implementations."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import p_value
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from stars_fast.ops import philox_key, sample_step
from stars_fast.ops._library import native
from stars_fast.ops.sample_step import sample_step_reference

BOTH = [pytest.param(sample_step, id="operator"), pytest.param(sample_step_reference, id="reference")]


def arguments(logits, *, seed=0, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, penalty=1.0, seen=None, eos=()):
    rows = logits.shape[0]

    def full(value, dtype=torch.float32):
        return torch.full((rows,), value, dtype=dtype) if not torch.is_tensor(value) else value.to(dtype)

    return {
        "logits": logits,
        "keys": torch.tensor([philox_key(seed, row, 0) for row in range(rows)]),
        "segment": full(3, torch.int32),
        "attempt": torch.arange(rows, dtype=torch.int32),
        "position": full(5, torch.int32),
        "alive": full(True, torch.bool),
        "limit": full(100, torch.int32),
        "temperature": full(temperature),
        "top_k": full(top_k, torch.int32),
        "top_p": full(top_p),
        "min_p": full(min_p),
        "repetition_penalty": full(penalty),
        "seen": seen,
        "eos": torch.tensor(eos, dtype=torch.int64).expand(rows, -1).clone(),
    }


def random_logits(rows, vocab, *, seed=0, scale=3.0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def warped(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, penalty=1.0, seen=None):
    """Log-probabilities after transformers' own processors."""
    chain = LogitsProcessorList()
    scores = logits.clone()
    if penalty != 1:
        for row, ids in enumerate(seen):
            processor = RepetitionPenaltyLogitsProcessor(penalty)
            scores[row] = processor(ids.nonzero().T, scores[row : row + 1])[0]
    chain.append(TemperatureLogitsWarper(temperature)) if temperature != 1 else None
    chain.append(TopKLogitsWarper(top_k)) if top_k else None
    chain.append(TopPLogitsWarper(top_p)) if top_p < 1 else None
    chain.append(MinPLogitsWarper(min_p)) if min_p else None
    return chain(torch.zeros(len(logits), 1, dtype=torch.long), scores).log_softmax(1)


FILTERS = {
    "none": {},
    "temperature": dict(temperature=0.6),
    "top_k": dict(top_k=7),
    "top_p": dict(top_p=0.8),
    "min_p": dict(min_p=0.05),
    "penalty": dict(penalty=1.7),
    "top_k and top_p": dict(top_k=30, top_p=0.9),
    "all": dict(temperature=1.4, top_k=40, top_p=0.95, min_p=0.01, penalty=0.8),
}


@pytest.mark.parametrize("draw", BOTH)
@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("vocab", [50, 2500])
def test_draws_follow_what_transformers_would_sample_from(draw, name, vocab):
    draws = 2000 if draw is sample_step else 600
    logits = random_logits(1, vocab, scale=1.5)
    seen = torch.rand(1, vocab, generator=torch.Generator().manual_seed(1)) < 0.3
    options = FILTERS[name]
    law = warped(logits, **options, seen=seen)[0].double()
    sampled = draw(
        **arguments(
            logits.expand(draws, -1).contiguous(),
            **options,
            seen=seen.expand(draws, -1).clone() if "penalty" in options else None,
        )
    )
    token, logprob, sampling_logprob, entropy = sampled
    torch.testing.assert_close(sampling_logprob, law[token].float(), rtol=1e-5, atol=1e-5)
    raw = logits[0].log_softmax(0)
    torch.testing.assert_close(logprob, raw[token], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, torch.special.entr(raw.exp()).sum().expand(draws), rtol=1e-5, atol=1e-5)
    probabilities = law.exp() / law.exp().sum()
    assert p_value({0: token.tolist()}, {0: dict(enumerate(probabilities.tolist()))}) > 1e-3
    assert len(Counter(token.tolist())) > 1


@pytest.mark.parametrize("draw", BOTH)
@pytest.mark.parametrize("vocab", [50, 2500])
def test_exactly_the_tokens_that_transformers_keeps_can_be_drawn(draw, vocab):
    # With one seed per row the log-probability of what was drawn reveals the mass that was kept.
    for options in FILTERS.values():
        logits = random_logits(20, vocab, seed=2)
        seen = torch.rand(20, vocab, generator=torch.Generator().manual_seed(3)) < 0.2
        expected = warped(logits, **options, seen=seen)
        token, _, sampling_logprob, _ = draw(**arguments(logits, **options, seen=seen.clone()))
        kept = expected.gather(1, token[:, None])[:, 0]
        assert kept.isfinite().all()
        torch.testing.assert_close(sampling_logprob, kept, rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_compiled_and_reference_agree(data):
    if not native("sample_step"):
        pytest.skip("stars_fast._C is not built")
    rows = data.draw(st.integers(1, 5))
    vocab = data.draw(st.sampled_from([1, 2, 7, 1023, 1024, 1025, 3000, 5000]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    seed = data.draw(st.integers(0, 10_000))
    logits = random_logits(rows, vocab, seed=seed, scale=data.draw(st.sampled_from([0.0, 0.3, 3.0, 20.0]))).to(dtype)
    if data.draw(st.booleans()):
        logits[:, ::3] = -torch.inf
        logits[:, -1] = 0.0
    each = lambda strategy: torch.tensor(data.draw(st.lists(strategy, min_size=rows, max_size=rows)))  # noqa: E731
    seen = random_logits(rows, vocab, seed=seed + 1) > 2
    case = arguments(
        logits,
        seed=seed,
        temperature=each(st.sampled_from([1.0, 0.7, 2.0])),
        top_k=each(st.sampled_from([0, 1, 5, 50, 2000, 10_000])),
        top_p=each(st.sampled_from([1.0, 0.0, 0.31, 0.9, 0.9999])),
        min_p=each(st.sampled_from([0.0, 0.1, 1.0])),
        penalty=each(st.sampled_from([1.0, 1.3, 0.5])),
        seen=seen if data.draw(st.booleans()) else None,
        eos=data.draw(st.sampled_from([(), (0,), (0, vocab - 1)])),
    )
    case["alive"] = each(st.booleans())
    case["limit"] = each(st.integers(5, 8)).int()
    other = {name: value.clone() if torch.is_tensor(value) else value for name, value in case.items()}
    ours, reference = sample_step(**case), sample_step_reference(**other)
    assert ours[0].tolist() == reference[0].tolist()
    for mine, theirs in zip(ours[1:], reference[1:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    for name in ("position", "alive"):
        assert torch.equal(case[name], other[name])
    assert seen is None or case["seen"] is None or torch.equal(case["seen"], other["seen"])


@pytest.mark.parametrize("draw", BOTH)
def test_a_row_draws_the_same_alone_and_in_any_batch(draw):
    case = arguments(random_logits(5, 2500), top_p=0.95)
    together = draw(**{name: value.clone() if torch.is_tensor(value) else value for name, value in case.items()})
    for row in range(5):
        alone = {
            name: value[row : row + 1].clone() if torch.is_tensor(value) else value for name, value in case.items()
        }
        for mine, theirs in zip(draw(**alone), together, strict=True):
            assert torch.equal(mine, theirs[row : row + 1]) or draw is sample_step_reference
            torch.testing.assert_close(mine, theirs[row : row + 1])


@pytest.mark.parametrize("draw", BOTH)
def test_a_rows_settings_are_its_own(draw):
    rows, vocab = 4, 1500
    seen = torch.rand(rows, vocab, generator=torch.Generator().manual_seed(1)) < 0.3
    others = torch.arange(rows) % 2 == 1
    neutral = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, penalty=1.0)
    mixed = {name: torch.where(others, FILTERS["all"][name], neutral[name]) for name in neutral}

    def drawn(**settings):
        case = arguments(random_logits(rows, vocab), **settings)
        case["eos"] = torch.where(others[:, None], torch.arange(1400), -1)  # the others end at nearly any
        return *draw(**case), case["alive"]

    together = drawn(**mixed, seen=seen.clone())
    for mine, expected, bare in zip(together, drawn(**neutral, seen=seen.clone()), drawn(**neutral), strict=True):
        assert torch.equal(mine[~others], expected[~others])
        assert torch.equal(mine[~others], bare[~others])
    for mine, expected in zip(together, drawn(**FILTERS["all"], seen=seen.clone()), strict=True):
        assert torch.equal(mine[others], expected[others])


@pytest.mark.parametrize("draw", BOTH)
def test_ties_are_kept_together(draw):
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0, -1.0]]).repeat(400, 1)
    for options in (dict(top_k=2), dict(top_p=0.5), dict(min_p=math.exp(-1.1))):
        token, _, sampling_logprob, _ = draw(**arguments(logits, **options))
        assert set(token.tolist()) == {0, 1, 2, 3}
        expected = torch.tensor([2.0, 1.0, 1.0, 1.0]).log_softmax(0)
        torch.testing.assert_close(sampling_logprob, expected[token])
    assert set(draw(**arguments(logits, top_p=0.0))[0].tolist()) == {0}
    assert set(draw(**arguments(logits, min_p=1.0))[0].tolist()) == {0}
    assert set(draw(**arguments(torch.zeros(400, 4), top_k=1, top_p=0.0, min_p=1.0))[0].tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("draw", BOTH)
def test_top_p_is_exact_on_nearly_equal_logits(draw):
    logits = random_logits(2, 20_000, scale=1e-4)
    expected = warped(logits.double(), top_p=0.37).exp()
    _, _, sampling_logprob, _ = draw(**arguments(logits, top_p=0.37))
    kept = (expected > 0).sum(1)
    assert torch.allclose((-sampling_logprob).exp(), kept.float(), rtol=1e-3)
    assert (kept - 0.37 * 20_000).abs().max() < 2


@pytest.mark.parametrize("draw", BOTH)
def test_a_row_ends_at_an_eos_of_its_own_or_at_its_limit(draw):
    logits = torch.full((5, 10), -torch.inf)
    logits[:, 7] = 0
    case = arguments(logits, seen=torch.zeros(5, 10, dtype=torch.bool), eos=(3, 7))
    case["logits"][1:3] = torch.tensor([-torch.inf] * 9 + [0.0])
    case["limit"] = torch.tensor([100, 6, 7, 100, 100], dtype=torch.int32)
    case["alive"][3] = False
    case["eos"][4] = torch.tensor([9, -1])
    token, logprob, sampling_logprob, entropy = draw(**case)
    assert token.tolist() == [7, 9, 9, 0, 7]
    assert case["alive"].tolist() == [False, False, True, False, True]
    assert case["position"].tolist() == [6, 6, 6, 5, 6]
    assert case["seen"].nonzero().tolist() == [[0, 7], [1, 9], [2, 9], [4, 7]]
    assert logprob.tolist() == sampling_logprob.tolist() == entropy.tolist() == [0, 0, 0, 0, 0]


@pytest.mark.parametrize("draw", BOTH)
@pytest.mark.parametrize("options", [{}, FILTERS["all"]], ids=["plain", "filtered"])
def test_logits_without_a_softmax_end_their_row_and_no_other(draw, options):
    logits = random_logits(6, 1500)
    logits[1, 1100] = torch.nan
    logits[2] = -torch.inf
    logits[3, 3] = torch.inf
    logits[4] = torch.nan
    seen = torch.zeros(6, 1500, dtype=torch.bool)
    case = arguments(logits, **options, seen=seen)
    token, *numbers = draw(**case)
    assert token[1:5].tolist() == [0] * 4
    for values in numbers:
        assert values.isnan().tolist() == [False, True, True, True, True, False]
    assert case["alive"].tolist() == [True, False, False, False, False, True]
    assert case["position"].tolist() == [6, 5, 5, 5, 5, 6]
    assert case["seen"].any(1).tolist() == [True, False, False, False, False, True]


def test_noise_depends_on_every_counter_word():
    logits = random_logits(1, 1000, scale=0.1)
    tokens = {sample_step(**arguments(logits))[0].item()}
    for name in ("segment", "attempt", "position", "keys"):
        case = arguments(logits)
        case[name] += 1
        tokens.add(sample_step(**case)[0].item())
    assert len(tokens) == 5


def test_a_wrong_dtype_is_named():
    if not native("sample_step"):
        pytest.skip("stars_fast._C is not built")
    case = arguments(random_logits(2, 10))
    case["top_k"] = case["top_k"].long()
    with pytest.raises(ValueError, match=r"top_k must be torch.int32 \[2\], got torch.int64 \[2\]"):
        sample_step(**case)

"""The Triton kernels draw what the reference and the C++ code draw, whatever the row, its settings and its batch."""

import importlib
from unittest import mock

import pytest
import test_sample_step as promises
import torch
from conftest import KERNEL_DEVICE, KERNEL_DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sample_step import FILTERS, arguments, random_logits

from stars_fast.ops import sample_step
from stars_fast.ops.sample_step import sample_step_reference

pytest.importorskip("triton")
kernel = importlib.import_module("stars_fast.kernels.sample_step")
filters = importlib.import_module("stars_fast.kernels.filters")

empty = torch.empty


def poisoned(*shape, **options):
    """What ``torch.empty`` may return at its worst."""
    tensor = empty(*shape, **options)
    return tensor.fill_(torch.nan if tensor.is_floating_point() else -7)


def launch(*, capacity=kernel.CAPACITY, **case):
    """The kernels as the operator is called, on memory in which everything that they do not write shows."""
    there = {name: value.to(KERNEL_DEVICE) if torch.is_tensor(value) else value for name, value in case.items()}
    with mock.patch.object(torch, "empty", poisoned), mock.patch.object(kernel, "CAPACITY", capacity):
        results = kernel.sample_step(*there.values())
    for name in ("position", "alive", "seen"):
        if case[name] is not None:
            case[name].copy_(there[name])
    return tuple(result.cpu() for result in results)


def assert_like(reference, case, **options):
    other = {name: value.clone() if torch.is_tensor(value) else value for name, value in case.items()}
    ours, theirs = launch(**case, **options), reference(**other)
    assert ours[0].tolist() == theirs[0].tolist()
    for mine, expected in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    for name in ("position", "alive", "seen"):
        assert case[name] is None or torch.equal(case[name], other[name])
    return ours


@st.composite
def steps(draw):
    rows = draw(st.integers(1, 4))
    vocab = draw(st.sampled_from([1, 2, 7, 500, 1023, 1024, 1025, 3000]))
    seed = draw(st.integers(0, 10_000))
    logits = random_logits(rows, vocab, seed=seed, scale=draw(st.sampled_from([0.0, 0.3, 3.0, 20.0])))
    if draw(st.booleans()):
        logits = logits.round()  # many ties
    if draw(st.booleans()):
        logits[:, ::3] = -torch.inf
        logits[:, -1] = 0.0
    spoiled = draw(st.sampled_from([None, None, torch.nan, torch.inf, -torch.inf]))
    if spoiled is not None:
        logits[-1, vocab // 2 :] = spoiled

    def each(values):
        return torch.tensor(draw(st.lists(st.sampled_from(values), min_size=rows, max_size=rows)))

    case = arguments(
        logits.to(draw(st.sampled_from(KERNEL_DTYPES))),
        seed=seed,
        temperature=each([1.0, 0.7, 2.0]),
        top_k=each([0, 1, 5, 50, 2000, 10_000]),
        top_p=each([1.0, 0.0, 0.31, 0.9, 0.9999]),
        min_p=each([0.0, 0.1, 1.0]),
        penalty=each([1.0, 1.3, 0.5]),
        seen=random_logits(rows, vocab, seed=seed + 1) > 2 if draw(st.booleans()) else None,
        eos=draw(st.sampled_from([(), (0,), (0, vocab - 1)])),
    )
    case["alive"] = each([True, True, False])
    case["limit"] = each([5, 6, 7, 100]).int()
    return case


@settings(max_examples=30, deadline=None)
@given(steps(), st.sampled_from([64, kernel.CAPACITY]))
def test_rows_of_all_kinds_are_drawn_as_the_reference_draws_them(case, capacity):
    assert_like(sample_step_reference, case, capacity=capacity)


@pytest.mark.parametrize("vocab", [32_003, 151_936])
def test_long_rows_are_drawn_as_the_compiled_code_draws_them(vocab):
    for options in (FILTERS["none"], FILTERS["top_p"], FILTERS["all"]):
        case = arguments(random_logits(1, vocab).half(), **options, seen=random_logits(1, vocab, seed=1) > 1)
        assert_like(sample_step, case)


@pytest.mark.parametrize("capacity", [256, kernel.CAPACITY])
def test_a_nucleus_of_nothing_but_ties_is_kept_whole(capacity):
    logits = torch.zeros(2, 3000)
    logits[1, 2000:] = 1e-3
    _, _, sampling_logprob, _ = launch(**arguments(logits, top_p=0.2), capacity=capacity)
    torch.testing.assert_close(sampling_logprob, -torch.tensor([3000.0, 1000.0]).log())


@pytest.mark.parametrize("k", [2, 3, 4])
def test_ties_at_the_kth_place_are_kept(k):
    logits = torch.full((6, 2100), -3.0)
    logits[:, 1030], logits[:, [5, 1500, 2099]] = 2.0, 1.0
    token, _, sampling_logprob, _ = launch(**arguments(logits, top_k=k))
    kept = torch.tensor([2.0, 1.0, 1.0, 1.0]).log_softmax(0)
    assert set(token.tolist()) <= {5, 1030, 1500, 2099}
    torch.testing.assert_close(sampling_logprob, kept[torch.where(token == 1030, 0, 1)])


def ends_of_the_float_range():
    values = [3.4e38, 1e30, 1.0, 1e-30, 1e-38, 1e-45, 0.0]
    every = torch.tensor([*values, *(-value for value in values), -torch.inf])
    return every.repeat(200)[torch.randperm(3000, generator=torch.Generator().manual_seed(0))]


def powers_of_two():
    """Equal distances alone would need 60 rounds: each would only get eight times closer to 0."""
    return torch.arange(-125, 125).repeat(12).double().exp2().float()


@pytest.mark.parametrize("capacity", [64, kernel.CAPACITY])
@pytest.mark.parametrize("row", [ends_of_the_float_range, powers_of_two], ids=lambda row: row.__name__)
def test_a_search_ends_within_33_rounds_at_the_kth_place(row, capacity):
    ks = [200, 201, 1401, 2000, 2200, 2250, 2300]
    case = arguments(row().repeat(len(ks), 1), top_k=torch.tensor(ks))
    rounds = []
    pivots_between = filters.pivots_between

    def counted(*args):
        rounds.append(args)
        return pivots_between(*args)

    with mock.patch.object(filters, "pivots_between", counted if KERNEL_DEVICE == "cpu" else pivots_between):
        assert_like(sample_step_reference, case, capacity=capacity)
    if KERNEL_DEVICE == "cpu":
        assert len(ks) < len(rounds) <= 33 * len(ks)


def test_minus_infinity_is_never_drawn():
    logits = torch.full((2, 4100), -torch.inf)
    logits[:, 4097] = logits[:, 1] = -5.0
    for options in FILTERS.values():
        token, _, sampling_logprob, _ = launch(**arguments(logits, **options))
        assert set(token.tolist()) <= {1, 4097}
        torch.testing.assert_close(sampling_logprob, torch.full((2,), 0.5).log())


@pytest.mark.parametrize("options", [{}, FILTERS["all"]], ids=["plain", "filtered"])
def test_logits_without_a_softmax_end_their_row_and_no_other(options):
    promises.test_logits_without_a_softmax_end_their_row_and_no_other(launch, options)


def test_a_temperature_that_overflows_ends_its_row():
    case = arguments(torch.tensor([[1e38, 0.0], [1.0, 0.0]]), temperature=torch.tensor([1e-3, 1.0]))
    assert_like(sample_step_reference, case)
    assert case["alive"].tolist() == [False, True]


def test_a_row_ends_at_an_eos_of_its_own_or_at_its_limit():
    promises.test_a_row_ends_at_an_eos_of_its_own_or_at_its_limit(launch)


def test_a_rows_settings_are_its_own():
    promises.test_a_rows_settings_are_its_own(launch)


def test_a_row_draws_the_same_bits_alone_and_in_any_batch():
    promises.test_a_row_draws_the_same_alone_and_in_any_batch(launch)


def test_top_p_is_exact_on_nearly_equal_logits():
    promises.test_top_p_is_exact_on_nearly_equal_logits(launch)


@pytest.mark.parametrize("step", [1, 2])
def test_strided_logits_are_accepted(step):
    wide = random_logits(3, 2 * 1030)
    logits = wide[:, ::2] if step == 2 else wide[:, :1030]
    assert_like(sample_step_reference, arguments(logits, top_k=40))


def test_many_eos_tokens_are_all_looked_at():
    logits = torch.full((1, 80), -torch.inf)
    logits[0, 67] = 0
    case = arguments(logits, eos=tuple(range(68)))
    launch(**case)
    assert not case["alive"].item()


def test_no_rows_give_no_tokens():
    case = arguments(random_logits(2, 10))
    none = {name: value[:0] if torch.is_tensor(value) else value for name, value in case.items()}
    assert [len(result) for result in launch(**none)] == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("top_k", lambda x: x.long(), r"top_k must be torch.int32 \[2\], got torch.int64 \[2\]"),
        ("logits", lambda x: x.double(), r"logits must be float32, float16 or bfloat16 .*got torch.float64 \[2, 10\]"),
        ("logits", lambda x: x[:, :1].expand(2, 2**19 + 1), r"the vocabulary must have 1 to 524288 tokens, got 524289"),
        ("alive", lambda x: x[:1], r"alive must be torch.bool \[2\], got torch.bool \[1\]"),
    ],
)
def test_what_the_kernels_would_misread_is_refused_by_name(name, change, message):
    case = arguments(random_logits(2, 10))
    case[name] = change(case[name])
    with pytest.raises(ValueError, match=message):
        launch(**case)


@pytest.mark.gpu
@pytest.mark.skipif(KERNEL_DEVICE == "cpu", reason="needs a GPU")
def test_a_captured_step_draws_from_new_logits():
    case = {name: x.cuda() if torch.is_tensor(x) else x for name, x in arguments(random_logits(4, 5000)).items()}
    kernel.sample_step(*case.values())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token = kernel.sample_step(*case.values())[0]
    for seed in range(3):
        case["logits"].copy_(random_logits(4, 5000, seed=seed))
        case["top_k"].fill_(10 * seed)
        expected = sample_step_reference(**{name: x.clone() if torch.is_tensor(x) else x for name, x in case.items()})
        graph.replay()
        assert torch.equal(token, expected[0])

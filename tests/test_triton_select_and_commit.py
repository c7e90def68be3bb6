"""The Triton kernel decides and writes exactly what the reference and the C++ operator do."""

import copy
import importlib
import math

import pytest
import torch
from conftest import KERNEL_DEVICE
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_select_and_commit import WRITTEN, tables

from stars_fast.ops import EARLIER, INVALID, NONE, STOP, philox_key, select_and_commit
from stars_fast.ops.select_and_commit import select_and_commit_reference

pytest.importorskip("triton")
kernel = importlib.import_module("stars_fast.kernels.select_and_commit")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # numpy's, of inf - inf
RESULTS = ("winner", "accepted", "threshold", "finish")


def on_device(case):
    return {name: value.to(KERNEL_DEVICE) if torch.is_tensor(value) else value for name, value in case.items()}


def same(x, y):
    """Bit by bit, but for the payload of NaN."""
    return x.dtype == y.dtype and x.shape == y.shape and bool(((x == y) | ((x != x) & (y != y))).all())


def assert_agree(case, *others):
    """Run the kernel on ``case``, changing it, and compare all that comes out with what the others do on a copy."""
    copies = [copy.deepcopy(case) for _ in others]
    device_case = on_device(case)
    results = kernel.select_and_commit(*device_case.values())
    for name in WRITTEN:
        case[name] = device_case[name].cpu()
    for other, expected in zip(others, copies, strict=True):
        for name, result, wanted in zip(RESULTS, results, other(*expected.values()), strict=True):
            assert same(result.cpu(), wanted), (name, result, wanted)
        for name in WRITTEN:
            assert same(case[name], expected[name]), (name, case[name], expected[name])
    return [result.cpu() for result in results]


def random_case(rows_of, seed, *, padding=0, wild=True):
    """Tables full of garbage wherever the operator may not read, and rewards near the thresholds."""
    generator = torch.Generator().manual_seed(seed)
    groups, rows = len(rows_of), sum(rows_of) + padding

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, dtype=torch.int32, generator=generator)

    def choose(values, count):
        return torch.tensor(values, dtype=torch.float64)[integers(0, len(values), count).long()]

    ordinary = torch.randn(rows, generator=generator).double()
    special = choose([-math.inf, -math.inf, -1.0, -1.0, 0.25, 1.0, math.inf, math.nan], rows)
    reward = torch.where(torch.rand(rows, generator=generator) < (0.4 if wild else 0), special, ordinary)
    has_best = integers(0, 2, groups).bool()
    attempts = torch.where(has_best, integers(1, 6, groups), 0)
    return {
        "reward": reward.float(),
        "length": integers(0, 9, rows),
        "ended": integers(0, 2, rows).bool(),
        "group_indptr": torch.tensor([0, *torch.tensor(rows_of).cumsum(0).tolist()], dtype=torch.int32),
        "keys": torch.tensor([philox_key(seed, g, 0) for g in range(groups)], dtype=torch.int64),
        "segment": integers(0, 99, groups),
        "attempts": attempts,
        "committed": integers(0, 64, groups),
        "max_new_tokens": integers(1, 128, groups),
        "max_attempts": attempts + integers(-2, 45, groups),
        "base": choose([-0.5, 0.1, 1.7, -3e38], groups),
        "target": choose([1.0, 1 / 3, -2.0, 0.25, math.inf, -math.inf], groups),
        "beta": choose([0.7, 1e-3, 1e-300, 50.0], groups),
        "ramp": integers(0, 2, groups).bool(),
        "best_reward": torch.where(has_best, choose([-1.0, 0.3, -math.inf], groups), math.nan).float(),
        "best_attempt": torch.where(has_best, attempts - 1, -1),
        "best_length": integers(0, 9, groups),
        "best_ended": integers(0, 2, groups).bool(),
    }


@settings(max_examples=60, deadline=None)
@given(
    rows_of=st.lists(st.one_of(st.integers(0, 5), st.integers(0, 70)), min_size=1, max_size=5).filter(any),
    padding=st.integers(0, 40),
    wild=st.booleans(),
    seed=st.integers(0, 10**6),
)
@example(rows_of=[33, 0, 65, 0], padding=0, wild=False, seed=1)
def test_kernel_reference_and_cpp_decide_and_write_the_same(rows_of, padding, wild, seed):
    case = random_case(rows_of, seed, padding=padding, wild=wild)
    for _ in range(2):  # attempts and the best so far carry over, as from heartbeat to heartbeat
        assert_agree(case, select_and_commit_reference, select_and_commit)


def test_many_groups_of_one_candidate_are_decided_alike():
    case = random_case([1] * 120, 5, wild=False)
    _, accepted, *_ = assert_agree(case, select_and_commit_reference, select_and_commit)
    assert 20 < accepted.sum() < 100


def test_what_was_in_the_outputs_before_does_not_matter(monkeypatch):
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *shape, **dtype: new_empty(*shape, **dtype).fill_(77))
    case = random_case([3, 0, 40], 8, padding=70)
    _, _, threshold, _ = assert_agree(case, select_and_commit_reference, select_and_commit)
    assert not threshold[43:].any()


def test_a_nan_in_a_later_block_neither_stops_nor_hides_an_earlier_maximum():
    low, nan = -50.0, math.nan
    rewards = [low] * 34 + [-40.0] + [low] * 5 + [-40.0] + [low] * 4 + [nan] + [low] * 4
    case = tables([50], rewards, max_attempts=50, beta=0.01)
    winner, *_ = assert_agree(case, select_and_commit_reference, select_and_commit)
    assert winner.tolist() == [INVALID]
    assert (case["best_attempt"].item(), case["best_reward"].item(), case["attempts"].item()) == (34, -40.0, 46)

    case = tables([50], rewards, max_attempts=45, beta=0.01)
    winner, accepted, *_ = assert_agree(case, select_and_commit_reference, select_and_commit)
    assert (winner.tolist(), accepted.tolist()) == ([34], [False])  # the NaN was past the attempts


@pytest.mark.parametrize("target", [math.inf, -math.inf])
@pytest.mark.parametrize("base", [0.0, math.inf, -math.inf])
def test_an_infinite_target_is_the_threshold_whatever_the_ramp_comes_to(target, base):
    case = tables([2], [-math.inf, 3.0], target=target, base=base, length=0, committed=0)
    winner, _, threshold, _ = assert_agree(case, select_and_commit_reference, select_and_commit)
    assert threshold.tolist() == [target] * 2
    assert winner.tolist() == [0 if target < 0 else NONE]


def test_an_answer_finishes_with_the_best_of_an_earlier_call():
    case = tables([2], [-50.0, -60.0], max_attempts=4, beta=0.01, ended=[True, False])
    assert assert_agree(case, select_and_commit_reference)[0].tolist() == [NONE]
    case |= {"reward": torch.tensor([-70.0, -50.0]), "ended": torch.zeros(2, dtype=torch.bool)}
    winner, _, _, finish = assert_agree(case, select_and_commit_reference, select_and_commit)
    assert (winner.tolist(), finish.tolist()) == ([EARLIER], [STOP])


def test_groups_without_candidates_stay_as_they_are():
    assert_agree(random_case([0, 0], 3, padding=2), select_and_commit)


@pytest.mark.parametrize("rows", [0, 1, 100])
def test_without_groups_all_thresholds_are_zero(rows):
    case = random_case([], 0, padding=rows)
    winner, _, threshold, _ = assert_agree(case, select_and_commit)
    assert winner.shape == (0,)
    assert torch.equal(threshold, torch.zeros(rows))


def test_a_table_of_another_dtype_is_refused_by_name():
    case = random_case([2], 0) | {"length": torch.zeros(2, dtype=torch.int64)}
    with pytest.raises(ValueError, match=r"length must be torch.int32 \[2\], got torch.int64 \[2\]"):
        kernel.select_and_commit(*case.values())

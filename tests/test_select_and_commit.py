"""Acceptance and commit against a loop that looks at one candidate after another."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stars_fast.ops import EARLIER, GOES_ON, INVALID, LENGTH, NONE, STOP, philox_key, select_and_commit
from stars_fast.ops.philox import uniform
from stars_fast.ops.select_and_commit import select_and_commit_reference

BOTH = [pytest.param(select_and_commit, id="operator"), pytest.param(select_and_commit_reference, id="reference")]
WRITTEN = ("attempts", "best_reward", "best_attempt", "best_length", "best_ended")


def tables(rows_of, rewards, *, attempts=None, seed=0, **fields):
    """Arguments for groups with the given numbers of rows; ``fields`` override the defaults, scalars for all groups."""
    groups, rows = len(rows_of), sum(rows_of)
    defaults = dict(segment=2, attempts=0, committed=4, max_new_tokens=16, max_attempts=6)
    reals = dict(base=-0.5, target=1.0, beta=0.7)

    def column(name, value, dtype, count):
        value = fields.get(name, value)
        return torch.tensor(value if isinstance(value, list) else [value] * count, dtype=dtype)

    ints = {name: column(name, value, torch.int32, groups) for name, value in defaults.items()}
    if attempts is not None:
        ints["attempts"] = torch.tensor(attempts, dtype=torch.int32)
    return {
        "reward": torch.tensor(rewards, dtype=torch.float32),
        "length": column("length", 3, torch.int32, rows),
        "ended": column("ended", False, torch.bool, rows),
        "group_indptr": torch.tensor([0, *torch.tensor(rows_of).cumsum(0).tolist()], dtype=torch.int32),
        "keys": torch.tensor([philox_key(seed, g, 0) for g in range(groups)]),
        **ints,
        **{name: column(name, value, torch.float64, groups) for name, value in reals.items()},
        "ramp": column("ramp", False, torch.bool, groups),
        "best_reward": torch.zeros(groups),
        "best_attempt": torch.full((groups,), -1, dtype=torch.int32),
        "best_length": torch.zeros(groups, dtype=torch.int32),
        "best_ended": torch.zeros(groups, dtype=torch.bool),
    }


def one_at_a_time(case):
    """The rule as METHODS state it, on Python numbers; changes ``case`` and returns what the operator returns."""
    c = {name: value.tolist() if torch.is_tensor(value) else value for name, value in case.items()}
    winners, accepteds, thresholds, finishes = [], [], [0.0] * len(c["reward"]), []
    for g, (start, stop) in enumerate(zip(c["group_indptr"], c["group_indptr"][1:], strict=False)):
        winner, accepted, drawn = NONE, False, c["attempts"][g]
        for row in range(start, stop):
            base, target, r = c["base"][g], c["target"][g], c["reward"][row]
            tau = target
            if not math.isinf(target) and (c["ramp"][g] or not c["ended"][row]):
                n = c["committed"][g] + c["length"][row]
                tau = min(base + (target - base) * n / c["max_new_tokens"][g], target)
            thresholds[row] = tau
            if winner != NONE or c["attempts"][g] >= c["max_attempts"][g]:
                continue
            attempt = c["attempts"][g]
            c["attempts"][g] += 1
            if math.isnan(r) or r == math.inf:
                winner = INVALID
                continue
            if c["best_attempt"][g] < 0 or r > c["best_reward"][g]:
                c["best_reward"][g], c["best_attempt"][g] = r, attempt
                c["best_length"][g], c["best_ended"][g] = c["length"][row], c["ended"][row]
            u = uniform(case["keys"][g], case["segment"][g], torch.tensor(attempt)).item()
            if r >= tau or (r > -math.inf and u < math.exp(min(0.0, (r - tau) / c["beta"][g]))):
                winner, accepted = row, True
        if winner == NONE and stop > start and c["attempts"][g] == c["max_attempts"][g] > drawn:
            winner = start + c["best_attempt"][g] - drawn if c["best_attempt"][g] >= drawn else EARLIER
        finish = GOES_ON
        if winner not in (NONE, INVALID):
            place, column = (winner, "") if winner >= 0 else (g, "best_")
            full = c["committed"][g] + c[column + "length"][place] >= c["max_new_tokens"][g]
            finish = STOP if c[column + "ended"][place] else LENGTH if full else GOES_ON
        winners.append(winner)
        accepteds.append(accepted)
        finishes.append(finish)
    for name in WRITTEN:
        case[name].copy_(torch.tensor(c[name], dtype=case[name].dtype))
    return winners, accepteds, thresholds, finishes


def assert_same(select, case):
    expected_case = copy.deepcopy(case)
    winners, accepteds, thresholds, finishes = one_at_a_time(expected_case)
    winner, accepted, threshold, finish = select(**case)
    assert winner.tolist() == winners
    assert accepted.tolist() == accepteds
    assert finish.tolist() == finishes
    torch.testing.assert_close(threshold, torch.tensor(thresholds), rtol=0, atol=0)
    for name in WRITTEN:
        torch.testing.assert_close(case[name], expected_case[name], rtol=0, atol=0, msg=name)


rewards = st.sampled_from([-3.0, -1.0, -1.0, -0.25, 0.0, 0.5, 2.0, -math.inf, math.inf, math.nan])


@pytest.mark.parametrize("select", BOTH)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_candidates_side_by_side_are_judged_as_one_after_another(select, data):
    rows_of = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=4).filter(any))
    groups, rows = len(rows_of), sum(rows_of)

    def each(strategy, count):
        return data.draw(st.lists(strategy, min_size=count, max_size=count))

    case = tables(
        rows_of,
        each(rewards, rows),
        seed=data.draw(st.integers(0, 1000)),
        length=each(st.integers(1, 4), rows),
        max_new_tokens=each(st.sampled_from([6, 7, 16]), groups),
        ended=each(st.booleans(), rows),
        target=each(st.sampled_from([1.0, 0.0, -2.0, math.inf, -math.inf]), groups),
        beta=each(st.sampled_from([0.7, 1e-3, 50.0]), groups),
        max_attempts=each(st.integers(1, 6), groups),
        ramp=each(st.booleans(), groups),
    )
    for _ in range(3):  # attempts and the best so far carry over, as from heartbeat to heartbeat
        assert_same(select, case)
        case["reward"] = torch.tensor(each(rewards, rows))


@pytest.mark.parametrize("select", BOTH)
def test_one_candidate_a_round_is_the_same_as_all_at_once(select):
    for seed in range(15):
        generator = torch.Generator().manual_seed(seed)
        scores = (torch.randn(6, generator=generator) - 1).tolist()
        together = tables([6], scores, seed=seed)
        winner = select(**together)[0].item()
        single = copy.deepcopy(together) | tables([6], scores, seed=seed)
        for row in range(6):
            part = single | {name: single[name][row : row + 1] for name in ("reward", "length", "ended")}
            part["group_indptr"] = torch.tensor([0, 1], dtype=torch.int32)
            outcome = select(**part)[0].item()
            if outcome != NONE:
                break
        assert (outcome in (0, EARLIER)) and winner >= 0
        if outcome == 0:
            assert row == winner or single["best_attempt"].item() == winner
        for name in WRITTEN:
            assert torch.equal(single[name], together[name]), name


@pytest.mark.parametrize("select", BOTH)
def test_the_best_of_all_rounds_is_the_fallback(select):
    case = tables([3], [-50.0, -40.0, -60.0], max_attempts=6, beta=0.01, length=[4, 2, 1], ended=[False, True, False])
    assert select(**case)[0].tolist() == [NONE]
    best = {name: case[name].item() for name in WRITTEN}
    assert best == dict(attempts=3, best_reward=-40.0, best_attempt=1, best_length=2, best_ended=True)
    case["reward"] = torch.tensor([-40.0, -55.0, -41.0])  # a tie goes to the earlier attempt
    winner, accepted, _, finish = select(**case)
    assert (winner.tolist(), accepted.tolist(), finish.tolist()) == ([EARLIER], [False], [STOP])
    assert {name: case[name].item() for name in WRITTEN} == best | dict(attempts=6)


@pytest.mark.parametrize("select", BOTH)
def test_an_answer_finishes_with_the_candidate_that_is_committed(select):
    sure, never = 9.0, -99.0
    case = tables(
        [1, 2, 1, 1, 2, 1],
        [sure, never, sure, sure, sure, never, never, never],
        length=[3, 3, 3, 4, 4, 4, 3, 4],
        ended=[False, True, False, False, True, False, False, True],
        max_new_tokens=8,
        max_attempts=[6, 6, 6, 6, 2, 6],
    )
    case["reward"][7] = math.inf
    winner, _, _, finish = select(**case)
    assert winner.tolist() == [0, 2, 3, 4, 5, INVALID]
    assert finish.tolist() == [GOES_ON, GOES_ON, LENGTH, STOP, LENGTH, GOES_ON]


@pytest.mark.parametrize("select", BOTH)
def test_ended_candidates_are_held_against_the_target_or_where_the_group_says_so_against_the_ramp(select):
    case = tables([2, 2], [0.0] * 4, ended=[True, False, True, False], ramp=[False, True], base=0.0, target=16.0)
    assert select(**case)[2].tolist() == [16.0, 7.0, 7.0, 7.0]


@pytest.mark.parametrize("select", BOTH)
def test_minus_infinity_is_a_rejection_and_can_still_be_the_fallback(select):
    case = tables([2, 2], [-math.inf] * 4, max_attempts=2, target=[1.0, -math.inf])
    winner, accepted, threshold, _ = select(**case)
    assert winner.tolist() == [0, 2]
    assert accepted.tolist() == [False, True]
    assert threshold[2:].tolist() == [-math.inf, -math.inf]


@pytest.mark.parametrize("select", BOTH)
def test_an_invalid_reward_counts_only_if_it_is_reached(select):
    case = tables([2, 2], [5.0, math.nan, -99.0, math.inf], beta=0.01)
    winner, accepted, *_ = select(**case)
    assert winner.tolist() == [0, INVALID]
    assert accepted.tolist() == [True, False]
    assert case["attempts"].tolist() == [1, 2]


@pytest.mark.parametrize("select", BOTH)
def test_padding_rows_and_empty_groups_change_nothing(select):
    case = tables([2, 0], [-0.1, 0.2])
    for name in ("reward", "length", "ended"):
        case[name] = torch.cat((case[name], case[name][:1]))
    before = {name: case[name].clone() for name in WRITTEN}
    winner, _, threshold, finish = select(**case)
    assert (winner[1], finish[1]) == (NONE, GOES_ON)
    assert threshold[2] == 0
    for name in WRITTEN:
        assert torch.equal(case[name][1], before[name][1]), name


@pytest.mark.parametrize("select", BOTH)
def test_acceptance_has_the_probability_of_the_rule(select):
    groups = 4000
    case = tables([1] * groups, [-1.0] * groups, target=0.0, base=0.0, beta=0.7)
    rate = select(**case)[1].double().mean().item()
    expected = math.exp(-1 / 0.7)
    assert abs(rate - expected) < 4 * math.sqrt(expected * (1 - expected) / groups)

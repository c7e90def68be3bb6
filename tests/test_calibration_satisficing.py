"""Weights are found under which constraints hold on average; whoever is slack weighs nothing."""

import math

import pytest
from conftest import refused, sum_reward, tiny_policy

from stars_fast import StarsConfig, StarsEngine, satisfice
from stars_fast.calibration.satisficing import ascend
from stars_fast.methods import BlockwiseBestOfN
from stars_fast.rewards import CallableReward, RuleReward, WeightedSum

VOCAB = 32
PROMPTS = [[i, 5] for i in range(12)]
CONFIG = StarsConfig(
    segment_length=2, max_new_tokens=4, num_return_sequences=4, ignore_eos=True, method=BlockwiseBestOfN(n=4)
)
THRESHOLDS = {"middle": 0.5, "short": -9.0}


def high(completions):
    return [sum(c) / len(c) / VOCAB for c in completions]


def middle(completions):
    return [sum(8 <= token < 16 for token in c) / len(c) for c in completions]


def parts(**weights):
    scorers = {
        "high": CallableReward(high),
        "middle": CallableReward(middle),
        "short": CallableReward(lambda completions: [-float(len(set(c))) for c in completions]),
    }
    return {name: (weights.get(name, float(name == "high")), scorer) for name, scorer in scorers.items()}


def make_engine(reward=None):
    return StarsEngine(tiny_policy(VOCAB, hidden=32), WeightedSum(parts()) if reward is None else reward)


@pytest.fixture(scope="module")
def found():
    return satisfice(make_engine(), PROMPTS, THRESHOLDS, CONFIG, rounds=8)


def test_the_constraint_is_met_and_what_is_slack_weighs_nothing(found):
    assert found.rounds[0].means["middle"] < 0.5 - 5 * found.errors["middle"], "nothing had to be done"
    assert found.means["middle"] == pytest.approx(0.5, abs=3 * found.errors["middle"] + 0.03)
    assert found.weights["high"] == 1.0 and found.weights["middle"] > 0 and found.weights["short"] == 0
    assert found.means["high"] < found.rounds[0].means["high"], "the two are not in conflict"
    assert not found.report()["warnings"] and "middle" in str(found.report())


def test_lambda_follows_its_equation_from_round_to_round(found):
    (first, second, third), gaps = found.rounds[:3], [0.5 - one.means["middle"] for one in found.rounds[:2]]
    step = second.multipliers["middle"] / gaps[0]
    assert first.multipliers == {"middle": 0.0, "short": 0.0} and step > 0
    assert third.multipliers["middle"] == pytest.approx(max(0.0, second.multipliers["middle"] + step * gaps[1]))
    assert ascend({"a": 1.0, "b": 0.1}, {"a": 2.0, "b": 0.0}, {"a": 1.5, "b": 3.0}, {"a": 0.5, "b": 0.1}) == {
        "a": 1.25,
        "b": 0.0,
    }


def test_two_calls_find_the_same_and_leave_the_reward_as_it_was(found):
    engine = make_engine()
    again = satisfice(engine, PROMPTS, THRESHOLDS, CONFIG, rounds=8)
    assert again == found
    assert engine.reward.weights == {"high": 1.0, "middle": 0.0, "short": 0.0}


def test_weights_that_were_found_guide_what_comes_after(found):
    engine = make_engine()
    engine.reward.weights = found.weights
    out = engine.generate(PROMPTS[:2], CONFIG, seed=1)
    for completion, reward, segments in zip(out.completions, out.rewards, out.segments, strict=True):
        expected = high([completion])[0] + found.weights["middle"] * middle([completion])[0]
        assert reward == pytest.approx(expected)
        assert segments[-1].parts["middle"] == middle([completion])[0]


def test_a_threshold_out_of_reach_is_named():
    report = satisfice(make_engine(), PROMPTS[:4], {"middle": 2.0}, CONFIG, rounds=2).report()
    assert "middle is" in str(report) and "below 2" in report["warnings"][0]


FINAL = RuleReward(predicates={len: 1.0}, partial=False)


@pytest.mark.parametrize(
    "reward, thresholds, named",
    [
        (lambda completions: sum_reward(completions), {"a": 1.0}, ["CallableReward", "WeightedSum"]),
        (WeightedSum(parts()), {"harmles": 1.0}, ["'harmles'", "high, middle, short"]),
        (WeightedSum(parts()), {"middle": math.inf}, [r"thresholds\['middle'\]=inf"]),
        (WeightedSum(parts()), {}, ["thresholds={}"]),
        (WeightedSum(parts()), {"high": 1.0}, ["weight", "0"]),
        (WeightedSum(parts(middle=-1.0)), {"middle": 0.5}, ["'middle'", r"-1\.0"]),
        (WeightedSum({**parts(), "final": (0.0, FINAL)}), {"final": 0.5}, [r"partial=False"]),
    ],
    ids=["no sum", "name", "value", "none", "nothing sought", "sign", "partial"],
)
def test_what_cannot_be_sought_is_refused_before_work_starts(reward, thresholds, named):
    engine = make_engine(reward)
    weights = getattr(engine.reward, "weights", None)
    with refused(*named):
        satisfice(engine, PROMPTS, thresholds, CONFIG)
    assert getattr(engine.reward, "weights", None) == weights


def test_a_part_without_a_mean_or_without_spread_is_named():
    rule = lambda completions: [-math.inf if 5 in c else 0.0 for c in completions]  # noqa: E731
    flat = lambda completions: [0.0] * len(completions)  # noqa: E731
    engine = make_engine(
        WeightedSum({**parts(), "flat": (0.0, CallableReward(flat)), "rule": (0.0, CallableReward(rule))})
    )
    with pytest.raises(RuntimeError, match="'rule' is -inf for answer"):
        satisfice(engine, PROMPTS, {"middle": 0.5}, CONFIG, rounds=2)
    engine = make_engine(WeightedSum({**parts(), "flat": (0.0, CallableReward(flat))}))
    with pytest.raises(ValueError, match="'flat' is the same for all 48 answers"):
        satisfice(engine, PROMPTS, {"flat": 0.5}, CONFIG, rounds=2)

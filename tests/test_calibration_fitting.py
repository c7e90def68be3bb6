"""A fit is made from an engine's own histories, and what it was made for is what it serves."""

import math
import warnings

import numpy as np
import pytest
from conftest import tiny_policy, tiny_reward

from stars_fast import Fit, StarsConfig, StarsEngine, demo, fit
from stars_fast.calibration.fitting import _log_z
from stars_fast.methods import OptimalStopping
from stars_fast.methods.fit import Group

VOCAB = 32
PROMPTS = [[i, i + 1, 2 * i % 31] for i in range(24)]
OTHERS = [[30 - i % 30, i % 7, i % 31] for i in range(40)]
CONFIG = StarsConfig(segment_length=4, max_new_tokens=12, ignore_eos=True)


def engine(scale=3.0, **settings):
    return StarsEngine(tiny_policy(VOCAB, hidden=32), tiny_reward(VOCAB, hidden=32, scale=scale), **settings)


@pytest.fixture(scope="module")
def known():
    return fit(engine(), PROMPTS, CONFIG, samples=8)


def test_a_fit_has_a_law_for_each_segment_and_says_what_it_cost(known):
    assert len(known.laws) == 3
    report = known.report()
    assert (report["prompts"], report["samples"]) == (24, 8)
    assert report["policy_tokens"] >= 24 * 12 * 8 * 3
    rewards = list(report["outlook"].values())
    assert list(report["outlook"]) == [1, 2, 3, 4, 6, 8]
    assert rewards == sorted(rewards)
    assert rewards[0] == report["unguided_reward"]
    assert "24 prompts" in str(report)


def test_how_far_a_reward_is_from_a_value_function_is_found_behind_the_noise():
    random = np.random.default_rng(0)
    for spread in (0.0, 0.5):
        groups = []
        for _ in range(3000):
            log_z, candidates = spread * random.standard_normal(), 0.8 * random.standard_normal(16)
            groups.append(Group(1, 2.0, (2.0 + 3.0 * (log_z + candidates - 0.32)).tolist()))  # E exp(.8 z) = exp(.32)
        assert _log_z(groups, beta=3.0) == pytest.approx(spread * math.sqrt(2 / math.pi), abs=0.05)


def test_the_same_seed_gives_the_same_fit(known, tmp_path):
    again = fit(engine(max_rows=48), PROMPTS, CONFIG, samples=8)
    assert again.levels == pytest.approx(known.levels, abs=1e-2)
    assert [list(law) for law in again.laws] == [pytest.approx(list(law), abs=1e-3) for law in known.laws]
    known.save_pretrained(tmp_path)
    assert CONFIG.replace(fit=tmp_path).known == known
    assert StarsConfig(**CONFIG.replace(fit=known).to_dict()).known == known


@pytest.mark.parametrize("budget", [2.0, 4.0])
def test_on_other_prompts_the_budget_asked_is_spent(known, budget):
    out = engine().generate(OTHERS, CONFIG, fit=known, method=OptimalStopping(budget=budget), seed=1)
    counts = [segment.attempts for row in out.segments for segment in row]
    assert sum(counts) / len(counts) == pytest.approx(budget, rel=0.2)


def test_a_budget_holds_where_answers_end_early():
    config = CONFIG.replace(ignore_eos=False, max_new_tokens=24)
    out = engine().generate(
        OTHERS, config, fit=fit(engine(), PROMPTS, config, samples=8), method=OptimalStopping(budget=3.0), seed=1
    )
    assert out.finish_reasons.count("stop") >= 8
    counts = [segment.attempts for row in out.segments for segment in row]
    assert sum(counts) / len(counts) == pytest.approx(3.0, rel=0.2)


def test_with_a_fit_no_pilots_are_drawn(known):
    out = engine().generate(OTHERS[:4], CONFIG, fit=known, seed=1)
    assert out.stats["calibration_tokens"] == 0
    assert all(math.isfinite(reward) for reward in out.rewards)


def test_what_pilots_cost_is_said_once_where_a_fit_would_spare_it():
    one = engine()
    with pytest.warns(UserWarning, match=r"96 of \d+ policy tokens were drawn to find a target .* stars_fast\.fit"):
        one.generate(OTHERS[:1], CONFIG, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one.generate(OTHERS[:1], CONFIG, seed=1)
        engine().generate(OTHERS[:1], CONFIG, seed=1, method="rejection_sampling")


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"segment_length": 5}, "segment_length is 5 here, 4 in the fit"),
        ({"temperature": 0.5}, "temperature is 0.5 here, 1.0 in the fit"),
        ({"method": "cards"}, "entropy is 3.0 here, None in the fit"),
    ],
    ids=str,
)
def test_a_fit_for_something_else_is_refused_by_name(known, settings, named):
    with pytest.raises(ValueError, match=named):
        engine().generate(OTHERS[:1], CONFIG, fit=known, **settings)


def test_a_fit_for_other_models_is_refused_by_name(known):
    other = StarsEngine(tiny_policy(VOCAB, hidden=32), lambda completions, **_: [0.0] * len(completions))
    with pytest.raises(ValueError, match=r"reward is 'CallableReward of .*lambda.*' here, 'ClassifierReward, "):
        other.generate(OTHERS[:1], CONFIG, fit=known)


def test_a_method_without_a_use_for_a_fit_says_so(known):
    with pytest.warns(UserWarning, match="method='best_of_n' has no use for a fit"):
        engine().generate(OTHERS[:1], CONFIG, fit=known, method="best_of_n")


def test_a_target_says_what_it_leaves_without_effect(known):
    with pytest.warns(UserWarning, match=r"target_reward=0\.5 leaves fit and acceptance without effect"):
        engine().generate(OTHERS[:1], CONFIG, fit=known, acceptance=0.5, target_reward=0.5)


@pytest.mark.parametrize(
    "arguments, named",
    [
        ({"prompts": PROMPTS[:3]}, "3 prompts say too little"),
        ({"prompts": PROMPTS, "samples": 3}, "samples=3 must be at least 4"),
    ],
    ids=["prompts", "samples"],
)
def test_too_little_to_learn_from_is_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        fit(engine(), config=CONFIG, **arguments)


@pytest.mark.parametrize(
    "arguments, error, named",
    [
        ({"samples": 2**40}, ValueError, "samples=1099511627776 must be at most 1024"),
        ({"num_return_sequences": 2}, TypeError, "num_return_sequences is not an argument"),
        ({"method": "best_of_n"}, ValueError, "method='best_of_n' has no use for one"),
    ],
    ids=["samples", "num_return_sequences", "method"],
)
def test_what_a_fit_has_no_place_for_is_refused_by_name(arguments, error, named):
    with pytest.raises(error, match=named):
        fit(engine(), PROMPTS, CONFIG, **arguments)
    with pytest.raises(TypeError, match="engine=None: give a StarsEngine"):
        fit(None, PROMPTS)


def test_a_scorer_that_rejects_for_good_is_learned_from_what_it_leaves():
    def reward(prompts, completions, **_):
        return [-math.inf if 7 in ids else float(sum(ids)) for ids in completions]

    one = StarsEngine(tiny_policy(VOCAB, hidden=32), reward)
    known = fit(one, PROMPTS, CONFIG, samples=4)
    assert math.isfinite(known.report()["unguided_reward"])
    nothing = StarsEngine(tiny_policy(VOCAB, hidden=32), lambda completions, **_: [-math.inf] * len(completions))
    with pytest.raises(ValueError, match="hardly any reward is finite"):
        fit(nothing, PROMPTS, CONFIG, samples=4)


def test_rewards_that_do_not_vary_are_refused():
    constant = StarsEngine(tiny_policy(VOCAB, hidden=32), lambda completions, **_: [1.0] * len(completions))
    with pytest.raises(ValueError, match="all the same"):
        fit(constant, PROMPTS, CONFIG, samples=4)


def test_the_demo_models_bring_a_fit():
    policy, reward, tokenizer = demo.load()
    one = StarsEngine(policy, reward, tokenizer=tokenizer)
    settings = {"method": OptimalStopping(budget=2.0), "max_new_tokens": 32, "top_k": 50, "seed": 0}
    settings["num_return_sequences"] = 6
    guided = one.generate(list(demo.PROMPTS), fit="demo", **settings)
    attempts = [segment.attempts for row in guided.segments for segment in row]
    assert sum(attempts) / len(attempts) == pytest.approx(2.0, rel=0.2)
    with pytest.raises(ValueError, match="top_k is 0 here, 50 in the fit"):
        one.generate(list(demo.PROMPTS), fit="demo", **settings | {"top_k": None})


def test_a_fit_is_read_back_or_refused():
    with pytest.raises(FileNotFoundError, match=r"stars_fit\.json"):
        StarsConfig(fit="nowhere")
    with pytest.raises(TypeError, match="fit=3: give what"):
        StarsConfig(fit=3)
    with pytest.raises(ValueError, match="not what Fit"):
        Fit.from_dict({})

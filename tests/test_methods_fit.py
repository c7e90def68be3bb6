"""A fit finds the law that rewards were drawn from, and keeps it."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from stars_fast.methods.fit import Fit, Group, learn
from stars_fast.methods.stopping import Forecast


def drawn(prefixes=400, candidates=16, spread=lambda before: 0.5, weight=1e9, slope=0.8, between=0.3, seed=0):
    """Groups of two segments whose law is known."""
    random = np.random.default_rng(seed)
    groups = []
    for _ in range(prefixes):
        before = 0.0
        for segment in range(2):
            scale = spread(before) * math.sqrt(weight / random.chisquare(weight))
            mean = 1.0 + slope * before + between * random.standard_normal()
            rewards = mean + scale * random.standard_normal(candidates)
            groups.append(Group(segment, before, rewards.tolist()))
            before = float(rewards[0])
    return groups


def test_a_fit_finds_mean_slope_and_spread():
    fit = learn(drawn(), {}, {})
    first, second = fit.laws
    assert (first.mean, first.slope) == (pytest.approx(1.0, abs=0.05), 0.0)
    assert (second.mean, second.slope) == (pytest.approx(1.0, abs=0.15), pytest.approx(0.8, abs=0.1))
    for law in fit.laws:
        assert law.between == pytest.approx(0.3, abs=0.04)
        assert math.sqrt(law.variance(1.0)) == pytest.approx(0.5, abs=0.02)
    assert fit.law(7) == second


def test_a_fit_finds_spreads_that_follow_the_reward_before():
    law = learn(drawn(spread=lambda before: math.exp(-0.5 - 0.4 * before)), {}, {}).laws[1]
    assert law.spread_slope == pytest.approx(-0.4, abs=0.05)
    assert law.variance(law.highest + 5) == law.variance(law.highest), "nothing is known of spreads out there"


def test_a_segment_whose_rewards_do_not_vary_is_no_obstacle():
    groups = [group if group.segment else group._replace(rewards=[0.0] * 16, before=0.0) for group in drawn(40)]
    flat, other = learn(groups, {}, {}).laws
    assert flat.centre(0.0) == 0.0
    assert 0 < flat.variance(0.0) < 0.04 * other.variance(1.0)
    with pytest.raises(ValueError, match="all the same"):
        learn([group._replace(rewards=[1.0] * 16) for group in groups], {}, {})


def test_a_fit_finds_what_unfinished_answers_come_to():
    random, groups = np.random.default_rng(0), []
    for among in (1, 3, 16):
        for group in drawn(8, seed=among):
            kept = max(group.rewards[:among])
            final = 2.0 + 0.5 * kept + 0.3 * math.log(among) + 1e-3 * random.standard_normal()
            groups.append(group._replace(kept=kept, among=among, final=final))
    for law in learn(groups, {}, {}).laws:
        assert (law.ahead, law.carried, law.searched) == pytest.approx((2.0, 0.5, 0.3), abs=0.01)
        assert law.unfinished(2.0 + 0.5 * 1.7 + 0.3 * math.log(4), 4) == pytest.approx(1.7, abs=0.05)
    alike = learn([group._replace(kept=math.nan) for group in groups], {}, {}).laws[0]
    assert alike.unfinished(1.7, 4) == 1.7, "where answers never went on, finished ones are compared as they are"


def test_levels_are_uniform_on_candidates_of_other_prefixes():
    fit = learn(drawn(seed=1), {}, {})
    levels = [fit.level(g.segment, g.before, reward) for g in drawn(seed=2) for reward in g.rewards]
    assert np.histogram(levels, 10, (0, 1))[0] / len(levels) == pytest.approx(np.full(10, 0.1), abs=0.01)
    assert np.all(np.diff([fit.level(0, 0.0, reward) for reward in np.linspace(-40, 40, 999)]) > 0)


def test_a_prefix_that_was_rejected_for_good_is_taken_for_the_lowest_that_was_seen():
    known = learn(drawn(), {}, {})
    lowest = known.law(1).lowest
    assert known.level(1, -math.inf, 0.3) == known.level(1, lowest, 0.3)
    one, other = Forecast(known, 0.07, 4.0), Forecast(known, 0.07, 4.0)
    one.begin(1, -math.inf)
    other.begin(1, lowest)
    for forecast in (one, other):
        forecast.see(0.4)
    assert one.threshold == other.threshold


def test_a_fit_is_what_it_was_when_it_is_read_again(tmp_path):
    fit = learn(drawn(20), {"segment_length": 16, "policy": "tiny"}, {"prompts": 20.0})
    fit.save_pretrained(tmp_path)
    assert Fit.from_pretrained(tmp_path) == fit
    assert Fit.from_dict(json.loads(json.dumps(fit.to_dict()))) == fit
    assert fit.differences({"segment_length": 8, "policy": "tiny"}) == ["segment_length is 8 here, 16 in the fit"]


@pytest.mark.parametrize(
    "broken", [{}, {"laws": []}, {"laws": [{"mean": 1}], "residuals": [], "levels": []}, []], ids=str
)
def test_what_is_no_fit_is_refused(broken):
    with pytest.raises(ValueError, match="fit"):
        Fit.from_dict(broken)


def test_rewards_that_do_not_vary_are_refused():
    with pytest.raises(ValueError, match="all the same"):
        learn([Group(0, 0.0, [1.0] * 8)] * 9, {}, {})


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_a_fit_is_in_the_rewards_own_units(scale):
    groups = [g._replace(before=scale * g.before, rewards=[scale * r for r in g.rewards]) for g in drawn(60)]
    fit, other = learn(drawn(60), {}, {}), learn(groups, {}, {})
    assert other.levels == pytest.approx(fit.levels, abs=1e-3)
    assert [scale * law.between for law in fit.laws] == pytest.approx([law.between for law in other.laws], rel=1e-3)
    assert len({reward for one in other.prefixes[0] for reward in one.rewards}) > 900, "not rounded away"


def spoilt(path, value):
    """A fit's file with another value at a path of keys."""
    values = json.loads(json.dumps(learn(drawn(20), {}, {}).to_dict()))
    at = values
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return values


@pytest.mark.parametrize(
    "path, value, named",
    [
        (("laws", 0, "between"), 0.0, r"law 0: between=0 must be > 0"),
        (("laws", 1, "mean"), math.nan, "a number is NaN"),
        (("laws", 1, "mean"), 1e308, "a number is NaN or beyond 1e30"),
        (("laws", 0, "log_spread"), 1e6, r"law 0: a spread of exp\(1e\+06\)"),
        (("laws", 0, "carried"), 0.0, r"law 0: carried=0 must be > 0"),
        (("laws", 1, "lowest"), 1e9, r"law 1: lowest=1e\+09 is above"),
        (("levels", 0), 9e9, "levels do not ascend"),
        (("levels",), [], "laws, levels or prefixes are empty"),
        (("prefixes", 0, 0, 1), [], "prefixes have no candidates, or not as many each"),
        (("prefixes", 0, 0, 1, 3), math.inf, "a number is NaN"),
        (("prefixes",), [], "of as many segments"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_a_damaged_fit_is_refused_by_name(path, value, named):
    with pytest.raises(ValueError, match=named + r".*make it anew"):
        Fit.from_dict(spoilt(path, value))


def test_partial_rewards_that_say_nothing_are_warned_of():
    fit = replace(learn(drawn(20), {}, {"prompts": 20, "policy_tokens": 9}), outlook=((1.0, 0.0), (16.0, 1.0)))
    for figures, words in (({}, "to tell if partial"), ({"rank_correlation": 0.1}, "consider best-of-N")):
        report = replace(fit, figures={**fit.figures, **figures}).report()
        assert words in report["warnings"][0]
        assert "warning: " in str(report)
    assert replace(fit, figures={**fit.figures, "rank_correlation": 0.5}).report()["warnings"] == []
    with pytest.raises(ValueError, match=r"Calibration\.report\(\)"):
        learn(drawn(20), {}, {}).report()
    assert repr(fit) == "Fit(2 segments, 20 prompts)"

"""Figures of an evaluation that say how far, how dear and against whom: by hand, and by simulation."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest

from benchmarks import reward_plot
from stars_fast.evaluation.divergence import divergence, fallbacks, of_best, of_search, of_tested
from stars_fast.evaluation.metrics import Interval, bootstrap
from stars_fast.evaluation.paired import Point, Reached, at_equal_tokens, compare, cost_to_reach, to_reach
from stars_fast.evaluation.summary import Summary
from stars_fast.evaluation.tables import Row, rewards


def row(method, budget, answers, guide, judge=0.0, **others):
    plain = {field.name: 0 for field in dataclasses.fields(Row)}
    figures = {"cell": f"{method}@{budget}" if budget else method, "method": method, "budget": budget, "compute": 1.0}
    at = {name: Interval(value, value, value) for name, value in {"guide": guide, "judge": judge, "win": 0.5}.items()}
    return Row(**{**plain, **figures, **at, "answers": answers, "kl": math.nan, "kl_at_most": False, **others})


# ------------------------------------------------------------------------------------------------- KL
def test_kl_of_a_rejection_rule_is_estimated_without_a_bias():
    """Against the sum over all segments; nothing falls back in 1,000 attempts."""
    rng = np.random.default_rng(0)
    rewards_, target, beta = rng.normal(size=500), 0.8, 0.7
    accept = np.minimum(1.0, np.exp((rewards_ - target) / beta))
    mean = accept.mean()
    exact = float((accept / mean * np.log(accept / mean)).mean())
    looked_at = rng.geometric(mean, size=20_000)  # candidates up to the accepted one, which has the tilted law
    chosen = rng.choice(500, size=20_000, p=accept / accept.sum())
    segments = [
        {"attempts": int(j), "accepted": True, "log_acceptance": math.log(accept[s])}
        for j, s in zip(looked_at, chosen, strict=True)
    ]
    estimates = [of_tested(segment) for segment in segments]
    assert np.mean(estimates) == pytest.approx(exact, abs=4 * np.std(estimates) / math.sqrt(20_000))
    texts = [segments[:10_000], segments[10_000:]]
    assert divergence("stars", texts).value == pytest.approx(sum(estimates) / 2)  # a text's is the sum of its segments'


@pytest.mark.parametrize(
    ("accept", "attempts", "sign"),
    [([0.0, 0.0, 0.0, 1.0, 1.0], 4, 1), ([0.2, 0.3, 0.4, 0.5, 0.7], 3, -1)],  # hard, soft
)
def test_fallbacks_bias_the_kl_either_way_and_within_the_stated_bound(accept, attempts, sign):
    """Every sequence of candidates and of verdicts on them, the fallback being the best of what was rejected."""
    atoms, mean, law, estimate = len(accept), sum(accept) / len(accept), np.zeros(len(accept)), 0.0
    for drawn in itertools.product(range(atoms), repeat=attempts):  # in the order of their rewards
        left = 1 / atoms**attempts  # the probability of being here
        for j, candidate in enumerate(drawn, 1):
            if (passed := left * accept[candidate]) > 0:
                law[candidate] += passed
                log = math.log(accept[candidate])
                estimate += passed * of_tested({"attempts": j, "accepted": True, "log_acceptance": log})
            left -= passed
        law[max(drawn)] += left
        estimate += left * of_tested({"attempts": attempts, "accepted": False})
    exact, share = float((law[law > 0] * np.log(law[law > 0] * atoms)).sum()), (1 - mean) ** attempts
    bound = -share * math.log(share) - (1 - share) * math.log(1 - share) - share * math.log(mean)
    assert 0.02 < sign * (estimate - exact) < bound


def test_kl_is_left_out_where_more_than_a_tenth_of_the_segments_fell_back():
    passed, fell_back = ({"attempts": 4, "accepted": accepted, "log_acceptance": -0.5} for accepted in (True, False))
    few, many = [[passed] * 9 + [fell_back]] * 2, [[passed] * 8 + [fell_back]] * 2
    assert fallbacks("stars", few) == 0.1 and divergence("stars", few).value > 0
    assert fallbacks("cards", many) == 1 / 9 and math.isnan(divergence("cards", many).value)
    assert math.isnan(fallbacks("best_of_n", many)) and divergence("best_of_n", many).value > 0


def test_kl_of_the_best_of_n_is_that_of_an_enumerated_law():
    n, atoms = 4, 10_000  # of equal weight: the best of four has (k^4 - (k - 1)^4) / atoms^4 of them
    q = np.diff((np.arange(atoms + 1) / atoms) ** n)
    assert of_best(n) == pytest.approx(float((q * np.log(q * atoms)).sum()), abs=1e-3)
    assert of_best(1) == 0.0
    fallback = {"attempts": 4, "accepted": False, "log_acceptance": -3.0}
    assert of_tested(fallback) == of_best(4) == pytest.approx(math.log(4) - 0.75)
    block = [{"attempts": 4, "accepted": False}] * 3
    assert divergence("blockwise_best_of_n", [block, block[:1]]).value == pytest.approx(2 * of_best(4))


def test_kl_of_a_search_is_bounded_by_what_it_looks_at():
    # Two texts: 2 and 4 candidates in the first segment, 5 in the second, which one of them has.
    assert of_search([[2, 5], [4]]) == pytest.approx(math.log(3) + 0.5 * math.log(5))
    found = divergence("optimal_stopping", [[{"attempts": 2}, {"attempts": 5}], [{"attempts": 4}]])
    assert found.at_most and found.value == of_search([[2, 5], [4]])
    # The best of a fixed n is such a search: its own divergence is below the bound.
    assert of_best(8) < of_search([[8]])


def test_kl_is_zero_without_guidance_and_unknown_where_no_formula_is():
    assert divergence("vanilla", [[{"attempts": 1, "accepted": True}]]) == (0.0, False)
    assert math.isnan(divergence("particle_filter", [[{"attempts": 8, "accepted": True}]]).value)


# ------------------------------------------------------------------------------- tokens to reach a reward
def test_the_cost_to_reach_a_reward_is_linear_in_its_log():
    points = [(8.0, 3.0), (2.0, 1.0), (4.0, 2.0)]
    assert cost_to_reach(points, 2.5).cost == pytest.approx(4 * math.sqrt(2))
    assert cost_to_reach(points, 3.0) == Reached(8.0, at_most=False)
    assert cost_to_reach(points, 0.5) == Reached(2.0, at_most=True)
    assert cost_to_reach(points, 3.1) is None
    assert cost_to_reach([(2.0, 1.0)], 2.0) is None


def test_the_yardstick_is_best_of_16_under_each_scorer():
    rows = [row("vanilla", None, 1.0, 0.0), row("best_of_n", 16.0, 16.0, 2.0, 1.0), row("stars", 2.0, 2.0, 1.0, 1.5)]
    rows.append(row("stars", 4.0, 4.0, 3.0, 1.6))
    reached = to_reach(rows)
    assert reached["vanilla"] == {"guide": None, "judge": None}
    assert reached["stars"]["guide"].cost == pytest.approx(2 * math.sqrt(2))
    assert reached["stars"]["judge"] == Reached(2.0, at_most=True)
    assert to_reach(rows[:1]) == {}


# ----------------------------------------------------------------------------------- pairs of methods
def test_at_equal_tokens_the_other_is_interpolated_from_the_baseline_on():
    baseline = np.array([0.0, 1.0, 2.0, 3.0])
    ladder = [Point(16.0, baseline + 4.0), Point(4.0, baseline + 2.0)]
    # At 2 tokens the other is half way between the baseline and its budget of 4: +1; at 8 tokens +3.
    for tokens, gained in ((2.0, 1.0), (8.0, 3.0)):
        difference, ratio = at_equal_tokens(Point(tokens, baseline + 1.5 * gained), ladder, baseline)
        assert difference == pytest.approx((0.5 * gained,) * 3)  # every prompt has the same, so all resamples agree
        assert ratio == pytest.approx((1.5, 1.5, 1.5))
    assert at_equal_tokens(Point(17.0, baseline), ladder, baseline) is None


def test_prompts_are_resampled_for_both_methods_together():
    """A difference that all prompts share has no interval, however much the prompts themselves vary."""
    prompts = np.random.default_rng(0).normal(scale=100.0, size=50)
    difference, _ = at_equal_tokens(Point(4.0, prompts + 2.5), [Point(4.0, prompts + 2.0)], prompts)
    assert difference == pytest.approx((0.5, 0.5, 0.5))


def test_pairs_are_compared_on_the_prompts_that_all_their_cells_have():
    rows = [row("vanilla", None, 1.0, 0.0), row("a", 2.0, 2.0, 1.0), row("b", 2.0, 2.5, 1.0), row("b", 4.0, 4.0, 2.0)]
    cells = {"vanilla": {0: 0.0, 1: 0.0}, "a@2.0": {0: 1.0, 1: 3.0}, "b@2.0": {0: 1.0, 1: 2.0, 2: 9.0}}
    cells["b@4.0"] = {0: 2.0, 1: 4.0, 2: 9.0}
    tokens, budgets = compare(rows, {"guide": cells, "judge": cells}, [("a", "b"), ("a", "unknown")])
    assert [(one.scorer, one.cost) for one in tokens] == [("guide", 2.0), ("judge", 2.0)]
    share = math.log(2) / math.log(2.5)  # of the way from vanilla to b at 2.5 tokens
    assert tokens[0].difference.value == pytest.approx((1 - share * 1 + 3 - share * 2) / 2)
    assert tokens[0].ratio.value == pytest.approx(4 / (3 * share))
    assert budgets[0].other_cost == 2.5 and budgets[0].difference == bootstrap([0.0, 1.0])


def test_a_row_that_has_no_partner_as_dear_is_listed_and_named():
    rows = [row("vanilla", None, 1.0, 0.0), row("a", 2, 2.0, 1.0), row("a", 16, 12.0, 2.0), row("b", 16, 7.0, 2.0)]
    cells = {one.cell: {0: one.guide.value, 1: one.guide.value + 1} for one in rows}
    tokens, budgets = compare(rows, {"guide": cells, "judge": cells}, [("a", "b")])
    assert [one.difference is None for one in tokens if one.scorer == "guide"] == [False, True]
    text = Summary(rows, {}, tokens, budgets, {}).markdown()
    assert (
        "| a | 16 | 12.00 | b |  |  |  |  |  |\n\nEmpty, since the other has no budget as dear: a at 16 (b).\n" in text
    )
    read = json.loads(Summary(rows, {}, tokens, budgets, {}).to_json())["equal_tokens"]
    assert read[-1]["cost"] == 12.0 and read[-1]["difference"] is None


def test_rewards_are_means_over_seeds_of_what_did_not_fail():
    rows = [
        {"cell": "a", "place": 1, "seed": 0, "error": None, "guide": 1.0},
        {"cell": "a", "place": 1, "seed": 1, "error": None, "guide": 2.0},
        {"cell": "a", "place": 0, "seed": 0, "error": "broken", "guide": None},
    ]
    assert rewards(rows, "guide") == {"a": {1: 1.5}}


def test_a_summary_is_text_and_json_of_the_same_figures():
    found = row("stars", 2.0, 2.0, 1.0, kl=1.234567891, kl_at_most=True)
    comparison = compare([row("vanilla", None, 1.0, 0.0), found], {}, [])
    summary = Summary(
        [found],
        {"stars": {"guide": Reached(2.0, True), "judge": None}},
        *comparison,
        {"fit": {"prompts": 24, "policy_tokens": 1e6}},
    )
    text = summary.markdown()
    assert "| ≤ 1.23 |" in text and "| stars | ≤ 2.00 |  |" in text and "24 prompts, 1,000,000 policy tokens" in text
    read = json.loads(summary.to_json())
    assert read["rows"][0]["kl"] == 1.23457 and read["rows"][0]["judge_low"] == 0.0
    assert read["to_reach"]["stars"] == {"guide": {"cost": 2.0, "at_most": True}, "judge": None}


# ------------------------------------------------------------------------------------- README's plot
def test_the_plot_of_the_readme_is_the_same_for_the_same_records(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [row("vanilla", None, 1.0, 0.0)]
    for i, method in enumerate(reward_plot.SERIES):
        rows += [row(method, float(n), float(n), math.log(n) + i, -math.log(n)) for n in (2, 4, 64)]
    table = Summary(rows, {}, [], [], {}).to_json()
    for date in ("2026-01-01", "2026-02-01"):
        (tmp_path / f"{date}-eval-films.json").write_text(table)
    assert list(reward_plot.newest(tmp_path)) == ["films"]
    record = json.loads(table)
    assert [one[:2] for one in reward_plot.points(record, "best_of_n", "judge")] == [
        (1.0, 0.0),
        (2.0, pytest.approx(-math.log(2), abs=1e-5)),
        (4.0, pytest.approx(-math.log(4), abs=1e-5)),
    ]
    for name in ("a.svg", "b.svg"):
        reward_plot.main(["--results", str(tmp_path), "--output", str(tmp_path / name)])
    drawn = (tmp_path / "a.svg").read_bytes()
    assert drawn == (tmp_path / "b.svg").read_bytes() and len(drawn) < 100_000 and b"<dc:date>" not in drawn

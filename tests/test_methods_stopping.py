"""The rule stops where drawing on is worth less than it costs, and spends its budget."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from test_methods_fit import drawn

from stars_fast.methods import OptimalStopping, stopping
from stars_fast.methods.fit import Group, learn
from stars_fast.methods.stopping import NORMAL, Experience, Forecast, Shape, cost_for, replayed, simulated


@pytest.fixture(scope="module")
def fit():
    return learn(drawn(), {}, {})


@pytest.mark.parametrize("cost", [0.001, 0.05, 0.3, 2.0])
def test_a_reservation_value_is_what_a_candidate_gains_on_average(cost):
    atoms = np.sort(np.random.default_rng(0).standard_normal(400))
    value = Shape(atoms).reservation(cost)
    assert np.maximum(atoms - value, 0).mean() == pytest.approx(cost, rel=1e-9)


def seeing(one, *rewards):
    one.begin(0, None)
    for reward in rewards:
        one.see(reward)
    return one


def test_a_forecast_stops_where_a_candidate_gains_what_it_costs(fit):
    """Over the fit's atoms, placed by the conjugate posterior, which brute force finds as well."""
    law, seen = fit.law(0), [2.0, 3.5, 1.0]
    threshold = seeing(Forecast(fit, 0.07, 4.0), *seen).threshold
    variance = (12 * law.variance(0.0) + 3 * np.var(seen)) / (12 + 2)
    grid = np.linspace(-10, 10, 20001)
    density = np.exp(
        -((grid - law.centre(0.0)) ** 2) / (2 * law.between**2)
        - sum((x - grid) ** 2 for x in seen) / (2 * law.variance(0.0))
    )
    mean = (grid * density).sum() / density.sum()
    widened = ((grid - mean) ** 2 * density).sum() / density.sum() / law.variance(0.0)
    further = mean + math.sqrt(variance * (1 + widened)) * np.array(fit.levels)
    assert 8 / (8 + 3) * np.maximum(further - threshold, 0).mean() == pytest.approx(0.07, rel=1e-3)


def test_experience_goes_by_the_candidates_alone_behind_a_prefix_that_was_rejected_for_good():
    one = seeing(Experience(0.2, 4.0), 0.1, 0.5)
    one.begin(1, -math.inf)
    assert one.threshold == math.inf  # of candidates that are rejected for good nothing is seen
    for reward in (1.0, 2.0, 3.0):
        one.see(reward)
    behind, one = one, seeing(Experience(0.2, 4.0), 0.1, 0.5)
    one.begin(1, None)
    for reward in (1.0, 2.0, 3.0):
        one.see(reward)
    assert math.isfinite(behind.threshold) and behind.threshold == one.threshold


def test_what_costs_nothing_is_drawn_on_also_where_rewards_do_not_vary():
    assert seeing(Experience(0.0, 4.0), 1.0, 1.0, 1.0, 1.0).threshold == math.inf


def test_a_forecast_gives_up_with_each_candidate_that_is_as_expected(fit):
    one, thresholds = seeing(Forecast(fit, 0.07, 4.0)), []
    for _ in range(20):
        one.see(fit.law(0).centre(0.0))
        thresholds.append(one.threshold)
    assert all(a > b for a, b in pairwise(thresholds))
    one.begin(0, None)
    one.see(fit.law(0).centre(0.0))
    assert one.threshold == thresholds[0], "a segment that begins anew has seen nothing"


def test_a_finished_candidate_is_worth_what_going_on_comes_to(fit):
    law = fit.laws[0]._replace(ahead=1.0, carried=0.5, searched=0.25)
    one = seeing(Forecast(replace(fit, laws=(law, *fit.laws[1:])), 0.07, 4.0))
    assert 1.0 + 0.5 * one.worth(2.0) + 0.25 * math.log(4) == pytest.approx(2.0)
    assert Experience(0.1, 2).worth(2.0) == 2.0


def test_experience_learns_the_spread_of_a_request():
    one, thresholds = Experience(0.1, 2), []
    for segment in range(8):
        one.begin(segment, 0.0)
        for reward in (-5.0, 5.0):
            one.see(reward)
        thresholds.append(one.threshold)
    spread = math.sqrt(50)  # of two candidates around their mean
    expected = 0.0 + spread * math.sqrt(1.2) * Shape(NORMAL).reservation(0.1 / math.sqrt(1.2))
    assert thresholds == pytest.approx([expected] * 8)
    one.begin(8, 0.0)
    one.see(0.0)
    assert one.threshold == pytest.approx(spread * math.sqrt(1.25) * Shape(NORMAL).reservation(0.1 / math.sqrt(1.25)))


def looked_at(one, segment, before, rewards):
    """How many, one after the other, and the best of them."""
    one.begin(segment, before)
    count, best = 0, -math.inf
    for reward in rewards:
        one.see(reward)
        count, best = count + 1, max(best, reward)
        if best >= one.threshold:
            break
    return count, best


@pytest.mark.parametrize("cost", [0.01, 0.1, 0.5])
def test_a_cost_is_replayed_as_candidates_are_looked_at(fit, cost, monkeypatch):
    """All prefixes at once, against one candidate after another."""
    seen = []
    some = stopping._some

    def watch(*arguments):
        seen.append(some(*arguments))
        return seen[-1]

    monkeypatch.setattr(stopping, "_some", watch)
    expected, one, counts = replayed(fit, 24, 2)(cost), Forecast(fit, cost, 4.0), []
    rows = iter(seen)
    for segment, met in enumerate(fit.prefixes):
        of = [looked_at(one, segment, prefix.before, next(rows))[0] for prefix in met for _ in range(4)]
        counts.append(sum(of) / len(of))
    assert expected == pytest.approx(sum(counts) / 2)


@pytest.mark.parametrize("cost", [0.02, 0.2, 1.0])
def test_without_a_fit_a_cost_is_simulated_as_candidates_are_looked_at(cost):
    numbers, total = np.random.default_rng(1), 0
    for _ in range(1500):
        one, before = Experience(cost, 3.0), None
        for segment in range(3):
            around = (before or 0.0) + 3**-0.5 * numbers.standard_normal()
            count, before = looked_at(one, segment, before, around + numbers.standard_normal(24))
            total += count
    assert simulated(3.0, 24, 3)(cost) == pytest.approx(total / 4500, rel=0.05)


@pytest.mark.parametrize("budget", [2.0, 4.0, 8.0])
@pytest.mark.parametrize("segments", [1, 2, 7])
def test_on_other_prefixes_the_budget_asked_is_spent(fit, budget, segments):
    one, numbers, counts = OptimalStopping(budget).search(fit, 64, segments), np.random.default_rng(5), []
    for _ in range(400):
        before = None
        for segment in range(segments):
            law = fit.law(segment)
            around = law.centre(before or 0.0) + law.between * numbers.standard_normal()
            rewards = around + math.sqrt(law.variance(before or 0.0)) * numbers.standard_normal(64)
            counts.append(looked_at(one, segment, before, rewards)[0])
            before = float(rewards[0])
    assert np.mean(counts) == pytest.approx(budget, rel=0.2)


def test_a_cost_is_found_in_no_time(fit):
    begun = time.process_time()
    for segments in range(1, 9):
        cost_for(16.5, 64, segments, fit)
        cost_for(16.5, 64, segments, None)
    assert time.process_time() - begun < 8.0


@pytest.mark.parametrize("attempts", [4, 24])
def test_the_budget_holds_where_rewards_are_counts(attempts):
    """Ties, bounds, and prefixes of other odds: as of a rule that checks a segment's two steps."""
    counts = learn(checked_steps(), {}, {})
    for budget in (1.5, 2.5):
        cost = cost_for(budget, attempts, 3, counts)
        assert replayed(counts, attempts, 3)(cost) == pytest.approx(budget, rel=0.2)


def checked_steps(prompts=30):
    """Each candidate takes two more steps, right or wrong, with its prefix's odds."""
    random, groups = np.random.default_rng(0), []
    for _ in range(prompts):
        before, odds = 0.0, random.beta(2, 1)
        for segment in range(3):
            rewards = before + 2.0 * random.binomial(2, odds, 16) - 2.0
            groups.append(Group(segment, before, rewards.tolist()))
            before = float(rewards[0])
    return groups


def test_more_reward_than_the_best_of_as_many(fit):
    """On the fit's own law: what stopping is for."""
    for budget in (2, 4, 8):
        one, numbers = OptimalStopping(budget).search(fit, 64, 2), np.random.default_rng(0)
        looked, stopped, best_of = 0, 0.0, 0.0
        for _ in range(1000):
            ends = []
            for stops in (True, False):
                before = None
                for segment in range(2):
                    mean = 1.0 + 0.8 * (before or 0.0) + 0.3 * numbers.standard_normal()
                    rewards = mean + 0.5 * numbers.standard_normal(64 if stops else budget)
                    count, best = looked_at(one, segment, before, rewards) if stops else (0, rewards.max())
                    looked, before = looked + count, float(best)
                ends.append(before)
            stopped, best_of = stopped + ends[0], best_of + ends[1]
        assert looked / 2000 == pytest.approx(budget, rel=0.1)
        unguided = 1.0 + 0.8 * 1.0
        assert stopped / 1000 - unguided > 1.04 * (best_of / 1000 - unguided)


def test_without_a_fit_two_candidates_are_looked_at_before_anything_is_known():
    assert seeing(Experience(1.0, 2), 5.0).threshold == math.inf
    assert seeing(Experience(1.0, 2), 5.0, 5.0).threshold == 5.0, "rewards that do not vary are not waited for"
    assert seeing(Experience(1.0, 4), 5.0, 5.0).threshold == math.inf, "a tie of two says little of a budget of four"


def test_without_a_fit_no_segment_takes_twice_the_budget():
    one = seeing(Experience(1e-9, 2.5), *range(3))
    assert one.threshold > 3
    one.see(0.0)
    assert one.threshold == -math.inf


@pytest.mark.parametrize("budget", [0.5, 257, math.nan])
def test_a_budget_out_of_range_is_refused(budget):
    with pytest.raises(ValueError, match=r"budget=.* must lie in"):
        OptimalStopping(budget=budget)


def test_a_budget_of_all_attempts_looks_at_all():
    one = OptimalStopping(budget=4.0).search(None, 3, 2)
    one.begin(0, None)
    for reward in (0.0, 1.0, 9.0):
        one.see(reward)
        assert one.threshold == math.inf


def test_attempts_that_are_hardly_reached_cost_nothing():
    assert cost_for(2.0, 2**31 - 1, 8, None) == pytest.approx(cost_for(2.0, 32, 8, None))

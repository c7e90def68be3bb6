"""The rule stops where drawing on is worth less than it costs, and spends its budget."""

from __future__ import annotations

import math
import random
from statistics import fmean

import numpy as np
import pytest
from test_methods_fit import drawn

from stars_fast import StarsConfig
from stars_fast.methods import OptimalStopping
from stars_fast.methods.fit import learn
from stars_fast.methods.stopping import Belief, Prior, Rule, Shape, cost_for, simulate


@pytest.fixture(scope="module")
def fit():
    return learn(drawn(), {}, {})


@pytest.mark.parametrize("cost", [0.001, 0.05, 0.3, 2.0])
def test_a_reservation_value_is_what_a_candidate_gains_on_average(cost):
    atoms = np.sort(np.random.default_rng(0).standard_normal(400))
    value = Shape(atoms).reservation(cost)
    assert np.maximum(atoms - value, 0).mean() == pytest.approx(cost, rel=1e-9)


class Given(Rule):
    """Whose prior is given."""

    def __init__(self, *prior):
        super().__init__(None, 0.1)
        self.given = Prior(*prior)

    def prior(self, segment, before):
        return self.given


def seeing(rule, *rewards):
    belief = Belief(rule)
    belief.begin(0, None)
    for reward in rewards:
        belief.see(reward)
    return belief


def test_beliefs_are_the_conjugate_posterior():
    """Against brute force: the posterior mean of a normal mean with a normal prior, given the spread."""
    seen = [2.0, 3.5, 1.0]
    grid = np.linspace(-10, 10, 20001)
    density = np.exp(-((grid - 1) ** 2) / 0.5 - sum((x - grid) ** 2 for x in seen) / 8)
    posterior = (grid * density).sum() / density.sum()
    variance = ((grid - posterior) ** 2 * density).sum() / density.sum()
    mean, spread, within = seeing(Given(1.0, 4.0, 1e12, 0.5), *seen).forecast()
    assert (mean, within) == (pytest.approx(posterior, abs=1e-4), pytest.approx(2.0))
    assert spread == pytest.approx(math.sqrt(4 + variance), abs=1e-4)


def test_a_request_learns_its_own_spread():
    belief, spreads = Belief(Given(0.0, 1.0, 4.0, 1.0)), []
    for segment in range(20):
        belief.begin(segment, None)
        for reward in (-5.0, 5.0):
            belief.see(reward)
        spreads.append(belief.forecast()[2])
    assert spreads == sorted(spreads)
    assert spreads[-1] == pytest.approx(math.sqrt(50), rel=0.2)


def test_beginning_a_segment_anew_forgets_its_candidates(fit):
    again = seeing(Rule(fit, 0.1), 9.0)
    again.begin(0, None)
    again.see(0.5)
    assert again.threshold == seeing(Rule(fit, 0.1), 0.5).threshold


@pytest.mark.parametrize("budget", [1.5, 4.0, 12.0])
@pytest.mark.parametrize("fitted", [True, False])
def test_the_budget_asked_is_the_budget_spent(fit, fitted, budget):
    chosen = fit if fitted else None
    assert simulate(chosen, cost_for(budget, 24, chosen), 24).candidates == pytest.approx(budget, rel=0.05)


def test_more_reward_than_the_best_of_as_many(fit):
    """On the fit's own law: what stopping is for."""
    numbers = random.Random(0)
    for budget in (2, 4, 8):
        stopped = simulate(fit, cost_for(float(budget), 32, fit), 32)
        blockwise = []
        for _ in range(2000):
            before = 0.0
            for segment in range(2):
                law = fit.law(segment)
                mean = law.prior(before) + law.between * numbers.gauss(0, 1)
                before = max(mean + math.sqrt(law.variance(before)) * numbers.gauss(0, 1) for _ in range(budget))
            blockwise.append(before)
        unguided = 1.0 + 0.8 * 1.0
        assert stopped.reward - unguided > 1.05 * (fmean(blockwise) - unguided)


def test_without_a_fit_two_candidates_are_looked_at_before_anything_is_known():
    assert seeing(Rule(None, 1.0), 5.0).threshold == math.inf
    assert seeing(Rule(None, 1.0), 5.0, 5.0).threshold == 5.0, "rewards that do not vary are not waited for"


def test_without_a_fit_no_segment_takes_more_than_twice_the_budget():
    settings = StarsConfig(method=OptimalStopping(budget=3.0), max_attempts=20)
    assert settings.chosen_method.rule(settings).max_attempts == 6
    assert settings.chosen_method.rule(settings.replace(max_attempts=4)).max_attempts == 4
    fitted = settings.replace(fit=learn(drawn(), {}, {}))
    assert fitted.chosen_method.rule(fitted).max_attempts == 20


@pytest.mark.parametrize("budget", [0.5, 257, math.nan])
def test_a_budget_out_of_range_is_refused(budget):
    with pytest.raises(ValueError, match=r"budget=.* must lie in"):
        OptimalStopping(budget=budget)


def test_a_budget_of_all_attempts_looks_at_all():
    belief = OptimalStopping(budget=4.0).belief(None, 3)
    belief.begin(0, None)
    for reward in (0.0, 1.0, 9.0):
        belief.see(reward)
        assert belief.threshold == math.inf


def test_attempts_that_are_hardly_reached_cost_nothing():
    assert cost_for(2.0, 2**31 - 1, None) == pytest.approx(cost_for(2.0, 32, None))

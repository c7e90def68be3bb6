"""r_star and beta from a few unguided responses: the acceptance asked for, within what the policy reaches."""

import math
import random

import pytest
import torch

from stars_fast import StarsConfig, StarsEngine
from stars_fast.inputs.arguments import Arguments
from stars_fast.inputs.job import Job
from stars_fast.loop.pilot import Pilot, expected_acceptance, quantile, rank_correlation, solve, spread

CONFIG = StarsConfig(segment_length=4, max_new_tokens=16)


def pilot_of(rng, responses=16, segments=4, step=1.0):
    """Random walks of rewards, as partial rewards of a growing answer."""
    runs = []
    for _ in range(responses):
        reward, run = 0.0, []
        for k in range(segments):
            reward += rng.gauss(0, step)
            run.append((4 * (k + 1), reward))
        runs.append(run)
    return Pilot(runs)


@pytest.mark.parametrize("acceptance", [0.05, 0.2, 0.3, 0.6])
def test_the_target_gives_the_acceptance_asked_for(acceptance):
    for seed in range(20):
        pilot = pilot_of(random.Random(seed))
        solve(pilot, CONFIG, acceptance)
        cap = quantile(pilot.finals, 0.9)
        assert pilot.target <= cap + 1e-9
        if pilot.target < cap - 1e-6:
            assert expected_acceptance(pilot, CONFIG) == pytest.approx(acceptance, abs=1e-3)
        else:
            assert expected_acceptance(pilot, CONFIG) >= acceptance - 1e-3


def test_the_target_is_capped_at_what_the_policy_reaches():
    pilot = pilot_of(random.Random(0))
    solve(pilot, CONFIG, 1e-6)
    assert pilot.target == pytest.approx(quantile(pilot.finals, 0.9))
    assert min(pilot.finals) < pilot.target < max(pilot.finals)


def test_beta_is_the_configs_times_the_spread():
    pilot = pilot_of(random.Random(0))
    solve(pilot, CONFIG, 0.3)
    assert pilot.beta == pytest.approx(CONFIG.beta * spread(pilot))
    assert spread(pilot) == pytest.approx(torch.tensor(pilot.finals).std(correction=0).item(), rel=1e-5)


def test_rank_correlation_is_spearmans():
    assert rank_correlation([(1, 10), (2, 20), (3, 90)]) == pytest.approx(1)
    assert rank_correlation([(1, 3), (2, 2), (3, 1)]) == pytest.approx(-1)
    assert rank_correlation([(1, 1), (2, 3), (3, 2), (4, 4)]) == pytest.approx(0.8)
    assert math.isnan(rank_correlation([(1, 1), (1, 2)]))


def test_a_calibrated_prompt_is_answered_before_others_are_begun(policy32, reward32, tokenizer32):
    engine = StarsEngine(policy32, reward32, tokenizer=tokenizer32, max_rows=8)  # the pilots of one prompt
    job = Job(engine.prepare(Arguments([[3], [4], [5], [6]], CONFIG, seed=0)), None)
    found_when = [sum(pilot is not None for pilot in job.pilots) for event in engine.events(job) if event.finish_reason]
    assert found_when[0] < 4, "the first answer is whole while other prompts have no target"
    alone = StarsEngine(policy32, reward32, tokenizer=tokenizer32).generate([[3], [4], [5], [6]], CONFIG, seed=0)
    assert engine.output(job).completions == alone.completions

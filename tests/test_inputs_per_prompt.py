"""Targets that were calibrated for other prompts are named, once."""

import warnings

import pytest
from conftest import sum_reward, tiny_policy

from stars_fast import StarsConfig, StarsEngine, calibrate

PROMPTS, OTHERS = [[5, 6, 7], [8]], [[5, 6, 7], [9]]
CONFIG = StarsConfig(segment_length=4, max_attempts=3, max_new_tokens=8)
MADE_FOR_OTHERS = r"prompts\[{}\] is not the one.*target_reward=None"


@pytest.fixture
def engine():
    return StarsEngine(tiny_policy(32, hidden=32), sum_reward)


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_a_calibrated_config_serves_its_own_prompts_in_silence(engine, quiet, tmp_path):
    calibration = calibrate(engine, PROMPTS, config=CONFIG, seed=0)
    calibration.save_pretrained(tmp_path)
    for config in (calibration.config, calibration.config.replace(top_k=4), StarsConfig.from_pretrained(tmp_path)):
        engine.generate(PROMPTS, config, seed=0)


@pytest.mark.parametrize("first, second, place", [(PROMPTS, OTHERS, 1), (PROMPTS[:1], OTHERS[1:], 0)])
def test_other_prompts_under_calibrated_targets_alone_are_named_once(engine, tmp_path, first, second, place):
    calibrate(engine, first, config=CONFIG, seed=0).save_pretrained(tmp_path)
    config = StarsConfig.from_pretrained(tmp_path).replace(fit=None)
    with pytest.warns(UserWarning, match=MADE_FOR_OTHERS.format(place)):
        engine.generate(second, config, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.generate(second, config, seed=0)
        engine.generate(second, calibrate(engine, first, config=CONFIG, seed=1).config.replace(fit=None), seed=0)


def test_other_prompts_under_a_calibrated_config_are_served_by_its_fit(engine, quiet):
    config = calibrate(engine, PROMPTS, config=CONFIG, seed=0).config
    alone = engine.generate([OTHERS[1]], config, seed=[5])
    assert engine.generate(OTHERS, config, seed=[4, 5]).completions[1] == alone.completions[0]
    assert all(segment.threshold == 1.0 for segment in alone.segments[0]), "a quantile"


def test_lists_of_ones_own_go_with_any_prompts(engine, quiet):
    for prompts in (PROMPTS, PROMPTS[::-1], OTHERS):
        engine.generate(prompts, CONFIG, seed=0, target_reward=[0.1, 0.2])


def test_one_number_for_all_goes_with_any_prompts(engine, quiet):
    for target in (0.1, [0.1, 0.1]):
        for prompts in (PROMPTS, OTHERS):
            engine.generate(prompts, CONFIG, seed=0, target_reward=target)

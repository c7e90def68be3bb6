"""Targets that were calibrated for other prompts are named, once."""

import warnings

import pytest
from conftest import sum_reward, tiny_policy

from stars_fast import StarsConfig, StarsEngine, calibrate
from stars_fast.inputs.per_prompt import fingerprints

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


def thresholds(out):
    return [[segment.threshold for segment in row] for row in out.segments]


def test_a_prompts_rule_and_text_do_not_depend_on_those_beside_it(engine, quiet, tmp_path):
    """Not on their number, order or newness, nor on the process: another engine knows as much."""
    calibrate(engine, PROMPTS, config=CONFIG.replace(base_reward=[0.1, -0.2]), seed=0).save_pretrained(tmp_path)
    config, [first, second], new = StarsConfig.from_pretrained(tmp_path), PROMPTS, OTHERS[1]
    one = StarsEngine(tiny_policy(32, hidden=32), sum_reward)
    together = one.generate([first, second], config, seed=[1, 2])
    alone = one.generate([new], config, seed=[3])
    assert {t for row in thresholds(alone) for t in row} == {1.0} and 1.0 not in thresholds(together)[0]
    for places in ([0], [1, 0], [0, 0], [2, 0], [1, 2], [2, 0, 1], [2, 2]):
        out = one.generate([[first, second, new][i] for i in places], config, seed=[i + 1 for i in places])
        wanted = [(together if i < 2 else alone, i % 2) for i in places]
        assert out.completions == [of.completions[i] for of, i in wanted]
        assert thresholds(out) == [thresholds(of)[i] for of, i in wanted]


def test_a_prompt_that_was_calibrated_twice_has_both_of_its_targets(engine, quiet):
    config = calibrate(engine, [[8], [8]], config=CONFIG, seed=[1, 2]).config
    assert config.target_reward[0] != config.target_reward[1]
    out, own = (engine.generate([[8], [8]], one, seed=0) for one in (config, config.replace(fit=None)))
    assert thresholds(out) == thresholds(own)


def test_prompts_have_the_same_fingerprints_in_every_process_and_version():
    assert fingerprints(PROMPTS) == ["40a453a7c6b66b75", "e95ecc9ecab953fa"]


def test_targets_of_ones_own_are_never_dropped_for_a_fit(engine, quiet):
    config = calibrate(engine, PROMPTS, config=CONFIG, seed=0).config
    with pytest.raises(ValueError, match="target_reward has 2 entries for 3 prompts"):
        engine.generate([*PROMPTS, [9]], config.replace(target_reward=[0.1, 0.2], base_reward=None), seed=0)
    out = engine.generate(OTHERS, config.replace(target_reward=[0.1, 0.2], base_reward=0.0), seed=0)
    assert all(1.0 not in row for row in thresholds(out))


def test_lists_of_ones_own_go_with_any_prompts(engine, quiet):
    for prompts in (PROMPTS, PROMPTS[::-1], OTHERS):
        engine.generate(prompts, CONFIG, seed=0, target_reward=[0.1, 0.2])


def test_one_number_for_all_goes_with_any_prompts(engine, quiet):
    for target in (0.1, [0.1, 0.1]):
        for prompts in (PROMPTS, OTHERS):
            engine.generate(prompts, CONFIG, seed=0, target_reward=target)

"""Targets and beta come from pilots that depend on nothing but the prompt, and do what the report says."""

import math
import warnings

import pytest
from conftest import sum_reward, tiny_policy, tiny_reward

from stars_fast import StarsConfig, StarsEngine, calibrate
from stars_fast.loop.pilot import PILOT_SAMPLES
from stars_fast.methods.stars import base_reward
from stars_fast.ops.philox import Domain, philox_key
from stars_fast.policy.policy import Policy

VOCAB, EOS = 32, 31
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15], [16], [17, 18]]
SEEDS = [11, 12, 13, 14, 15, 16]
CONFIG = StarsConfig(segment_length=4, max_attempts=20, max_new_tokens=16)


def engine(scale=1.0, reward=None):
    return StarsEngine(tiny_policy(VOCAB, hidden=32), reward or tiny_reward(VOCAB, hidden=32, scale=scale))


def thresholds(out):
    return [[segment.threshold for segment in row] for row in out.segments]


def test_a_calibrated_target_does_not_depend_on_the_neighbours():
    together = engine().generate(PROMPTS, CONFIG, seed=SEEDS)
    for i in (0, 3):
        alone = engine().generate(PROMPTS[i : i + 1], CONFIG, seed=SEEDS[i : i + 1])
        assert alone.completions == together.completions[i : i + 1]
        assert thresholds(alone)[0] == pytest.approx(thresholds(together)[i], abs=1e-4)


def test_a_calibrated_target_does_not_depend_on_the_number_of_samples():
    one = engine().generate(PROMPTS[:2], CONFIG, seed=SEEDS[:2])
    three = engine().generate(PROMPTS[:2], CONFIG, seed=SEEDS[:2], num_return_sequences=3)
    assert [three.completions[0], three.completions[3]] == one.completions


def test_a_base_reward_that_is_given_is_the_one_that_is_used():
    """r0 is alpha of it and the rest of the target; the first threshold says which."""
    given = CONFIG.replace(base_reward=[-3.0, 0.5])
    found = calibrate(engine(), PROMPTS[:2], config=given, seed=SEEDS[:2]).config
    assert found.base_reward == given.base_reward
    out = engine().generate(PROMPTS[:2], given, seed=SEEDS[:2])
    assert thresholds(out) == thresholds(engine().generate(PROMPTS[:2], found, seed=SEEDS[:2]))
    for row, base, target in zip(thresholds(out), found.base_reward, found.target_reward, strict=True):
        r0 = base_reward(base, target, CONFIG.alpha)
        assert row[0] == pytest.approx(r0 + 4 / 16 * (target - r0), abs=1e-4)


def test_pilots_never_reuse_the_randomness_of_candidates(monkeypatch):
    """No random number may decide both the target and the text that is tested against it."""
    keys = []
    propose = Policy.propose

    def watch(self, leaves):
        keys.extend(leaf.key for leaf in leaves)
        return propose(self, leaves)

    monkeypatch.setattr(Policy, "propose", watch)
    engine().generate(PROMPTS[:2], CONFIG, seed=7, num_return_sequences=3)
    candidates = {philox_key(7, i, j) for i in range(2) for j in range(3)}
    of_pilots = [(philox_key(7, i, 0), j) for i in range(2) for j in range(PILOT_SAMPLES)]
    pilots = {philox_key(key, 0, j, domain=Domain.PILOT) for key, j in of_pilots}
    assert set(keys) == candidates | pilots and not candidates & pilots
    assert len(pilots) == 2 * PILOT_SAMPLES


@pytest.mark.parametrize("scale", [128.0, 2.0**-10])
def test_scaling_the_reward_does_not_change_the_text(scale):
    """beta is in units of the pilots' spread, so a reward model's arbitrary scale means nothing."""
    ours, theirs = (engine(s).generate(PROMPTS, CONFIG, seed=SEEDS) for s in (1.0, scale))
    assert ours.completions == theirs.completions
    assert theirs.rewards == pytest.approx([scale * reward for reward in ours.rewards], rel=1e-3)


def test_shifting_the_reward_of_a_prompt_does_not_change_its_text():
    """A Bradley-Terry reward is defined up to a constant per prompt."""

    def shifted(by):
        return lambda prompts, completions: [
            value + by * sum(prompt) for value, prompt in zip(sum_reward(completions), prompts, strict=True)
        ]

    ours, theirs = (engine(reward=shifted(by)).generate(PROMPTS, CONFIG, seed=SEEDS) for by in (0.0, 8.0))
    assert ours.completions == theirs.completions


def test_a_constant_reward_is_calibrated_all_the_same_and_warned_of(tokenizer32):
    def constant(prompts, completions):
        return [float(len(prompt)) for prompt in prompts]  # another constant for each prompt guides no better

    with pytest.warns(UserWarning, match=r"same for all pilot responses: nothing is guided.*give tokenizer= for text"):
        out = engine(reward=constant).generate(PROMPTS, CONFIG, seed=0)
    assert out.errors == [None] * 6
    assert all(segment.accepted for row in out.segments for segment in row)
    of_text = StarsEngine(tiny_policy(VOCAB, hidden=32), constant, tokenizer=tokenizer32)
    with pytest.warns(UserWarning, match=r"same for all pilot responses: nothing is guided while it does not vary$"):
        of_text.generate(PROMPTS, CONFIG, seed=0)


def test_a_reward_that_varies_for_one_prompt_is_not_warned_of():
    def reward(prompts, completions):
        return [value * (prompt == [8]) for prompt, value in zip(prompts, sum_reward(completions), strict=True)]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*were drawn to find a target")
        engine(reward=reward).generate(PROMPTS, CONFIG, seed=0)


# calibrate


@pytest.fixture(scope="module")
def counted():
    """A reward that grows with every low id, so that partial rewards predict final ones."""
    return engine(reward=lambda completions: [sum(1 if t < 12 else -1 for t in c) / 4 for c in completions])


def test_expected_acceptance_is_close_to_the_measured_one(counted):
    config = CONFIG.replace(ignore_eos=True)
    found = calibrate(counted, PROMPTS, acceptance=0.7, config=config, samples=48, seed=1)
    report = found.report()
    out = counted.generate(PROMPTS, found.config, seed=2, num_return_sequences=24)
    segments = [segment for row in out.segments for segment in row]
    measured = sum(segment.accepted for segment in segments) / sum(segment.attempts for segment in segments)
    assert report["acceptance"] == pytest.approx(0.7, abs=0.02)
    assert measured == pytest.approx(report["acceptance"], abs=0.05)
    rewards = sum(out.rewards) / len(out.rewards)
    assert rewards == pytest.approx(report["expected_reward"], abs=0.25)
    assert rewards > report["unguided_reward"] + 0.3


def test_the_report_has_its_keys_and_prints_as_text(counted):
    report = calibrate(counted, PROMPTS[:3], config=CONFIG, seed=0).report()
    keys = {
        "acceptance",
        "acceptance_by_position",
        "fallback_share",
        "expected_reward",
        "unguided_reward",
        "rank_correlation",
        "warnings",
    }
    assert set(report) == keys
    assert all(0 <= a <= 1 for a in report["acceptance_by_position"]) and 0 <= report["fallback_share"] <= 1
    assert report["warnings"] == []
    assert f"{report['acceptance']:.2f}" in str(report) and "warning" not in str(report)


def test_a_calibration_shows_itself_in_a_line_and_is_no_config(counted):
    found = calibrate(counted, PROMPTS[:3], config=CONFIG, seed=0)
    assert repr(found).startswith("Calibration(3 prompts, method='stars'") and len(repr(found)) < 120
    with pytest.raises(TypeError, match=r"config is a Calibration: give a StarsConfig, its \.config"):
        counted.generate(PROMPTS[:3], found)


def test_a_reward_that_cannot_guide_partial_text_is_warned_of():
    """Its value jumps with the parity of the text's sum: the past says nothing about the end."""
    parity = engine(reward=lambda completions: [float(hash(tuple(c)) % 1000) for c in completions])
    report = calibrate(parity, PROMPTS, config=CONFIG, samples=16, seed=0).report()
    assert abs(report["rank_correlation"]) < 0.3
    (warning,) = report["warnings"]
    assert "best-of-N" in warning and warning in str(report)


def test_a_calibration_serves_its_prompts_and_comes_back_from_disk(tmp_path, counted):
    found = calibrate(counted, PROMPTS, acceptance=0.25, config=CONFIG, seed=0)
    assert len(found.config.target_reward) == len(found.config.base_reward) == len(PROMPTS)
    found.save_pretrained(tmp_path)
    again = StarsConfig.from_pretrained(tmp_path)
    assert again == found.config
    assert (
        counted.generate(PROMPTS, again, seed=3).completions
        == counted.generate(PROMPTS, found.config, seed=3).completions
    )
    with pytest.raises(ValueError, match=r"target_reward has 6 entries for 1 prompts: calibrated for other prompts\?"):
        counted.generate(PROMPTS[:1], again.replace(fit=None))


def test_a_calibration_serves_new_prompts_at_its_acceptance_without_pilots(tmp_path, counted):
    config = CONFIG.replace(ignore_eos=True)
    calibrate(counted, PROMPTS, acceptance=0.4, config=config, samples=32, seed=1).save_pretrained(tmp_path)
    again = StarsConfig.from_pretrained(tmp_path)
    new = [[20, i] for i in range(20)]
    out = counted.generate(new, again, seed=2, num_return_sequences=4)
    segments = [segment for row in out.segments for segment in row]
    assert out.stats["calibration_tokens"] == 0
    assert len(segments) / sum(segment.attempts for segment in segments) == pytest.approx(0.4, abs=0.08)
    free = counted.generate(new, again, seed=2, num_return_sequences=4, target_reward=-math.inf, base_reward=None)
    assert sum(out.rewards) > sum(free.rewards) + 8
    with pytest.raises(ValueError, match="method='optimal_stopping' needs one of"):
        counted.generate(new, again, method="optimal_stopping")


def test_calibrated_rewards_beat_unguided_ones(counted):
    guided = counted.generate(PROMPTS, CONFIG, seed=0, num_return_sequences=8)
    free = counted.generate(PROMPTS, CONFIG, seed=0, num_return_sequences=8, target_reward=-math.inf)
    assert sum(guided.rewards) > sum(free.rewards) + 8


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"acceptance": 0.0}, "acceptance=0.0"),
        ({"acceptance": 1.5}, "acceptance=1.5"),
        ({"acceptance": "x"}, "acceptance='x'"),
        ({"samples": 1}, "samples=1"),
        ({"samples": 2.5}, "samples=2.5"),
    ],
)
def test_settings_out_of_range_are_refused(counted, kwargs, message):
    with pytest.raises((ValueError, TypeError), match=message):
        calibrate(counted, PROMPTS, config=CONFIG, **kwargs)


def test_a_pilot_that_fails_is_named():
    def reward(prompts, completions):
        return [
            None if prompt == [8] else value for prompt, value in zip(prompts, sum_reward(completions), strict=True)
        ]

    broken = engine(reward=reward)
    with pytest.raises(RuntimeError, match=r"prompts\[1\]: calibration: .*None"):
        calibrate(broken, PROMPTS, config=CONFIG)
    out = broken.generate(PROMPTS, CONFIG, seed=0)
    assert [error is None for error in out.errors] == [True, False, True, True, True, True]
    assert "calibration" in out.errors[1]


def test_pilots_are_counted_as_discarded_tokens(counted):
    stats = counted.generate(PROMPTS, CONFIG, seed=0).stats
    assert stats["policy_tokens"] == stats["committed_tokens"] + stats["discarded_tokens"]
    assert stats["discarded_tokens"] > 6 * 8 * 4

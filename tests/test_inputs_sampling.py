"""Which sampling settings hold: the call's, the config's, the model's own; and which tokens end an answer."""

import math

import pytest
import torch
from conftest import refused, tiny_policy
from test_inputs_arguments import PROMPTS, VOCAB

import stars_fast
from stars_fast import StarsConfig, StarsEngine


@pytest.fixture(scope="module")
def engine(policy32, reward32):
    return StarsEngine(policy32, reward32)


EOS = VOCAB - 1
CONFIG = StarsConfig(segment_length=4, max_attempts=5, target_reward=1.5, beta=0.6, max_new_tokens=14)


def test_sampling_fields_left_out_come_from_the_models_own_generation_config(reward32):
    policy = tiny_policy(VOCAB, hidden=32)
    engine = StarsEngine(policy, reward32)
    explicit = engine.generate(PROMPTS, CONFIG, seed=1, temperature=0.5, top_k=4).completions
    plain = engine.generate(PROMPTS, CONFIG, seed=1).completions
    policy.generation_config.temperature, policy.generation_config.top_k = 0.5, 4
    assert engine.generate(PROMPTS, CONFIG, seed=1).completions == explicit != plain
    assert engine.generate(PROMPTS, CONFIG, seed=1, temperature=1.0, top_k=VOCAB).completions == plain
    assert engine.generate(PROMPTS, CONFIG.replace(temperature=1.0, top_k=0), seed=1).completions == plain


def test_an_eos_in_the_generation_config_is_the_models(reward32):
    policy = tiny_policy(VOCAB, hidden=32)
    policy.generation_config.eos_token_id = [3, EOS]
    out = StarsEngine(policy, reward32).generate(PROMPTS * 8, CONFIG, seed=1)
    assert last_tokens(out, "stop") == {3, EOS}


@pytest.mark.parametrize("eos, ends", [(-1, set()), (VOCAB, set()), ([-1, 3, 99], {3})], ids=str)
@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
def test_an_eos_of_the_models_that_no_token_is_ends_no_text(reward32, eos, ends):
    """As in transformers: some configurations say -1 for none, or know ids of a larger vocabulary."""
    policy = tiny_policy(VOCAB, hidden=32)
    policy.generation_config.eos_token_id = eos
    out = StarsEngine(policy, reward32).generate(PROMPTS * 8, CONFIG, seed=1)
    assert last_tokens(out, "stop") == ends
    assert -1 not in out.sequences
    policy.generation_config.pad_token_id = 0
    ids = torch.tensor([[5, 6, 7]] * 16)
    for how in (
        stars_fast.generate(policy, ids, reward_model=reward32, stars_config=CONFIG, seed=1),
        policy.generate(ids, do_sample=True, custom_generate=stars_fast.decoding(reward32, CONFIG, seed=1)),
    ):
        rows = [row[3:] for row in how.tolist()]
        assert all(set(row[row.index(3) + 1 :]) <= {0} for row in rows if 3 in row) or not ends
        assert any(len(row) == CONFIG.max_new_tokens for row in rows)


def test_eos_token_id_may_be_several_and_replaces_the_models(engine):
    out = engine.generate(PROMPTS * 8, CONFIG, seed=1, eos_token_id=[3, 4])
    assert last_tokens(out, "stop") == {3, 4}
    assert not any({3, 4} & set(c[:-1]) for c in out.completions)
    assert any(EOS in c for c in out.completions)


def test_ignore_eos_goes_on_to_the_limit(engine):
    out = engine.generate(PROMPTS * 8, CONFIG, seed=1, ignore_eos=True)
    assert {len(c) for c in out.completions} == {CONFIG.max_new_tokens}
    assert set(out.finish_reasons) == {"length"}
    assert any(EOS in c for c in out.completions)


def last_tokens(out, finish_reason):
    return {c[-1] for c, reason in zip(out.completions, out.finish_reasons, strict=True) if reason == finish_reason}


def test_eos_ids_of_the_model_count_once_and_within_its_vocabulary(reward32):
    policy = tiny_policy(VOCAB, hidden=32)
    engine = StarsEngine(policy, reward32)
    want = engine.generate(PROMPTS, CONFIG, seed=1, eos_token_id=[3]).completions
    policy.generation_config.eos_token_id = [3, 2**70, -1, VOCAB] * 100_000
    assert engine.generate(PROMPTS, CONFIG, seed=1).completions == want
    policy.generation_config.eos_token_id = "</s>"
    with refused("generation_config", "eos_token_id=.*/s", "integer"):
        engine.generate(PROMPTS, CONFIG)


def test_a_top_k_beyond_the_vocabulary_has_no_effect_however_large(reward32):
    policy = tiny_policy(VOCAB, hidden=32)
    engine = StarsEngine(policy, reward32)
    plain = engine.generate(PROMPTS, CONFIG, seed=1).completions
    assert engine.generate(PROMPTS, CONFIG, seed=1, top_k=2**40).completions == plain
    policy.generation_config.top_k = 2**31
    assert engine.generate(PROMPTS, CONFIG, seed=1).completions == plain


def test_the_largest_temperature_is_uniform(engine):
    out = engine.generate(PROMPTS, CONFIG, seed=1, temperature=1e30)
    assert out.errors == [None] * 4
    assert all(abs(value + math.log(VOCAB)) < 1e-5 for row in out.sampling_logprobs for value in row)


@pytest.mark.parametrize("name, value", [("temperature", 0.0), ("top_k", -1), ("top_p", 1.5)])
def test_the_models_own_settings_are_checked_too(monkeypatch, idle, policy32, name, value):
    monkeypatch.setattr(policy32.generation_config, name, value)
    with refused("generation_config", name, str(value)):
        idle.generate(PROMPTS, CONFIG.replace(**{name: None}))


def test_an_eos_outside_the_vocabulary_is_refused(idle):
    with refused("eos_token_id", "99", "32"):
        idle.generate(PROMPTS, CONFIG, eos_token_id=99)

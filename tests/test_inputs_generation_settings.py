"""Every field of a model's generation_config is applied, named in a warning, or one that no answer depends on."""

import math
import warnings

import pytest
import torch
from conftest import sum_reward, tiny_policy
from test_dropin import PAD, PROMPTS, VOCAB, both, completions, facade
from test_inputs_hooks import assert_sampled_from, made_by_transformers
from transformers import GenerationConfig
from transformers.generation import SynthIDTextWatermarkingConfig, WatermarkingConfig

from stars_fast import StarsConfig, StarsEngine
from stars_fast.inputs import generation_settings
from stars_fast.inputs.generation_settings import APPLIED, HARMLESS, NAMED, PROCESSED
from stars_fast.policy.policy import Policy

pytestmark = pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
EOS = VOCAB - 1
CONFIG = StarsConfig(segment_length=4, max_attempts=3, target_reward=1.0, beta=0.6, max_new_tokens=10)


def policy_with(**settings):
    policy = tiny_policy(VOCAB, hidden=32)
    policy.generation_config.pad_token_id = PAD
    for name, value in settings.items():
        setattr(policy.generation_config, name, value)
    return policy


def test_it_is_known_of_every_field_of_transformers_what_becomes_of_it():
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert fields <= APPLIED | PROCESSED | NAMED.keys() | HARMLESS
    assert sum(map(len, (APPLIED, PROCESSED, NAMED, HARMLESS))) == len(APPLIED | PROCESSED | NAMED.keys() | HARMLESS)


@pytest.mark.parametrize(
    "settings",
    [
        {"suppress_tokens": [4, 5]},
        {"begin_suppress_tokens": [4, 5, 6], "temperature": 0.7, "top_k": 6},
        {"bad_words_ids": [[4], [6, 7]], "repetition_penalty": 1.4, "top_p": 0.8},
        {"min_new_tokens": 8},
        {"min_length": 9, "min_p": 0.1},
        {"no_repeat_ngram_size": 2, "top_k": 5},
        {"encoder_no_repeat_ngram_size": 1},
        {"encoder_repetition_penalty": 1.5},
        {"typical_p": 0.6, "temperature": 0.8},
        {"top_h": 0.4},
        {"epsilon_cutoff": 0.05, "suppress_tokens": [1]},
        {"eta_cutoff": 0.05},
        {"sequence_bias": [[[7], 2.0]]},
        {"exponential_decay_length_penalty": (2, 1.5)},
        {"forced_bos_token_id": 9},
        {"forced_eos_token_id": EOS, "repetition_penalty": 1.3},
        {"remove_invalid_values": True},
        {"renormalize_logits": True, "suppress_tokens": [3]},
        {"watermarking_config": WatermarkingConfig(bias=2.0)},
    ],
    ids=lambda settings: " and ".join(settings),
)
def test_settings_of_the_models_own_are_those_of_transformers_own_processors(settings):
    policy = policy_with(**settings)
    out = StarsEngine(policy, sum_reward).generate(PROMPTS, CONFIG, seed=0, on_error="raise")
    neutral = {name: value for name, value in {"top_k": 0}.items() if name not in settings}
    made = {len(ids): made_by_transformers(policy, ids, max_new_tokens=10, **neutral)(len(ids)) for ids in PROMPTS}
    assert len(made) == len(PROMPTS)
    assert_sampled_from(policy, out, made.__getitem__)


@pytest.mark.parametrize(
    "settings", [{"encoder_no_repeat_ngram_size": 1}, {"encoder_repetition_penalty": 1.5}], ids=str
)
def test_a_row_of_a_batch_is_compared_with_its_own_prompt(settings):
    """Two samples of each prompt share it."""
    prompts = [[5, 6, 7], [8, 9, 10]]
    policy = policy_with()
    batch = facade(policy, prompts=prompts, seed=[1, 2], num_return_sequences=2, **settings)
    for i, prompt in enumerate(prompts):
        alone = facade(policy, prompts=[prompt], seed=[i + 1], num_return_sequences=2, **settings)
        assert completions(batch, 3)[2 * i : 2 * i + 2] == completions(alone, 3)


def test_a_method_sees_the_models_settings_too():
    out = StarsEngine(policy_with(suppress_tokens=[4, 5]), sum_reward).generate(
        PROMPTS * 8, CONFIG, seed=0, method="cards", on_error="raise"
    )
    assert not {4, 5} & {token for completion in out.completions for token in completion}


def leaves(monkeypatch, policy):
    seen = []
    propose = Policy.propose
    monkeypatch.setattr(Policy, "propose", lambda *args: seen.extend(args[1]) or propose(*args))
    StarsEngine(policy, sum_reward).generate(PROMPTS, CONFIG, seed=0)
    return seen


def test_nothing_runs_row_by_row_where_the_model_sets_nothing_of_that(monkeypatch):
    settings = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.2, "no_repeat_ngram_size": 0}
    policy = policy_with(typical_p=1.0, encoder_repetition_penalty=1.0, min_length=0, **settings)
    assert all(leaf.processor is None and leaf.sampling.top_k == 5 for leaf in leaves(monkeypatch, policy))


def test_filters_stay_in_the_decode_step_where_ids_are_only_forbidden(monkeypatch):
    policy = policy_with(suppress_tokens=[4], min_new_tokens=3, top_k=5)
    assert all(leaf.processor is not None and leaf.sampling.top_k == 5 for leaf in leaves(monkeypatch, policy))


SYNTHID = SynthIDTextWatermarkingConfig(ngram_len=2, keys=[1, 2])


@pytest.mark.parametrize(
    "name, value",
    [("guidance_scale", 1.5), ("num_beams", 3), ("dola_layers", "low"), ("watermarking_config", SYNTHID)],
    ids=["guidance_scale", "num_beams", "dola_layers", "synthid"],
)
def test_what_is_not_applied_is_named_once(name, value):
    policy = policy_with(**{name: value})
    with pytest.warns(UserWarning, match=rf"sets {name}=.*does not apply") as said:
        out = StarsEngine(policy, sum_reward).generate(PROMPTS, CONFIG, seed=0)
    assert len(said) == 1
    assert out.completions == StarsEngine(policy_with(), sum_reward).generate(PROMPTS, CONFIG, seed=0).completions


@pytest.mark.parametrize("name, value", [("guidance_scale", 1.5), ("num_beams", 3), ("dola_layers", "low")])
@both
def test_a_transformers_call_with_them_is_refused(generate, name, value):
    with pytest.raises(ValueError, match=name):
        generate(policy_with(**{name: value}))


def test_a_field_that_a_newer_transformers_has_is_named(monkeypatch):
    monkeypatch.setattr(generation_settings, "PROCESSED", PROCESSED - {"top_h"})
    policy = policy_with(top_h=0.5)
    for run in (
        lambda: facade(policy, seed=0),
        lambda: StarsEngine(policy, sum_reward).generate(PROMPTS, CONFIG, seed=0),
    ):
        with pytest.warns(UserWarning, match=r"top_h=0\.5, which guidance does not apply"):
            run()


def test_fields_that_no_answer_depends_on_are_not_spoken_of():
    settings = {"use_cache": False, "cache_implementation": "static", "bos_token_id": 1, "max_length": 20, "foo": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        StarsEngine(policy_with(**settings), sum_reward).generate(PROMPTS, CONFIG, seed=0)


def test_a_setting_that_transformers_refuses_is_refused_before_work_starts():
    with pytest.raises(ValueError, match=r"generation_config: .*top_h"):
        StarsEngine(policy_with(top_h=7.0), sum_reward).generate(PROMPTS, CONFIG)


def test_max_time_ends_answers():
    policy = policy_with(max_time=1e-9)
    out = StarsEngine(policy, sum_reward).generate(PROMPTS, CONFIG, seed=0, target_reward=-math.inf)
    assert [len(completion) for completion in out.completions] == [1] * len(PROMPTS)
    policy.generation_config.max_time = 1e9
    out = StarsEngine(policy, sum_reward).generate(PROMPTS, CONFIG, seed=0, ignore_eos=True)
    assert {len(completion) for completion in out.completions} == {CONFIG.max_new_tokens}


def test_an_end_that_is_ignored_needs_no_penalty():
    policy = policy_with(exponential_decay_length_penalty=(1, 1.5), min_new_tokens=3)
    out = StarsEngine(policy, sum_reward).generate(PROMPTS, CONFIG, seed=0, ignore_eos=True, on_error="raise")
    assert {len(completion) for completion in out.completions} == {CONFIG.max_new_tokens}


def test_an_engine_call_may_bring_a_generation_config_of_its_own(monkeypatch):
    from stars_fast.inputs.arguments import Arguments

    policy = policy_with(suppress_tokens=[4], top_k=3)
    own = GenerationConfig(suppress_tokens=[5], eos_token_id=EOS)
    out = StarsEngine(policy, sum_reward).run(Arguments(PROMPTS * 8, CONFIG, seed=0, generation_config=own))
    drawn = {token for completion in out.completions for token in completion}
    assert 4 in drawn and 5 not in drawn
    assert torch.is_tensor(out.sequences)

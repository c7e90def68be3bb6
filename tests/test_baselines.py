"""What the engine's speed is compared with does the same: both baselines sample the enumerated law."""

import baselines
import pytest
import torch
from conftest import tiny_policy, tiny_reward
from oracle import attempts, p_value, text
from test_law import EOS, PROMPTS, RULE, VOCAB, oracle

from stars_fast import StarsConfig

SAMPLES = 400
CONFIG = StarsConfig(**RULE.stars_config())


@pytest.fixture(scope="module")
def models():
    return tiny_policy(VOCAB, seed=3), tiny_reward(VOCAB, seed=2)


def one_at_a_time(policy, reward, prompts, config, eos):
    return [baselines.plain(policy, reward, prompt, config, eos) for prompt in prompts]


def p_values(models, prompts, run, samples, config=CONFIG, **sampling):
    """Of the law of the text, and of that of attempts and acceptance."""
    torch.manual_seed(0)
    texts = run(*models, [prompt for prompt in prompts for _ in range(samples)], config, {EOS})
    exact = {i: oracle(models[0], prompt, classifier=models[1], **sampling) for i, prompt in enumerate(prompts)}
    for one in texts:
        assert one.tokens == [token for segment in one.history for token in segment.tokens]
    runs = {
        i: [
            tuple((tuple(segment.tokens), segment.attempts, segment.accepted) for segment in one.history)
            for one in texts[i * samples :][:samples]
        ]
        for i in exact
    }
    return [
        p_value({i: [view(r) for r in runs[i]] for i in runs}, {i: exact[i].law(view) for i in runs})
        for view in (text, attempts)
    ]


def test_one_at_a_time_samples_the_enumerated_law(models):
    assert min(p_values(models, PROMPTS[-2:], one_at_a_time, SAMPLES)) > 1e-3


def test_a_batch_of_unequal_prompts_samples_the_enumerated_law(models):
    assert min(p_values(models, PROMPTS, baselines.strong, SAMPLES)) > 1e-3


def test_temperature_and_top_k_are_those_of_the_law(models):
    sampling = {"temperature": 0.7, "top_k": 3}
    config = CONFIG.replace(**sampling)
    for run, samples in ((one_at_a_time, SAMPLES // 2), (baselines.strong, SAMPLES)):
        assert min(p_values(models, PROMPTS[-1:], run, samples, config, **sampling)) > 1e-3


def test_a_wrong_rule_is_found(models, monkeypatch):
    monkeypatch.setattr(baselines, "acceptance_probability", lambda reward, tau, beta: float(reward >= tau))
    assert min(p_values(models, PROMPTS, baselines.strong, SAMPLES)) < 1e-6


def test_without_an_eos_texts_have_their_full_length(models):
    config = CONFIG.replace(ignore_eos=True)
    texts = baselines.strong(*models, PROMPTS, config, set())
    texts += one_at_a_time(*models, PROMPTS, config, set())
    assert [len(one.tokens) for one in texts] == [config.max_new_tokens] * 2 * len(PROMPTS)
    assert any(EOS in one.tokens for one in texts)


def test_padding_changes_no_reward(models):
    reward = models[1]
    together = baselines.score_batch(reward, PROMPTS)
    assert together == pytest.approx([baselines.score(reward, prompt) for prompt in PROMPTS], abs=1e-5)

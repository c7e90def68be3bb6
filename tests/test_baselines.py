"""What the engine's speed is compared with does what it says: each baseline samples its enumerated law."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import tiny_policy, tiny_reward
from oracle import Rule, attempts, p_value, text
from test_law import EOS, PROMPTS, RULE, VOCAB, oracle

from stars_fast import StarsConfig
from stars_fast.bench import baselines

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
    assert min(p_values(models, PROMPTS[-2:], one_at_a_time, 150)) > 1e-3


def test_a_batch_of_unequal_prompts_samples_the_enumerated_law(models):
    assert min(p_values(models, PROMPTS, baselines.strong, SAMPLES)) > 1e-3


def test_temperature_and_top_k_are_those_of_the_law(models):
    sampling = {"temperature": 0.7, "top_k": 3}
    config = CONFIG.replace(**sampling)
    for run, samples in ((one_at_a_time, SAMPLES // 2), (baselines.strong, SAMPLES)):
        assert min(p_values(models, PROMPTS[-1:], run, samples, config, **sampling)) > 1e-3


def test_the_best_of_n_texts_has_its_enumerated_law(models):
    """Best of N whole texts: one segment as long as the text, which nothing is good enough for, and N attempts."""
    n, prompts = 3, PROMPTS[-3:]
    whole = Rule(RULE.max_new_tokens, n, RULE.max_new_tokens, math.inf, RULE.alpha, RULE.beta, EOS)
    torch.manual_seed(0)
    repeated = [prompt for prompt in prompts for _ in range(SAMPLES)]
    texts = baselines.best_of_n(*models, repeated, CONFIG, {EOS}, n, rows=400)  # which n does not divide
    samples = {i: [tuple(one.tokens) for one in texts[i * SAMPLES :][:SAMPLES]] for i in range(len(prompts))}

    def p(rule):
        exact = {i: oracle(models[0], prompt, rule, models[1]) for i, prompt in enumerate(prompts)}
        return p_value(samples, {i: exact[i].law(text) for i in exact})

    assert p(whole) > 1e-3
    assert p(replace(whole, max_attempts=n + 1)) < 1e-3  # one more is told apart
    for one, prompt in zip(texts[:5], repeated, strict=False):
        assert one.reward == pytest.approx(baselines.score_batch(models[1], [prompt + one.tokens])[0], abs=1e-5)


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
    assert together == pytest.approx([baselines.score_batch(reward, [prompt])[0] for prompt in PROMPTS], abs=1e-5)


def test_the_empty_answer_is_scored_only_where_the_rule_asks_for_it(models, monkeypatch):
    scored = []
    score_batch = baselines.score_batch
    monkeypatch.setattr(baselines, "score_batch", lambda reward, rows: scored.extend(rows) or score_batch(reward, rows))
    for run in (one_at_a_time, baselines.strong):
        for alpha in (0.5, 1.0):
            scored.clear()
            run(*models, PROMPTS[-1:], CONFIG.replace(alpha=alpha), {EOS})
            assert (PROMPTS[-1] in scored) == (alpha < 1)

"""The text's law is the enumerated one, whatever is drawn side by side; so is the law of the trace."""

import math
from dataclasses import replace

import numpy as np
import pytest
from conftest import tiny_policy, tiny_reward
from oracle import (
    Oracle,
    Rule,
    attempts,
    classifier_rewards,
    completions,
    next_token_probabilities,
    p_value,
    text,
)

from stars_fast import StarsEngine

VOCAB, EOS = 4, 3
RULE = Rule(
    segment_length=2, max_attempts=4, max_new_tokens=5, target_reward=1.2, alpha=0.3, beta=0.6, eos=EOS
)  # two whole segments and a short one; about a fifth of the segments are fallbacks
PROMPT = [1, 2]  # its r(x) is low, so that the ramp is steep
PROMPTS = [[0], [1], [2], [0, 1], [1, 2, 0], [2, 2], [0, 0, 1], [2, 1, 1, 0, 2]]
SAMPLES = 2000
ROWS = 50_000  # enough for all candidates of all samples: with fewer, every sample would be drawn one at a time
FEW = 64  # texts at once where candidates="auto", which has no use for further candidates in a large batch


def wave(prompt, completion) -> float:
    """A reward without ties that depends on the prompt, the tokens and their order, and spreads over [-1.5, 1.5]."""
    return 1.5 * math.cos(sum(prompt) + sum((2 * place + 3) * (token + 1) for place, token in enumerate(completion)))


def wave_reward(prompts, completions, **_):
    return [wave(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


@pytest.fixture(scope="module")
def policy():
    return tiny_policy(VOCAB, seed=3)


@pytest.fixture(scope="module")
def classifier():
    return tiny_reward(VOCAB, seed=2)


def oracle(policy, prompt, rule=RULE, classifier=None, **sampling) -> Oracle:
    if classifier is None:
        reward = lambda completion: wave(prompt, completion)  # noqa: E731
    else:
        reward = classifier_rewards(classifier, prompt, completions(VOCAB, EOS, rule.max_new_tokens)).__getitem__
    return Oracle(next_token_probabilities(policy, prompt, rule, **sampling), reward, rule)


def run(policy, reward, prompts, samples, rule=RULE, at_once=None, **overrides):
    """``samples`` runs of each prompt: prompt index -> list of runs, each a tuple of (tokens, attempts, accepted).

    No more than ``at_once`` texts in a call.
    """
    drawn = []

    def counted(prompts, completions):
        drawn.append(len(completions))
        return reward(prompts, completions)

    engine = StarsEngine(policy, counted if reward is wave_reward else reward, max_rows=ROWS)
    runs, at_once = {i: [] for i in range(len(prompts))}, at_once // len(prompts) if at_once else samples
    for seed in range(samples // at_once):
        out = engine.generate(prompts, seed=seed, num_return_sequences=at_once, **rule.stars_config(), **overrides)
        for row, segments in enumerate(out.segments):
            runs[row // at_once].append(tuple((tuple(s.tokens), s.attempts, s.accepted) for s in segments))
            assert list(text(runs[row // at_once][-1])) == out.completions[row]
    if overrides["candidates"] != 1 and drawn:
        assert max(drawn) > 1.5 * at_once * len(prompts), "the candidates were not drawn side by side"
    return runs


def p_text(runs, oracles) -> float:
    return p_value({i: [text(r) for r in runs[i]] for i in runs}, {i: oracles[i].law(text) for i in runs})


def p_attempts(runs, oracles) -> float:
    return p_value({i: [attempts(r) for r in runs[i]] for i in runs}, {i: oracles[i].law(attempts) for i in runs})


@pytest.mark.parametrize("changed", [{}, {"finished_threshold": "ramp"}, {"segment_length": 3}], ids=str)
def test_the_enumeration_agrees_with_an_independent_sampler(policy, changed):
    rule = replace(RULE, **changed)
    exact, rng = oracle(policy, PROMPT, rule), np.random.default_rng(0)
    runs = {0: [exact.sample(rng) for _ in range(4 * SAMPLES)]}
    assert p_text(runs, {0: exact}) > 1e-3
    assert p_attempts(runs, {0: exact}) > 1e-3


@pytest.mark.parametrize(
    "candidates, at_once, finished_threshold",
    [(1, None, "target"), (3, None, "ramp"), (4, None, "target"), ("auto", FEW, "ramp")],
)
def test_text_and_attempts_follow_the_enumerated_law(policy, candidates, at_once, finished_threshold):
    rule = replace(RULE, finished_threshold=finished_threshold)
    runs = run(policy, wave_reward, [PROMPT], SAMPLES, rule, at_once, candidates=candidates)
    oracles = {0: oracle(policy, PROMPT, rule)}
    assert p_text(runs, oracles) > 1e-3
    assert p_attempts(runs, oracles) > 1e-3


def test_the_law_holds_under_a_scheduler_that_changes_its_mind_at_random(policy, fickle):
    runs, oracles = run(policy, wave_reward, [PROMPT], SAMPLES, candidates="auto"), {0: oracle(policy, PROMPT)}
    assert p_text(runs, oracles) > 1e-3
    assert p_attempts(runs, oracles) > 1e-3


@pytest.mark.parametrize("candidates, at_once", [(4, None), ("auto", FEW)])
def test_the_law_holds_for_each_of_eight_prompts_in_one_call(policy, candidates, at_once):
    runs = run(policy, wave_reward, PROMPTS, SAMPLES // 4, at_once=at_once, candidates=candidates)
    oracles = {i: oracle(policy, prompt) for i, prompt in enumerate(PROMPTS)}
    assert p_text(runs, oracles) > 1e-3
    assert p_attempts(runs, oracles) > 1e-3


@pytest.mark.parametrize("candidates, at_once", [(3, None), ("auto", FEW)])
def test_the_law_holds_with_a_classifier_as_reward(policy, classifier, candidates, at_once):
    runs = run(policy, classifier, PROMPTS, SAMPLES // 4, at_once=at_once, candidates=candidates)
    oracles = {i: oracle(policy, prompt, classifier=classifier) for i, prompt in enumerate(PROMPTS)}
    assert p_text(runs, oracles) > 1e-3
    assert p_attempts(runs, oracles) > 1e-3


@pytest.mark.parametrize("segment_length, max_attempts", [(1, 3), (3, 5), (5, 4), (8, 2)])
def test_the_law_holds_for_other_segment_lengths(policy, segment_length, max_attempts):
    rule = replace(RULE, segment_length=segment_length, max_attempts=max_attempts, max_new_tokens=4)
    runs, oracles = run(policy, wave_reward, [PROMPT], SAMPLES, rule, candidates=2), {0: oracle(policy, PROMPT, rule)}
    assert p_text(runs, oracles) > 1e-3
    assert p_attempts(runs, oracles) > 1e-3


@pytest.mark.parametrize("sampling", [{"temperature": 0.6}, {"top_k": 2}, {"temperature": 1.5, "top_k": 3}], ids=str)
def test_the_law_is_that_of_the_tempered_and_filtered_policy(policy, sampling):
    runs = run(policy, wave_reward, [PROMPT], SAMPLES, candidates=3, **sampling)
    assert p_text(runs, {0: oracle(policy, PROMPT, **sampling)}) > 1e-3


def test_the_law_holds_over_consecutive_seeds_of_a_list(policy):
    engine = StarsEngine(policy, wave_reward, max_rows=ROWS)
    out = engine.generate([PROMPT] * SAMPLES, seed=list(range(SAMPLES)), candidates=2, **RULE.stars_config())
    exact = oracle(policy, PROMPT)
    assert p_value({0: [tuple(c) for c in out.completions]}, {0: exact.law(text)}) > 1e-3


@pytest.mark.parametrize("target_reward", [-math.inf, math.inf])
def test_infinite_targets_are_plain_sampling_and_best_of_the_attempts(policy, target_reward):
    rule = replace(RULE, target_reward=target_reward)
    runs = run(policy, wave_reward, [PROMPT], SAMPLES, rule, candidates=3)
    assert {seen for r in runs[0] for seen in attempts(r)} == ({(1, True)} if target_reward < 0 else {(4, False)})
    assert p_text(runs, {0: oracle(policy, PROMPT, rule)}) > 1e-3


def test_equal_rewards_fall_back_to_the_lowest_attempt(policy):
    """Under a reward that rejects all alike, the first attempt wins: the text is the unguided one of the same seed."""
    engine = StarsEngine(policy, lambda completions: [0.0] * len(completions))
    settings = RULE.stars_config() | {"seed": 5, "num_return_sequences": 64}
    rejected = engine.generate([PROMPT], **settings | {"target_reward": 1e6, "candidates": 3})
    unguided = engine.generate([PROMPT], **settings | {"target_reward": -1e6})
    assert not any(s.accepted for segments in rejected.segments for s in segments)
    assert rejected.completions == unguided.completions


@pytest.mark.parametrize("finished_threshold", ["target", "ramp"])
@pytest.mark.parametrize("kind", ["callable", "classifier"])
def test_each_segments_reward_and_threshold_are_those_of_the_formula(policy, classifier, kind, finished_threshold):
    rule = replace(RULE, finished_threshold=finished_threshold)
    engine = StarsEngine(policy, wave_reward if kind == "callable" else classifier)
    out = engine.generate(PROMPTS, seed=1, num_return_sequences=8, candidates=3, **rule.stars_config())
    oracles = [oracle(policy, prompt, rule, classifier if kind == "classifier" else None) for prompt in PROMPTS]
    for row, segments in enumerate(out.segments):
        exact, y = oracles[row // 8], ()
        for segment in segments:
            y += tuple(segment.tokens)
            assert segment.reward == pytest.approx(exact.reward(y), abs=1e-4)
            assert segment.threshold == pytest.approx(rule.threshold(y, exact.reward), abs=1e-4)
            assert segment.accepted or segment.attempts == rule.max_attempts
        assert out.rewards[row] == segments[-1].reward


def test_a_target_reward_per_prompt_is_used_for_that_prompt(policy):
    targets = [0.3 * i for i in range(len(PROMPTS))]
    engine = StarsEngine(policy, wave_reward)
    out = engine.generate(PROMPTS, seed=1, **RULE.stars_config() | {"target_reward": targets})
    for prompt, target, segments in zip(PROMPTS, targets, out.segments, strict=True):
        rule, y = replace(RULE, target_reward=target), ()
        for segment in segments:
            y += tuple(segment.tokens)
            assert segment.threshold == pytest.approx(rule.threshold(y, lambda c, p=prompt: wave(p, c)), abs=1e-4)

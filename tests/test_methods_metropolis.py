"""Chains over whole answers follow their transition matrix step by step, and tend to the laws that they are made for."""

import math
from dataclasses import replace

import numpy as np
import pytest
from conftest import tiny_policy
from oracle import next_token_probabilities, p_value, prefixes
from test_law import EOS, PROMPT, ROWS, RULE, VOCAB, wave

from stars_fast import StarsEngine
from stars_fast.methods import Ending, MetropolisHastings, PowerSampling
from stars_fast.rewards import Reward

SAMPLES = 1500
TOY = replace(RULE, max_new_tokens=3, segment_length=1, beta=0.5)  # 40 answers, of one to three segments
FILTERED = {"temperature": 0.7, "top_k": 3}


class Finished(Reward):
    """The wave of a finished answer; knows nothing else."""

    partial = False

    def score(self, completions):
        assert all(completion.finished for completion in completions)
        return [wave(completion.response.prompt.ids, completion.tokens) for completion in completions]


@pytest.fixture(scope="module")
def policy():
    return tiny_policy(VOCAB, seed=3)


class Texts:
    """All answers, their probabilities under what is sampled and under the raw policy, and their segments."""

    def __init__(self, policy, rule, **sampling) -> None:
        whole = prefixes(VOCAB, EOS, rule.max_new_tokens)
        ended = [(*y, EOS) for length in range(rule.max_new_tokens) for y in prefixes(VOCAB, EOS, length)]
        tables = [next_token_probabilities(policy, PROMPT, rule, **settings) for settings in (sampling, {})]
        self.rule, self.all = rule, whole + ended
        self.drawn, self.raw = (self._probabilities(table, 0) for table in tables)
        self.all = [y for y, q in zip(self.all, self.drawn, strict=True) if q > 0]
        self.raw, self.drawn = self.raw[self.drawn > 0], self.drawn[self.drawn > 0]
        self.tables, self.rewards = tables, np.array([wave(PROMPT, y) for y in self.all])
        self.segments = np.array([-(-len(y) // rule.segment_length) for y in self.all])

    def _probabilities(self, table, start):
        """Of what lies behind the first ``start`` tokens, given these."""
        return np.array([math.prod(table[y[:i]][y[i]] for i in range(start, len(y))) for y in self.all])

    def law_after(self, steps, target, hastings=True):
        """``steps`` times the transition matrix applied to what is drawn first.

        ``target`` is the density over all answers of the law that the chain is to leave as it is.
        """
        matrix = np.zeros((len(self.all), len(self.all)))
        for i, y in enumerate(self.all):
            for cut in range(self.segments[i]):
                start = cut * self.rule.segment_length
                behind = self._probabilities(self.tables[0], start)
                same = np.array([z[:start] == y[:start] for z in self.all])
                redrawn = np.where(same, behind, 0.0) / self.segments[i]  # q(y -> z) by this cut
                back = behind[i] / (self.segments if hastings else self.segments[i])
                accepted = np.minimum(1.0, target * back / (target[i] * np.maximum(redrawn, 1e-300)))
                matrix[i] += redrawn * np.where(same, accepted, 0.0)
            matrix[i, i] += 1.0 - matrix[i].sum()
        return self.drawn @ np.linalg.matrix_power(matrix, steps)

    def as_law(self, density):
        return dict(zip(self.all, density / density.sum(), strict=True))


def answers(policy, method, rule, samples=SAMPLES, reward=None, **overrides):
    engine = StarsEngine(policy, reward or Finished(), max_rows=ROWS)
    settings = dict(segment_length=rule.segment_length, max_new_tokens=rule.max_new_tokens, beta=rule.beta)
    settings |= dict(eos_token_id=EOS, candidates=1) | overrides
    out = engine.generate([PROMPT], method=method, seed=0, num_return_sequences=samples, **settings)
    assert out.errors == [None] * samples and engine.policy.tree.nodes == 0
    assert out.rewards == pytest.approx([wave(PROMPT, y) for y in out.completions], abs=1e-5)
    return [tuple(y) for y in out.completions]


@pytest.mark.parametrize("steps, rule, sampling", [(1, TOY, {}), (3, TOY, {}), (3, replace(TOY, segment_length=2), FILTERED)])
def test_every_step_follows_the_transition_matrix(policy, steps, rule, sampling):
    texts = Texts(policy, rule, **sampling)
    tilted = texts.drawn * np.exp(texts.rewards / rule.beta)
    drawn = answers(policy, MetropolisHastings(steps=steps), rule, **sampling)
    assert p_value({0: drawn}, {0: texts.as_law(texts.law_after(steps, tilted))}) > 1e-3
    without = texts.as_law(texts.law_after(steps, tilted, hastings=False))
    assert p_value({0: drawn}, {0: without}) < 1e-3 or steps == 1, "the number of segments could be left out"
    print(p_value({0: drawn}, {0: without}), p_value({0: drawn}, {0: texts.as_law(texts.law_after(steps, tilted))}), p_value({0: drawn}, {0: texts.as_law(tilted)}))


@pytest.mark.parametrize("chains", [1, 3])
def test_many_steps_draw_from_the_tilted_law(policy, chains):
    texts = Texts(policy, TOY)
    tilted = texts.drawn * np.exp(texts.rewards / TOY.beta)
    exact = texts.law_after(24, tilted)
    assert np.abs(exact - tilted / tilted.sum()).sum() / 2 < 0.01
    drawn = answers(policy, MetropolisHastings(steps=24, chains=chains), TOY, candidates=4)
    assert p_value({0: drawn}, {0: texts.as_law(tilted)}) > 1e-3
    assert p_value({0: drawn}, {0: texts.as_law(texts.drawn)}) < 1e-9


@pytest.mark.parametrize("alpha, sampling", [(3.0, {}), (2.0, {"temperature": 1.0, "top_k": 3})], ids=str)
def test_power_sampling_draws_from_the_power_of_the_policy(policy, alpha, sampling):
    texts = Texts(policy, TOY, **{"temperature": 1 / alpha} | sampling)
    power = texts.raw**alpha
    few = answers(policy, PowerSampling(alpha=alpha, steps=2), TOY, **sampling)
    assert p_value({0: few}, {0: texts.as_law(texts.law_after(2, power))}) > 1e-3
    many = answers(policy, PowerSampling(alpha=alpha, steps=24), TOY, candidates=4, **sampling)
    assert p_value({0: many}, {0: texts.as_law(power)}) > 1e-3
    print(p_value({0: many}, {0: texts.as_law(texts.drawn)}))
    assert p_value({0: many}, {0: texts.as_law(texts.drawn)}) < 1e-3, "it could be token-wise sharpening"

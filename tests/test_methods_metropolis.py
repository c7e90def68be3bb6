"""Chains over whole answers follow their transition matrix step by step, and tend to the laws they are made for."""

import math
from dataclasses import replace

import numpy as np
import pytest
from conftest import tiny_policy
from oracle import next_token_probabilities, p_value, prefixes
from test_law import EOS, PROMPT, ROWS, RULE, VOCAB, wave

from stars_fast import StarsConfig, StarsEngine
from stars_fast.methods import Ending, MetropolisHastings, PowerSampling
from stars_fast.rewards import Reward

SAMPLES, FEW = 1500, 400
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


@pytest.mark.parametrize("rule, sampling", [(TOY, {}), (replace(TOY, segment_length=2), FILTERED)], ids=["1", "2"])
def test_every_step_follows_the_transition_matrix(policy, rule, sampling):
    texts = Texts(policy, rule, **sampling)
    tilted = texts.drawn * np.exp(texts.rewards / rule.beta)
    drawn = answers(policy, MetropolisHastings(steps=3), rule, **sampling)
    assert p_value({0: drawn}, {0: texts.as_law(texts.law_after(3, tilted))}) > 1e-3
    without = texts.as_law(texts.law_after(3, tilted, hastings=False))
    assert p_value({0: drawn}, {0: without}) < 1e-3, "the numbers of segments could be left out"


@pytest.mark.parametrize("chains", [1, 2])
def test_many_steps_draw_from_the_tilted_law(policy, chains):
    rule, steps = replace(TOY, beta=1.0), 12
    texts = Texts(policy, rule)
    tilted = texts.drawn * np.exp(texts.rewards / rule.beta)
    assert np.abs(texts.law_after(steps, tilted) - tilted / tilted.sum()).sum() / 2 < 0.02
    drawn = answers(policy, MetropolisHastings(steps=steps, chains=chains), rule, FEW)
    assert p_value({0: drawn}, {0: texts.as_law(tilted)}) > 1e-3
    assert p_value({0: drawn}, {0: texts.as_law(texts.drawn)}) < 1e-9


@pytest.mark.parametrize("alpha, sampling", [(2.0, {}), (2.0, {"temperature": 1.0, "top_k": 3})], ids=str)
def test_power_sampling_draws_from_the_power_of_the_policy(policy, alpha, sampling):
    texts = Texts(policy, TOY, **{"temperature": 1 / alpha} | sampling)
    power = texts.raw**alpha
    few = answers(policy, PowerSampling(alpha=alpha, steps=2), TOY, FEW, **sampling)
    assert p_value({0: few}, {0: texts.as_law(texts.law_after(2, power))}) > 1e-3
    many = answers(policy, PowerSampling(alpha=alpha, steps=10), TOY, FEW, **sampling)
    assert np.abs(texts.law_after(10, power) - power / power.sum()).sum() / 2 < 0.02
    assert p_value({0: many}, {0: texts.as_law(power)}) > 1e-3
    assert p_value({0: many}, {0: texts.as_law(texts.drawn)}) < 1e-6, "what is proposed is as good as what is wanted"


def test_the_ratios_are_those_of_the_docstrings():
    new, old = Ending(1.0, 2, -3.0, -2.0), Ending(0.5, 4, -5.0, -4.5)
    assert MetropolisHastings().log_ratio(new, old, beta=0.25) == pytest.approx(2.0 + math.log(2))
    assert PowerSampling(alpha=3.0).log_ratio(new, old, beta=1.0) == pytest.approx(6.0 - 2.5 + math.log(2))


def test_an_answer_that_is_rejected_for_good_is_left_and_never_taken():
    bad, good = Ending(-math.inf, 1, -1.0, -1.0), Ending(0.0, 1, -1.0, -1.0)
    ratio = MetropolisHastings().log_ratio
    assert ratio(bad, good, 1.0) == -math.inf and ratio(good, bad, 1.0) == ratio(bad, bad, 1.0) == 0.0


def test_power_sampling_draws_at_its_own_temperature_unless_another_is_asked_for():
    config = StarsConfig(max_new_tokens=4)
    assert PowerSampling(alpha=4.0).rule(config).temperature == 0.25
    assert PowerSampling(alpha=4.0).rule(config.replace(temperature=0.8)).temperature == 0.8


@pytest.mark.parametrize(
    "method, message",
    [
        ({"name": "metropolis_hastings", "steps": 0}, "metropolis_hastings: steps=0 must be at least 1"),
        ({"name": "metropolis_hastings", "chains": 2**17}, "metropolis_hastings: chains=131072 must be at most 65536"),
        ({"name": "power_sampling", "alpha": 0.0}, r"power_sampling: alpha=0.0 must lie in \[1e-06, 1e\+06\]"),
    ],
    ids=str,
)
def test_parameters_out_of_range_are_named(method, message):
    with pytest.raises(ValueError, match=message):
        StarsConfig(method=method)

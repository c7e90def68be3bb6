"""STARS on quantiles: the law is the enumerated tilt under a given fit, and the acceptance is known beforehand."""

import math
from dataclasses import dataclass, replace

import pytest
from conftest import tiny_policy
from oracle import Oracle, attempts, next_token_probabilities, p_value, text
from test_law import PROMPT, ROWS, RULE, VOCAB, wave, wave_reward
from test_methods_fit import drawn

from stars_fast import StarsConfig, StarsEngine
from stars_fast.inputs.fits import made_for
from stars_fast.inputs.sampling import resolve_sampling
from stars_fast.methods.fit import Fit, learn
from stars_fast.methods.quantile import softness

FIT = learn(drawn(60, slope=0.4), {}, {})


@dataclass(frozen=True)
class QuantileOracle(Oracle):
    """A segment is accepted with probability ``min(1, exp((F(r) - 1) / b))``, F being its prefix's."""

    fit: Fit = FIT

    def committed(self, y):
        before = self.reward(y) if y else 0.0
        index = len(y) // self.rule.segment_length
        level = lambda s: self.fit.level(index, before, self.reward(s))  # noqa: E731
        accept = lambda s: math.exp((level(s) - 1) / self.rule.beta)  # noqa: E731
        return Oracle(self.probabilities, self.reward, _Levels(accept, self.rule)).committed(y)


@dataclass(frozen=True)
class _Levels:
    accept: object
    rule: object

    def __getattr__(self, name):
        return getattr(self.rule, name)

    def acceptance(self, completion, reward):
        return self.accept(completion)


@pytest.fixture(scope="module")
def policy():
    return tiny_policy(VOCAB, seed=3)


def fit_for(engine, config):
    ruled = config.chosen_method.rule(config)
    sampling = resolve_sampling(ruled, engine.policy.model, None)
    return replace(FIT, made_for=made_for(ruled, sampling, engine.policy, engine.reward))


@pytest.mark.parametrize("candidates, samples", [(1, 2000), (4, 2000)])
def test_the_law_is_the_policys_tilted_by_the_quantile(policy, candidates, samples):
    rule = replace(RULE, max_new_tokens=4, beta=softness(0.4))
    exact = QuantileOracle(next_token_probabilities(policy, PROMPT, rule), lambda y: wave(PROMPT, y), rule)
    engine = StarsEngine(policy, wave_reward, max_rows=ROWS)
    settings = {"segment_length": 2, "max_new_tokens": 4, "max_attempts": rule.max_attempts, "acceptance": 0.4}
    config = StarsConfig(**settings, candidates=candidates)
    out = engine.generate([PROMPT], config, fit=fit_for(engine, config), seed=0, num_return_sequences=samples)
    assert out.errors == [None] * samples
    assert out.stats["calibration_tokens"] == 0
    runs = [tuple((tuple(s.tokens), s.attempts, s.accepted) for s in row) for row in out.segments]
    for view in (text, attempts):
        assert p_value({0: [view(run) for run in runs]}, {0: exact.law(view)}) > 1e-3


@pytest.mark.parametrize("acceptance", [0.05, 0.3, 0.9])
def test_where_levels_are_uniform_the_acceptance_is_the_one_asked_for(acceptance):
    b, steps = softness(acceptance), 100_000
    mean = sum(math.exp(((i + 0.5) / steps - 1) / b) for i in range(steps)) / steps
    assert mean == pytest.approx(acceptance, rel=1e-4)

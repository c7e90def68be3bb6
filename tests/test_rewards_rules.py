"""Rules tilt the policy's law as posterior regularisation says, and hard ones hold."""

import functools
import itertools
import math
import re
from collections import defaultdict

import pytest
from conftest import tiny_policy
from oracle import Rule, completions, next_token_probabilities, p_value

from stars_fast import StarsConfig, StarsEngine
from stars_fast.rewards import Completion, Response, RewardPrompt, RuleReward

VOCAB, EOS = 4, 3


def scored(scorer, tokens, tokenizer=None):
    return scorer.score([Completion(Response(RewardPrompt(0, [1], [1])), tokens, tokenizer=tokenizer)])[0]


def test_weights_of_what_is_met_add_up(tokenizer32):
    def length(text):
        return len(text.split())

    scorer = RuleReward({r"w5 w6": 2.0, re.compile("W7", re.I): -math.inf, "w9": -0.5}, {length: 0.25})
    assert scored(scorer, [5, 6, 5, 6], tokenizer32) == 2.0 + 4 * 0.25
    assert scored(scorer, [9], tokenizer32) == -0.5 + 0.25
    assert scored(scorer, [7, 5, 6], tokenizer32) == -math.inf
    assert scored(RuleReward(predicates={lambda ids: ids[-1] == 4: 1.5}), [3, 4]) == 1.5


def test_the_law_is_that_of_posterior_regularisation():
    policy = tiny_policy(VOCAB, seed=3)
    rule = Rule(3, 200, 3, 0.0, 1.0, 1.0, EOS)

    def broken(tokens):  # phi: no id may follow itself
        return sum(a == b for a, b in itertools.pairwise(tokens))

    engine = StarsEngine(policy, RuleReward(predicates={broken: -1.5}), max_rows=4000)
    out = engine.generate(
        [[1, 2]],
        StarsConfig(segment_length=3, max_attempts=200, max_new_tokens=3, target_reward=0.0, beta=1.0, base_reward=0.0),
        seed=0,
        num_return_sequences=2000,
    )
    probabilities = next_token_probabilities(policy, [1, 2], rule)
    law = defaultdict(float)
    for y in completions(VOCAB, EOS, 3):
        if rule.finished(y):
            p = math.prod(float(probabilities[y[:i]][token]) for i, token in enumerate(y))
            law[y] = p * math.exp(-1.5 * broken(y))
    total = sum(law.values())
    law = {y: q / total for y, q in law.items()}
    assert p_value({0: [tuple(y) for y in out.completions]}, {0: law}) > 1e-3


def test_a_hard_rule_holds(policy32, tokenizer32):
    engine = StarsEngine(policy32, RuleReward({r"\bw1\d\b": -math.inf}), tokenizer=tokenizer32)
    config = StarsConfig(segment_length=2, max_attempts=60, max_new_tokens=12, target_reward=0.0, base_reward=0.0)
    out = engine.generate(["w5 w6", "w7"], config, seed=0, num_return_sequences=8)
    assert out.errors == [None] * 16
    assert sum(segment.attempts > 1 for row in out.segments for segment in row) > 10
    assert not any(10 <= token < 20 for row in out.completions for token in row)


def test_a_rule_that_the_empty_answer_meets_is_told_with_its_remedies(policy32):
    engine = StarsEngine(policy32, RuleReward(predicates={lambda ids: not ids or ids[-1] == 9: -math.inf}))
    config = StarsConfig(segment_length=2, max_attempts=60, max_new_tokens=4, target_reward=0.0)
    (error,) = engine.generate([[5, 6]], config, seed=0).errors
    assert "the empty answer could not be scored: it is -inf: set base_reward, alpha=1 or target_reward=None" in error
    for remedy in ({"base_reward": 0.0}, {"alpha": 1.0}, {"target_reward": None}):
        assert engine.generate([[5, 6]], config, seed=0, **remedy).errors == [None]


def test_rules_that_cannot_be_are_refused(policy32):
    with pytest.raises(ValueError, match="no rules"):
        RuleReward()
    for weight in (math.inf, math.nan):
        with pytest.raises(ValueError, match=rf"the rule 'w5': weight={weight}"):
            RuleReward({"w5": weight})
    with pytest.raises(ValueError, match=r"the pattern 'go\(od' is no regular expression: .*at position 2"):
        RuleReward({"good": 1.0, "go(od": 1.0})
    with pytest.raises(ValueError, match="matched against text: pass tokenizer="):
        StarsEngine(policy32, RuleReward({"w5": 1.0})).generate([[1]])
    with pytest.raises(ValueError, match=r"RuleReward \(partial=False\)"):
        StarsEngine(policy32, RuleReward(predicates={len: 1.0}, partial=False)).generate([[1]])


def test_every_rule_tells_one_scorer_from_another_in_any_process():
    first, other = (lambda text: 1), (lambda text: 2)
    told = [RuleReward({r"\d": 1.0}, {first: weight, other: 2.0}).described for weight in (1.0, 1.0, 3.0)]
    assert told[0] == told[1] != told[2]
    assert " at 0x" not in RuleReward(predicates={functools.partial(len): 1.0}).described
    assert RuleReward({"a": 1.0, "b": 2.0}).described == RuleReward({"b": 2.0, "a": 1.0}).described
    assert RuleReward({"a": 1.0}).described != RuleReward({re.compile("a", re.IGNORECASE): 1.0}).described

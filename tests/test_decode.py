"""Decode steps over tensors that stay where they are: buckets, reuse, and nothing of an earlier proposal."""

import math

import pytest
import torch
from conftest import tiny_policy, tiny_reward
from test_same_text import CONFIG, PROMPTS, SEEDS, VOCAB

from stars_fast import StarsEngine
from stars_fast.decode import Sampling, Shape, bucket


def test_buckets_are_few_and_large_enough():
    sizes = [bucket(rows) for rows in range(1, 1025)]
    assert all(size >= rows for rows, size in enumerate(sizes, 1))
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 9 + 14
    assert {bucket(rows) for rows in (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256)} == {
        1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256,
    }  # fmt: skip
    assert max(size / rows for rows, size in enumerate(sizes, 1)) < 2


def test_shapes_of_a_call_share_buckets():
    one, other = (Shape(rows, 9, 3, trunk, length, Sampling()).padded(512, 16) for rows, trunk, length in
                  ((33, 40, 16), (60, 90, 7)))  # fmt: skip
    assert one == other == Shape(64, 16, 4, 512, 16, Sampling())


@pytest.fixture
def padded():
    engine = StarsEngine(tiny_policy(VOCAB, hidden=32), tiny_reward(VOCAB, hidden=32))
    engine.policy.padded = True
    return engine


def test_tensors_are_reused_until_the_pool_or_the_weights_move(padded):
    policy = padded.policy
    first = padded.generate(PROMPTS, CONFIG, seed=SEEDS).completions
    kept = dict(policy._steps)
    assert kept
    assert padded.generate(PROMPTS, CONFIG, seed=SEEDS).completions == first
    assert all(policy._steps[shape] is steps for shape, steps in kept.items())
    head = policy.model.lm_head
    head.weight = torch.nn.Parameter(head.weight.clone())
    padded.generate(PROMPTS, CONFIG, seed=SEEDS)
    assert all(policy._steps.get(shape) is not steps for shape, steps in kept.items())
    kept = dict(policy._steps)
    padded.generate([[1] * 100] * 8, CONFIG, seed=0)  # needs a larger pool
    assert all(policy._steps.get(shape) is not steps for shape, steps in kept.items())


def test_what_a_bad_row_left_behind_does_not_fail_the_next(padded):
    """A row that ends early leaves columns of an earlier proposal unwritten, where a NaN may lie."""
    policy = padded.policy
    expected = padded.generate(PROMPTS, CONFIG, seed=SEEDS).completions
    for steps in policy._steps.values():
        steps.sampling_logprobs.fill_(math.nan)
        steps.logprobs.fill_(math.nan)
        steps.tokens.fill_(VOCAB - 1)
        steps.plan.branch_slots.fill_(1)
        steps.plan.trunk_slots.fill_(1)
    again = padded.generate(PROMPTS, CONFIG, seed=SEEDS)
    assert again.completions == expected
    assert again.errors == [None] * len(PROMPTS)

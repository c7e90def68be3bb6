"""A proposal draws for each leaf what it would draw by itself, under the leaf's own settings."""

import math

import pytest
import torch
from conftest import tiny_policy

from stars_fast.policy.leaf import Leaf, Sampling
from stars_fast.policy.policy import Policy
from stars_fast.tree.attention import plugged

VOCAB = 32
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12], [13, 14]]


@pytest.fixture
def policy():
    policy = Policy(tiny_policy(VOCAB, hidden=32))
    policy.begin(400, 40, 6)
    with plugged(policy.model), torch.no_grad():
        yield policy


def leaves(policy, **settings):
    """Four leaves that have nothing in common."""
    nodes, logits = policy.prefill([-1] * len(PROMPTS), PROMPTS)
    seen = torch.zeros(VOCAB, dtype=torch.bool).index_fill(0, torch.arange(12), True)
    return [
        Leaf(nodes[0], logits[0], Sampling(), key=1, segment=0, first_attempt=0, candidates=3, length=6),
        Leaf(nodes[1], logits[1], Sampling(0.7, 5, 0.9, 0.05, 1.0, (3, 4)), 2, 4, 7, candidates=1, length=2),
        Leaf(nodes[2], logits[2], Sampling(repetition_penalty=1.7, eos_token_ids=(31,)), 3, 1, 0, 4, 5, seen=seen),
        Leaf(nodes[3], logits[3], Sampling(1.6), 4, 2, 2, candidates=2, length=6, entropy=2.5, shortest=2),
    ]


@pytest.mark.parametrize("padded", [False, True])
def test_leaves_with_settings_of_their_own_draw_what_each_draws_alone(policy, padded):
    policy.graphs.enabled = padded
    asked = leaves(policy)
    together = policy.propose(asked)
    for leaf, draws in zip(asked, together, strict=True):
        (alone,) = policy.propose([leaf])
        assert [draw.tokens for draw in draws] == [draw.tokens for draw in alone]
        for one, other in zip(draws, alone, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
            assert one.sampling_logprobs == pytest.approx(other.sampling_logprobs, abs=1e-4)
            assert (one.ended, one.error) == (other.ended, other.error)
    assert [len(draw.tokens) for draw in together[0]] == [6] * 3  # no EOS of its own
    assert all(token not in (3, 4) for draw in together[1] for token in draw.tokens[:-1])
    assert 2 <= min(len(draw.tokens) for draw in together[3]) < 6


def test_attempts_are_numbered_from_the_first_that_is_asked_for(policy):
    """So a later proposal draws the candidates that one with more of them would have drawn."""
    (whole,) = policy.propose(leaves(policy)[:1])
    leaf = leaves(policy)[0]
    leaf.candidates, leaf.first_attempt = 1, 2
    ((last,),) = policy.propose([leaf])
    assert last.tokens == whole[2].tokens


def test_a_trimmed_branch_holds_all_but_the_last_token_that_is_left(policy):
    leaf = leaves(policy)[0]
    ((draw, *_),) = policy.propose([leaf])
    before, (tokens, logprobs) = policy.tree.live_slots, (draw.tokens, draw.logprobs)
    draw.cut(3)
    policy.trim(leaf.node, draw)
    assert (draw.tokens, draw.logprobs) == (tokens[:3], logprobs[:3])
    assert policy.tree.length(draw.node) == len(PROMPTS[0]) + 2 and policy.tree.live_slots == before - 3
    (node,), (row,) = policy.prefill([draw.node], [draw.tokens[-1:]])
    expected = policy.model(torch.tensor([PROMPTS[0] + draw.tokens]), use_cache=False).logits[0, -1]
    torch.testing.assert_close(row, expected, atol=1e-4, rtol=0)
    assert policy.tree.length(node) == len(PROMPTS[0]) + 3


def test_given_tokens_are_candidates_with_both_log_probabilities(policy):
    asked = leaves(policy)[:2]
    logits = torch.stack([leaf.logits for leaf in asked])
    processed = logits.clone()
    processed[0, 5] = -math.inf
    tokens = [[4, 5], [6]]
    groups = policy.fork_tokens([leaf.node for leaf in asked], tokens, [(4,), ()], logits, processed)
    assert [[draw.tokens for draw in group] for group in groups] == [[[4], [5]], [[6]]]
    assert [[draw.ended for draw in group] for group in groups] == [[True, False], [False]]
    raw, after = logits.log_softmax(1), processed.log_softmax(1)
    assert groups[0][1].logprobs == pytest.approx([raw[0, 5].item()]) and groups[0][1].sampling_logprobs == [-math.inf]
    assert groups[1][0].sampling_logprobs == pytest.approx([after[1, 6].item()])

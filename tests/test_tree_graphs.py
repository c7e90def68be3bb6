"""What is captured is kept as long as it is good, few of it, and gives its memory back in time."""

import torch
from conftest import sum_reward, tiny_policy
from test_policy_steps import engine, proposals
from test_same_text import CONFIG, PROMPTS, SEEDS, VOCAB

from stars_fast import StarsEngine
from stars_fast.policy.policy import Policy
from stars_fast.policy.steps import Steps
from stars_fast.tree.passes import Pass


def test_passes_and_proposals_do_not_drive_each_other_out(monkeypatch):
    monkeypatch.setattr("stars_fast.tree.graphs._MOST_GRAPHS", 1)
    engine = StarsEngine(tiny_policy(VOCAB, hidden=32), sum_reward)
    engine.policy.graphs.enabled = True
    engine.generate(PROMPTS[:1], CONFIG, seed=0, candidates=2)
    assert {type(work) for work in engine.policy.graphs._kept.values()} == {Pass, Steps}


def test_graphs_go_before_a_larger_pool_is_made(monkeypatch):
    model, seen = Policy(tiny_policy(VOCAB, hidden=32)), []
    model.graphs.enabled = True
    model.allocate(10)
    small = model.pool.slots
    monkeypatch.setattr(model.graphs, "drop", lambda: seen.append(model.pool.slots))
    model.allocate(10)
    assert seen == []
    model.allocate(100)
    assert seen[0] == small


def test_few_tensors_are_kept(padded, monkeypatch):
    monkeypatch.setattr("stars_fast.tree.graphs._MOST_GRAPHS", 2)
    out = padded.generate(PROMPTS, CONFIG, seed=SEEDS, candidates=3)
    assert len(proposals(padded.policy)) == 2
    assert out.completions == engine().generate(PROMPTS, CONFIG, seed=SEEDS, candidates=3).completions


def test_tensors_are_reused_until_the_pool_or_the_weights_move(small_pools, padded):
    policy = padded.policy
    first = padded.generate(PROMPTS, CONFIG, seed=SEEDS).completions
    kept = proposals(policy)
    assert kept
    assert padded.generate(PROMPTS, CONFIG, seed=SEEDS).completions == first
    assert all(proposals(policy)[shape] is steps for shape, steps in kept.items())
    head = policy.model.lm_head
    head.weight = torch.nn.Parameter(head.weight.clone())
    padded.generate(PROMPTS, CONFIG, seed=SEEDS)
    assert all(proposals(policy).get(shape) is not steps for shape, steps in kept.items())
    kept = proposals(policy)
    for length in (40, 80, 120):  # each needs a larger pool
        padded.generate([[1] * length] * 8, CONFIG, seed=0)
        assert all(proposals(policy).get(shape) is not steps for shape, steps in kept.items())
        kept = proposals(policy)

"""Decode steps over tensors that stay where they are: buckets, reuse, and nothing of an earlier proposal."""

import math
import re

import pytest
import torch
from conftest import sum_reward, tiny_policy, tiny_reward
from test_architectures import GPT, causal_lm
from test_same_text import CONFIG, PROMPTS, SEEDS, VOCAB

from stars_fast import StarsConfig, StarsEngine
from stars_fast.policy.steps import Shape, Steps
from stars_fast.tree.passes import bucket, group_bucket


def test_buckets_are_few_and_large_enough():
    sizes = [bucket(rows) for rows in range(1, 1025)]
    assert all(size >= rows for rows, size in enumerate(sizes, 1))
    assert sizes == sorted(sizes)
    assert sorted(set(sizes))[:8] == [1, 16, 32, 64, 96, 128, 192, 256]
    assert len(set(sizes)) == 6 + 14
    assert max(size / rows for rows, size in enumerate(sizes, 1) if rows > 16) < 2
    groups = [group_bucket(requests) for requests in range(1, 257)]
    assert sorted(set(groups)) == [1, 4, 16, 64, 128, 192, 256]
    assert all(size >= requests for requests, size in enumerate(groups, 1))


def test_shapes_of_a_call_share_buckets():
    one, other = (
        Shape(rows, 9, 3, trunk, length, eos, True).padded(512, 16)
        for rows, trunk, length, eos in ((33, 40, 16, 1), (60, 90, 7, 3))
    )
    assert one == other == Shape(64, 16, 4, 512, 16, 4, True)
    most = [Shape(64, 9, most_rows, 40, 16, 1, True).padded(512, 16).most_rows for most_rows in (1, 2, 3, 5, 16, 17)]
    assert most == [2, 2, 4, 16, 16, 64]


def engine():
    return StarsEngine(tiny_policy(VOCAB, hidden=32), tiny_reward(VOCAB, hidden=32))


def proposals(policy):
    """Tensors of proposals, by shape, that the policy keeps."""
    return {shape: work for shape, work in policy.graphs._kept.items() if isinstance(work, Steps)}


def test_other_settings_and_lengths_find_the_same_tensors(padded):
    policy = padded.policy
    for settings in ({}, dict(temperature=0.7, top_k=9), dict(top_p=0.8, min_p=0.02, eos_token_id=[3, 9])):
        ours = padded.generate(PROMPTS, CONFIG, seed=SEEDS, **settings)
        if not settings:
            kept = set(proposals(policy))
        assert ours.completions == engine().generate(PROMPTS, CONFIG, seed=SEEDS, **settings).completions
    padded.generate([prompt[:2] for prompt in PROMPTS], CONFIG, seed=SEEDS, max_new_tokens=9, segment_length=3)
    # Only numbers of rows that did not occur before are new.
    assert {shape[3:] for shape in proposals(policy)} == {shape[3:] for shape in kept}


@pytest.mark.parametrize("pad", [False, True])
def test_rows_that_ended_stay_inside_the_table_of_positions(pad):
    """GPT-2 looks positions up: one too many is an error on a CPU, and the end of the process on a GPU."""
    policy = causal_lm("gpt2", GPT | dict(n_positions=24))
    engine = StarsEngine(policy, sum_reward)
    engine.policy.graphs.enabled = pad
    config = StarsConfig(segment_length=5, target_reward=1.5, candidates=3, max_new_tokens=20)
    out = engine.generate([[1, 2, 3, 4]] * 6, config, seed=1)
    assert out.errors == [None] * 6
    assert "length" in out.finish_reasons


@pytest.mark.parametrize("pad", [False, True])
def test_a_segment_of_one_token_needs_no_step(pad):
    guided = engine()
    guided.policy.graphs.enabled = pad
    assert guided.generate(PROMPTS, CONFIG, seed=SEEDS, segment_length=1, max_new_tokens=3).errors == [None] * 16


def test_padding_rows_are_dead_and_write_to_slot_0(padded):
    padded.generate(PROMPTS, CONFIG, seed=SEEDS, candidates=4)
    loaded = []
    original = Steps.load

    def load(steps, leaves, plan):
        steps.alive.fill_(True)  # as a larger proposal leaves them
        steps.plan.branch_slots.fill_(7)
        original(steps, leaves, plan)
        rows = len(plan.branches)
        assert not steps.alive[rows:].any() and not steps.plan.branch_slots[rows:].any()
        loaded.append(steps.shape.rows - rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Steps, "load", load)
        padded.generate(PROMPTS[:5], CONFIG, seed=SEEDS[:5], candidates=4)
    assert max(loaded) > 2


def test_what_a_bad_row_left_behind_does_not_fail_the_next(padded):
    """A row that ends early leaves columns of an earlier proposal unwritten, where a NaN may lie."""
    policy, ends = padded.policy, dict(eos_token_id=list(range(VOCAB - 1)), candidates=3)
    expected = padded.generate(PROMPTS, CONFIG, seed=SEEDS, **ends).completions
    for steps in proposals(policy).values():
        steps.sampling_logprobs.fill_(math.nan)
        steps.logprobs.fill_(math.nan)
        steps.tokens.fill_(VOCAB - 1)
        steps.plan.branch_slots.fill_(1)
        steps.plan.trunk_slots.fill_(1)
    again = padded.generate(PROMPTS, CONFIG, seed=SEEDS, **ends)
    assert again.completions == expected
    assert again.errors == [None] * len(PROMPTS)


def resized(policy, embeddings=None, head=None):
    """The policy with as many embeddings, or as wide a head, which is indifferent to what is new."""
    if embeddings is not None:
        wide = torch.nn.Embedding(embeddings, 32, _weight=torch.ones(embeddings, 32))
        wide.weight.data[:VOCAB] = policy.model.embed_tokens.weight.data
        policy.model.embed_tokens = wide
    if head is not None:
        wide = torch.nn.Linear(32, head, bias=False)
        wide.weight.data[VOCAB:] = 0.0
        wide.weight.data[:VOCAB] = policy.lm_head.weight.data
        policy.lm_head = wide
    return policy.requires_grad_(False)


@pytest.mark.parametrize("settings", [{}, {"top_k": 9}, {"method": "vanilla"}, {"no_repeat_ngram_size": 2}], ids=str)
@pytest.mark.parametrize("pad", [False, True])
def test_a_penalty_holds_where_ids_can_be_read_that_cannot_be_written(settings, pad):
    """The texts are those of a model without these, which its prompts may hold."""
    plain, wide = tiny_policy(VOCAB, hidden=32), resized(tiny_policy(VOCAB, hidden=32), VOCAB + 8)
    outs = []
    for policy in (plain, wide):
        engine = StarsEngine(policy, sum_reward)
        engine.policy.graphs.enabled = pad
        given = dict(settings)
        policy.generation_config.no_repeat_ngram_size = given.pop("no_repeat_ngram_size", None)
        overrides = {"repetition_penalty": 1.3, "on_error": "raise", **given}
        outs.append(engine.generate(PROMPTS, CONFIG, seed=SEEDS, **overrides).completions)
    assert outs[0] == outs[1]
    out = engine.generate([[5, VOCAB + 3, 6]], CONFIG, seed=0, **overrides)
    assert out.errors == [None]


def test_a_text_with_an_id_that_cannot_be_read_fails_by_itself():
    """transformers dies of it."""
    engine = StarsEngine(resized(tiny_policy(VOCAB, hidden=32), head=VOCAB + 1), sum_reward)
    out = engine.generate(PROMPTS * 8, CONFIG, seed=0, ignore_eos=True)
    failed = [error for error in out.errors if error is not None]
    assert failed and len(failed) < len(out.errors)
    told = rf"id \d+ was drawn, for which the policy has no embedding: .* {VOCAB + 1} ids and its .* {VOCAB}"
    assert all(re.fullmatch(told, error) for error in failed)
    assert all(max(ids, default=0) < VOCAB for ids in out.completions)

"""A draft model beside the policy: whichever calls share it, whoever has another, each has its own text."""

import itertools

import pytest
import torch
from conftest import sum_reward, tiny_policy

from stars_fast import StarsConfig, StarsEngine
from stars_fast.inputs.arguments import Arguments
from stars_fast.methods import RSD
from stars_fast.rewards import Reward

VOCAB = 32
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
CONFIG = StarsConfig(max_new_tokens=14, ignore_eos=True)
DRAFTS = [tiny_policy(VOCAB, hidden=32, seed=seed) for seed in (7, 8)]


class Sums(Reward):
    def score(self, completions):
        return sum_reward([completion.tokens for completion in completions])


def rsd(draft, longest=4):
    return RSD(draft=draft, delimiter=None, longest=longest, threshold=0.5)


def make_engine(**limits):
    return StarsEngine(tiny_policy(VOCAB, hidden=32), Sums(), **limits)


def text(events, index=0):
    return [token for event in events if event.index == index for token in event.segment.tokens]


def plugs(model):
    return model.config._attn_implementation


@pytest.mark.parametrize("order", ["one after the other", "in turn"])
def test_two_streams_keep_their_own_draft_models(order):
    """Both are made before either is read."""
    engine = make_engine()
    alone = [make_engine().generate(PROMPTS, CONFIG, seed=1, method=rsd(draft)).completions for draft in DRAFTS]
    assert alone[0] != alone[1]
    streams = [engine.stream(PROMPTS, CONFIG, seed=1, method=rsd(draft)) for draft in DRAFTS]
    told = [[], []]
    if order == "in turn":
        for events in itertools.zip_longest(*streams):
            for mine, event in zip(told, events, strict=True):
                mine += [event] if event else []
    else:
        told = [list(stream) for stream in streams]
    for mine, expected in zip(told, alone, strict=True):
        assert [text(mine, i) for i in range(len(PROMPTS))] == expected
    assert [plugs(draft) for draft in DRAFTS] == ["sdpa", "sdpa"]
    assert engine.policy.tree.nodes == engine._drafts.tree.nodes == 0


def test_a_draft_model_leaves_with_the_last_that_uses_it():
    engine, (draft, _) = make_engine(), DRAFTS
    long = engine.stream(PROMPTS, CONFIG, seed=1, max_new_tokens=90, segment_length=2, target_reward=0.0)
    next(long)
    engine.generate(PROMPTS, CONFIG, seed=1, method=rsd(draft))
    assert engine.core.loop is not None and plugs(engine.policy.model) != "sdpa" == plugs(draft)
    assert engine._drafts.tree.nodes == 0
    long.close()


@pytest.mark.parametrize("padded", [False, True])
def test_a_call_may_be_longer_than_the_one_that_opened_the_core(padded):
    """The policy's pools have room for it from calls before; the draft model's are made as it comes."""
    engine, call = make_engine(), dict(seed=3, max_new_tokens=30, method=rsd(DRAFTS[0], longest=9))
    expected = make_engine().generate([[7] * 100], CONFIG, **call).completions
    engine.prepare(Arguments([[7]], CONFIG, dict(method=call["method"])))  # loads the draft model
    engine.policy.graphs.enabled = engine._drafts.graphs.enabled = padded
    engine.generate([[1] * 150], CONFIG, seed=0, method="vanilla", max_new_tokens=60)
    first = engine.stream(PROMPTS, CONFIG, seed=1, num_return_sequences=16, segment_length=2, target_reward=0.0)
    next(first)
    assert engine.generate([[7] * 100], CONFIG, **call).completions == expected
    assert engine.core.loop is not None, "it had to wait, and proves nothing"
    first.close()


def test_ids_that_the_two_models_do_not_share_end_a_request_by_name():
    draft = tiny_policy(VOCAB + 8, hidden=32, seed=7)
    with torch.no_grad():
        draft.lm_head.weight[VOCAB:] *= 20
    with pytest.raises((ValueError, RuntimeError), match="ids"):
        make_engine().generate(PROMPTS, CONFIG, seed=1, method=rsd(draft), on_error="raise")

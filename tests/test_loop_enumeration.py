"""Candidates that are the policy's likely next tokens, without those that a caller's processor forbids."""

import pytest
import torch
from conftest import tiny_policy
from test_methods import PROMPTS, VOCAB, Sums, make_engine

from stars_fast import StarsConfig
from stars_fast.inputs.arguments import Arguments
from stars_fast.methods import Args, Mara

CONFIG = StarsConfig(max_new_tokens=5, ignore_eos=True, method=Args(top_k=4, weight=1.0), alpha=0.5)


def scored(engine):
    seen, score = [], engine.reward.score

    def watched(completions):
        seen.extend((completion.response.prompt.index, tuple(completion.tokens)) for completion in completions)
        return score(completions)

    engine.reward.score = watched
    return seen


@torch.no_grad()
def likely(prompt, answer, count=4):
    logits = tiny_policy(VOCAB, hidden=32)(torch.tensor([prompt + answer])).logits[0, -1]
    return logits.topk(count).indices.tolist()


@pytest.mark.parametrize("candidates", [1, 3, "auto"])
def test_the_likely_tokens_are_scored_and_no_others(candidates):
    engine = make_engine()
    seen = scored(engine)
    out = engine.generate(PROMPTS, CONFIG, candidates=candidates, seed=0)
    for index, (prompt, answer) in enumerate(zip(PROMPTS, out.completions, strict=True)):
        for end in range(5):
            tried = {ids[-1] for i, ids in seen if i == index and list(ids[:-1]) == answer[:end]}
            assert tried == set(likely(prompt, answer[:end]))
    assert engine.policy.tree.nodes == 0


def test_a_forbidden_token_is_no_candidate_and_one_is_kept_where_all_are_forbidden():
    def forbid(ids, logits):
        return logits.index_fill(1, torch.arange(0, VOCAB, 2), -torch.inf) if len(ids) < 4 else logits - torch.inf

    engine = make_engine()
    out = engine.run(Arguments(PROMPTS, CONFIG, seed=0, processor=lambda row: forbid))
    assert all(token % 2 for completion in out.completions for token in completion[:4])
    assert all("not finite" in error for error in out.errors)
    assert engine.policy.tree.nodes == 0


def test_a_processor_that_raises_costs_its_request_alone():
    def broken(ids, logits):
        if len(ids) == 2:
            raise ArithmeticError("not today")
        return logits

    engine, expected = make_engine(Sums()), make_engine().generate(PROMPTS, CONFIG, seed=0)
    out = engine.run(Arguments(PROMPTS, CONFIG, seed=0, processor=lambda row: broken if row == 1 else None))
    assert out.errors == [None, "its logits processor raised ArithmeticError: not today", None]
    assert out.completions == [expected.completions[0], expected.completions[1][:2], expected.completions[2]]
    assert engine.policy.tree.nodes == 0


def test_a_processor_that_raises_between_two_attempts_at_a_token_costs_its_request_alone():
    calls = []

    def broken(ids, logits):
        calls.append(len(ids))
        if calls.count(2) == 3 and len(ids) == 2:
            raise ArithmeticError("not today")
        return logits

    engine, expected = make_engine(Sums()), make_engine().generate(PROMPTS, CONFIG, seed=0)
    settings = {"candidates": 1}
    out = engine.run(Arguments(PROMPTS, CONFIG, settings, seed=0, processor=lambda row: broken if row == 1 else None))
    assert out.errors == [None, "its logits processor raised ArithmeticError: not today", None]
    assert out.completions == [expected.completions[0], expected.completions[1][:2], expected.completions[2]]
    assert engine.policy.tree.nodes == 0


def test_a_top_p_of_1_leaves_out_no_token_of_a_peaked_law_that_it_may_draw():
    logits = torch.tensor([30.0, 1.0, 0.0, -1.0, -torch.inf])
    assert Mara(top_p=1.0, temperature=1.0).tokens(logits) == [0, 1, 2, 3]
    assert Mara(top_p=0.99, temperature=1.0).tokens(logits) == [0]

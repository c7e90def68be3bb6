"""Answers of a family begin with one plan, drawn and encoded once, and go on from it independently."""

import itertools
from collections import Counter

import pytest
from conftest import sum_reward, tiny_policy, tiny_tokenizer
from oracle import Rule, next_token_probabilities, p_value

from stars_fast import StarsConfig, StarsEngine
from stars_fast.loop.plans import Planning
from stars_fast.methods import Plans
from stars_fast.outputs import Cause

VOCAB, CHILDREN = 32, 3
PROMPTS = [[5, 6, 7], [8]]
CONFIG = StarsConfig(method=Plans(CHILDREN, delimiter=None, longest=5), segment_length=4, max_new_tokens=11)


def scored(prompts, completions, completion_ids, **columns):
    return sum_reward(completion_ids)


def make_engine(policy=None, **options):
    return StarsEngine(policy or tiny_policy(VOCAB), scored, **options)


def families(out, children=CHILDREN):
    return [out.completions[start : start + children] for start in range(0, len(out.completions), children)]


def test_plans_are_drawn_and_encoded_once():
    engine, read = make_engine(), Counter()
    engine.generate(PROMPTS, CONFIG, max_new_tokens=2)  # the model is checked when it is first used
    engine.policy.model.register_forward_hook(
        lambda module, args, inputs, out: read.update(tokens=inputs["input_ids"].numel()), with_kwargs=True
    )
    method = Plans(CHILDREN, delimiter=None, longest=4)  # a segment, so that nothing behind it is thrown away
    out = engine.generate(PROMPTS, CONFIG, method=method, seed=0, num_return_sequences=2 * CHILDREN, ignore_eos=True)
    plans, rest = 4 * 4, 4 * CHILDREN * (11 - 4)
    assert out.stats["policy_tokens"] == out.stats["committed_tokens"] == plans + rest
    assert read["tokens"] == sum(map(len, PROMPTS)) + plans + rest - 4 * CHILDREN  # nobody reads an answer's last token
    for family in families(out):
        assert len({tuple(tokens[:4]) for tokens in family}) == 1 < len(set(map(tuple, family)))
    assert len({tuple(completion[:4]) for completion in out.completions}) == 4
    assert out.rewards == pytest.approx(sum_reward(out.completions))


def test_texts_are_the_same_with_little_room():
    settings = dict(seed=0, num_return_sequences=2 * CHILDREN, max_new_tokens=16, ignore_eos=True)
    plenty = make_engine().generate(PROMPTS, CONFIG, **settings)
    for limits in ({"max_rows": 2}, {"kv_cache_tokens": 23}, {"kv_cache_tokens": 45}):
        engine = make_engine(**limits)
        out = engine.generate(PROMPTS, CONFIG, **settings)
        assert out.errors == [None] * 12 and out.completions == plenty.completions
        assert out.stats["preemptions"] > 0 or "max_rows" in limits
        assert engine.policy.tree.live_slots == engine.policy.tree.nodes == 0


def test_the_slots_of_a_plan_count_once():
    engine, seen = make_engine(), []

    def look(_):
        loop = engine.core.loop
        seen.append((loop.scheduler.held(loop.admitted), engine.policy.tree.live_slots, len(loop.admitted)))

    engine.on_heartbeat = look
    engine.generate(PROMPTS, CONFIG, seed=0, num_return_sequences=2 * CHILDREN, ignore_eos=True)
    assert len(seen) > 3
    for held, live, admitted in seen[:-1]:  # the last token of each waits to be encoded
        assert live <= held <= live + admitted


def test_children_are_independent_given_their_plan():
    rule = Rule(1, 1, 2, 0.0, 1.0, 1.0, eos=3)
    policy = tiny_policy(4, seed=3)
    following = next_token_probabilities(policy, [1, 2], rule)
    law = Counter()
    for first, p in enumerate(following[()]):
        if first == rule.eos:
            law[(first,), (first,)] += p
            continue
        for a, b in itertools.product(range(4), repeat=2):
            law[(first, a), (first, b)] += p * following[(first,)][a] * following[(first,)][b]
    engine = make_engine(policy, max_rows=5000)

    def pairs(method):
        config = StarsConfig(method=method, segment_length=1, max_new_tokens=2, eos_token_id=3)
        out = engine.generate([[1, 2]], config, seed=0, num_return_sequences=800)
        return [tuple(map(tuple, pair)) for pair in families(out, 2)]

    assert p_value({0: pairs(Plans(2, delimiter=None, longest=1))}, {0: law}) > 1e-3
    assert p_value({0: pairs("vanilla")}, {0: law}) < 1e-6


@pytest.mark.parametrize("segment_length", [1, 2, 7])
def test_a_plan_ends_with_the_token_that_completes_its_delimiter(segment_length):
    """Which may begin in one segment and end in the next."""
    policy, tokenizer = tiny_policy(6, seed=1), tiny_tokenizer(6)
    config = StarsConfig(
        method=Plans(2, delimiter="w3 w3", longest=9), segment_length=segment_length, max_new_tokens=14, ignore_eos=True
    )
    out = make_engine(policy, tokenizer=tokenizer).generate([[1]], config, seed=3, num_return_sequences=120)
    followed = Counter()
    for first, second in families(out, 2):
        length = next((n for n in range(1, 10) if "w3 w3" in tokenizer.decode(first[:n])), 9)
        assert first[:length] == second[:length]
        followed[length == 9, first[length] == second[length]] += 1
    assert all(followed[late, False] > 3 for late in (False, True))  # they part behind it


def test_an_answer_that_ends_within_its_plan_is_all_of_its_family():
    out = make_engine(tiny_policy(VOCAB, seed=5)).generate(
        [[1]], CONFIG, seed=0, num_return_sequences=40 * CHILDREN, eos_token_id=[0, 1, 2, 3, 4, 5]
    )
    ended = 0
    for k, family in enumerate(families(out)):
        rows = range(k * CHILDREN, (k + 1) * CHILDREN)
        if len(family[0]) < 5:
            ended += 1
            assert len(set(map(tuple, family))) == len({out.rewards[row] for row in rows}) == 1
            assert {out.finish_reasons[row] for row in rows} == {"stop"}
    assert ended and out.errors == [None] * 40 * CHILDREN


def test_where_the_first_fails_the_next_draws_the_plan(monkeypatch):
    candidate = Planning.candidate

    def failing(self, answer, draw, *args):
        one = candidate(self, answer, draw, *args)
        if answer.sample_index == 0:
            one.error = Cause.of(RuntimeError("no"))
        return one

    monkeypatch.setattr(Planning, "candidate", failing)
    with pytest.warns(UserWarning, match="1 of 6 requests failed"):
        out = make_engine().generate([[8]], CONFIG, seed=0, num_return_sequences=2 * CHILDREN, ignore_eos=True)
    assert [error is None for error in out.errors] == [False] + [True] * 5
    assert out.completions[1][:5] == out.completions[2][:5] != out.completions[3][:5]


def test_the_last_plan_may_have_fewer_children():
    out = make_engine().generate([[8]], CONFIG, seed=0, num_return_sequences=4, ignore_eos=True)
    more = make_engine().generate([[8]], CONFIG, seed=0, num_return_sequences=6, ignore_eos=True)
    assert out.completions == more.completions[:4]


def test_a_delimiter_needs_a_tokenizer_and_numbers_have_limits():
    with pytest.raises(ValueError, match="'plans': delimiter='</plan>' needs a tokenizer"):
        make_engine().generate([[1]], method="plans")
    for wrong in ({"children": 0}, {"longest": 0}, {"delimiter": ""}):
        with pytest.raises(ValueError, match=f"plans: {next(iter(wrong))}="):
            Plans(**wrong)

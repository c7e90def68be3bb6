"""Chains return what one proposal at a time gives, however it is scheduled, and read nothing before a cut twice."""

import math

import pytest
import torch
from conftest import sum_reward, tiny_policy, tiny_reward

from stars_fast import StarsConfig, StarsEngine
from stars_fast.loop.heartbeat import Loop
from stars_fast.methods import MetropolisHastings, PowerSampling
from stars_fast.rewards import ClassifierReward, Reward, WeightedSum

VOCAB = 32
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12]]
SEEDS = [4, 5, 6]
CONFIG = StarsConfig(segment_length=3, max_new_tokens=12, beta=0.6)
METHODS = [MetropolisHastings(steps=6), MetropolisHastings(steps=4, chains=2), PowerSampling(alpha=1.5, steps=6)]


def make_engine(reward=None, **limits):
    return StarsEngine(tiny_policy(VOCAB, hidden=32), reward or tiny_reward(VOCAB, hidden=32), **limits)


def generate(method, engine=None, prompts=PROMPTS, seed=SEEDS, **overrides):
    engine = engine or make_engine()
    out = engine.generate(prompts, CONFIG, seed=seed, method=method, **overrides)
    assert engine.policy.tree.nodes == 0
    return out


def sound(out):
    assert out.errors == [None] * len(out.errors)
    return out.completions


@pytest.fixture(scope="module", params=METHODS, ids=str)
def method(request):
    return request.param


@pytest.fixture(scope="module")
def expected(method):
    """One prompt, and one proposal, at a time."""
    return [sound(generate(method, None, [p], [s], candidates=1))[0] for p, s in zip(PROMPTS, SEEDS, strict=True)]


@pytest.mark.parametrize("candidates, limits", [(1, {}), (2, {}), (4, {}), ("auto", {}), (4, {"max_rows": 3})], ids=str)
def test_the_text_is_that_of_one_proposal_at_a_time(method, expected, candidates, limits):
    out = generate(method, make_engine(**limits), candidates=candidates)
    assert sound(out) == expected
    if candidates in (2, 4) and not limits:
        assert 3 * method.chains < max(out.stats["rows"]) <= 3 * method.chains * candidates


@pytest.mark.parametrize("candidates", [1, 3])
def test_who_gives_way_goes_on_where_it_was(monkeypatch, method, expected, candidates):
    beats, make_room = [], Loop.make_room

    def crowded(loop):
        beats.append(len(loop.running))
        if len(beats) % 3 == 0 and loop.running:
            loop.preempt(loop.running[-1])
        make_room(loop)

    monkeypatch.setattr(Loop, "make_room", crowded)
    out = generate(method, candidates=candidates)
    assert out.stats["preemptions"] > 3 and sound(out) == expected


@pytest.mark.filterwarnings("ignore:a heartbeat broke off")
@pytest.mark.parametrize("step", ["score", "note"])
def test_a_heartbeat_that_breaks_off_changes_no_text(monkeypatch, method, expected, step):
    calls, whole = [], getattr(Loop, step)

    def breaks(loop, *args):
        calls.append(step)
        if len(calls) % 4 == 2:
            raise RuntimeError("planted")
        return whole(loop, *args)

    monkeypatch.setattr(Loop, step, breaks)
    assert sound(generate(method, candidates=2)) == expected


@pytest.mark.parametrize("candidates", [1, 4])
def test_nothing_in_front_of_a_cut_is_read_again(candidates):
    """Each token drawn costs a token read, by both models, and a prompt is read once."""
    engine, read = make_engine(), []
    forward = engine.policy.forward

    def counted(ids, *args, **kwargs):
        read.append(ids.numel())
        return forward(ids, *args, **kwargs)

    engine.policy.forward = counted
    method = MetropolisHastings(steps=16)
    out = generate(method, engine, [PROMPTS[0]], [1], candidates=candidates, ignore_eos=True, beta=100.0)
    assert candidates > 1 or out.stats["policy_tokens"] < 0.8 * 17 * 12, "hardly a redraw was shorter than an answer"
    assert sum(read) <= len(PROMPTS[0]) + out.stats["policy_tokens"]
    assert out.stats["reward_tokens"] <= len(PROMPTS[0]) + out.stats["policy_tokens"]


def test_a_weighted_reward_forks_its_parts_at_the_cut():
    class Sums(Reward):
        def score(self, completions):
            return sum_reward([completion.tokens for completion in completions])

    parts = {"classifier": (1.0, ClassifierReward(tiny_reward(VOCAB, hidden=32))), "sums": (0.5, Sums())}
    out = generate(MetropolisHastings(steps=16), make_engine(WeightedSum(parts)), [PROMPTS[0]], [1], ignore_eos=True)
    assert out.stats["reward_tokens"] <= len(PROMPTS[0]) + out.stats["policy_tokens"]
    (completion,) = sound(out)
    hidden = tiny_reward(VOCAB, hidden=32).model(torch.tensor([PROMPTS[0] + completion])).last_hidden_state[0, -1]
    whole = tiny_reward(VOCAB, hidden=32).score(hidden).item() + 0.5 * sum_reward([completion])[0]
    assert out.rewards == [pytest.approx(whole, abs=1e-4)]


def test_the_trace_shows_every_proposal_and_which_of_them_wrote_a_segment():
    method = MetropolisHastings(steps=8)
    out = generate(method, trace=True, candidates=3)
    for completion, segments in zip(sound(out), out.segments, strict=True):
        seen = segments[0].candidates
        assert [one.attempt for one in seen] == list(range(9)) and seen[0].verdict == "accepted"
        assert {one.verdict for one in seen} <= {"accepted", "rejected"}
        state = [one for one in seen if one.verdict == "accepted"][-1]
        assert state.tokens == completion and segments[-1].attempts == state.attempt + 1
        assert all(seen[segment.attempts - 1].verdict == "accepted" for segment in segments)
        assert [segment.attempts for segment in segments] == sorted(segment.attempts for segment in segments)
        assert all((one.threshold < one.score) == (one.verdict == "accepted") for one in seen)
        assert [math.isnan(segment.reward) for segment in segments] == [True] * (len(segments) - 1) + [False]
    assert any(one.verdict == "rejected" for segments in out.segments for one in segments[0].candidates)
    longer = generate(MetropolisHastings(steps=12), trace=True)
    for more, less in zip(longer.segments, out.segments, strict=True):
        assert [one.tokens for one in more[0].candidates[:9]] == [one.tokens for one in less[0].candidates]


def test_each_of_several_chains_is_as_likely_to_be_the_answer():
    out = generate(MetropolisHastings(steps=2, chains=3), None, [[8]], 3, trace=True, num_return_sequences=60)
    chosen = [segments[-1].attempts - 1 for segments in out.segments]
    assert all(len(segments[0].candidates) == 9 for segments in out.segments)
    assert [out.segments[row][0].candidates[attempt].tokens for row, attempt in enumerate(chosen)] == sound(out)
    counts = [sum(attempt // 3 == chain for attempt in chosen) for chain in range(3)]
    assert (
        min(counts) > 8
        and len({tuple(one.tokens) for one in out.segments[0][0].candidates if not one.attempt % 3}) == 3
    )


def test_a_proposal_that_fails_costs_nothing_where_it_is_drawn_anew():
    """One at a time it would never have been drawn."""

    def picky(completions):
        values = zip(completions, sum_reward(completions), strict=True)
        return [None if sum(ids) % 7 == 0 else value for ids, value in values]

    alone, beside = (
        generate(MetropolisHastings(steps=4), make_engine(picky), num_return_sequences=4, candidates=count)
        for count in (1, 4)
    )
    assert alone.completions == beside.completions and alone.finish_reasons == beside.finish_reasons
    assert 0 < alone.finish_reasons.count("error") < 12


def test_what_a_rewards_fork_raises_ends_that_request_alone():
    class Stuck(Reward):
        def score(self, completions):
            return sum_reward([completion.tokens for completion in completions])

        def fork_at(self, response, length):
            if response.prompt.index == 1:
                raise RuntimeError("no")
            return super().fork_at(response, length)

    out = generate(MetropolisHastings(steps=3), make_engine(Stuck()))
    assert [error and "the reward's fork_at raised RuntimeError: no" in error for error in out.errors] == [
        None,
        True,
        None,
    ]


def test_answers_that_are_rejected_for_good_are_never_moved_to():
    def half(completions):
        return [-math.inf if sum(ids) % 2 else 0.0 for ids in completions]

    out = generate(MetropolisHastings(steps=12), make_engine(half), trace=True, num_return_sequences=4)
    assert out.rewards == [0.0] * 12
    first = [segments[0].candidates[0].reward for segments in out.segments]
    assert -math.inf in first and 0.0 in first

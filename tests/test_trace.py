"""What was looked at is kept for whoever asks, under every method, and asking changes nothing."""

import math

import pytest
from conftest import sum_reward, tiny_policy, tiny_reward
from test_methods import EVERY, PROMPTS, SEEDS, VOCAB, generate, make_engine

from stars_fast import StarsConfig, StarsEngine
from stars_fast.loop import core
from stars_fast.loop.in_order import Pass
from stars_fast.methods import BestOfN, ParticleFilter
from stars_fast.rewards import RuleReward

pytestmark = pytest.mark.filterwarnings("ignore:method=.* itself")


@pytest.fixture(scope="module", params=EVERY)
def both(request):
    """The same call without and with a trace."""
    engine = make_engine(tiny_reward(VOCAB, hidden=32))
    return request.param, *(
        generate(engine, EVERY[request.param], candidates=3, trace=trace) for trace in (False, True)
    )


def test_texts_rewards_attempts_and_costs_are_those_without_it(both):
    _, off, on = both
    assert off.completions == on.completions and off.finish_reasons == on.finish_reasons
    assert off.rewards == pytest.approx(on.rewards, abs=1e-4, nan_ok=True)
    for name in ("policy_tokens", "reward_tokens", "committed_tokens", "heartbeats"):
        assert off.stats[name] == on.stats[name], name
    for plain, traced in zip(off.segments, on.segments, strict=True):
        assert all(segment.candidates is None for segment in plain)
        assert [(s.tokens, s.attempts, s.accepted) for s in plain] == [
            (s.tokens, s.attempts, s.accepted) for s in traced
        ]


def test_the_candidates_looked_at_are_the_attempts_and_one_of_them_is_the_segment(both):
    name, _, out = both
    for segments in out.segments:
        if EVERY[name].loop == "chains":  # whole answers, under the first segment: tests/test_loop_chains.py
            assert [one.attempt for one in segments[0].candidates] == list(range(5))
            continue
        for place, segment in enumerate(segments):
            won = [one for one in segment.candidates if one.verdict in ("accepted", "fallback")]
            assert [one.tokens for one in won] == [segment.tokens]
            assert won[0].verdict == ("accepted" if segment.accepted else "fallback")
            assert won[0].reward == pytest.approx(segment.reward, nan_ok=True)
            looked_at = [one for one in segment.candidates if one.verdict != "unseen"]
            if name == "persona_judge":  # a block as it was drafted, where not all of it stood
                assert len(looked_at) in (1, 2)
            elif EVERY[name].loop != "population" or place < len(segments) - 1:
                assert len(looked_at) == segment.attempts


def test_what_nobody_looked_at_is_unseen_and_costs_no_reward(monkeypatch):
    monkeypatch.setattr(core, "PASS", Pass(0, 0))  # each stage of scoring is as small as it pays
    config = StarsConfig(segment_length=4, max_attempts=8, target_reward=1.0, beta=0.6, max_new_tokens=18)
    engine = StarsEngine(tiny_policy(VOCAB, hidden=32), tiny_reward(VOCAB, hidden=32))
    out = engine.generate(PROMPTS, config, seed=SEEDS, candidates=5, trace=True)
    candidates = [segment.candidates for segments in out.segments for segment in segments]
    drawn = sum(len(one.tokens) for group in candidates for one in group)
    unseen = [one for group in candidates for one in group if one.verdict == "unseen"]
    assert drawn == out.stats["policy_tokens"]
    assert any(math.isnan(one.reward) for one in unseen)
    assert all([one.attempt for one in group] == list(range(len(group))) for group in candidates)
    assert not any(math.isnan(one.reward) for group in candidates for one in group if one.verdict != "unseen")


@pytest.mark.parametrize("trace", [False, True])
def test_an_answer_that_fails_with_candidates_left_is_a_failure_of_its_own(monkeypatch, trace):
    monkeypatch.setattr(core, "PASS", Pass(0, 0))

    class Fragile(RuleReward):
        def score(self, completions):
            return [ValueError("no") if one.response.prompt.source == [8] else 0.0 for one in completions]

    config = StarsConfig(segment_length=4, target_reward=5.0, base_reward=0.0, max_attempts=8, max_new_tokens=8)
    engine = StarsEngine(tiny_policy(VOCAB, hidden=32), Fragile(predicates={len: 1.0}))
    with pytest.warns(UserWarning, match="1 of 3"):
        out = engine.generate(PROMPTS, config, seed=SEEDS, candidates=5, trace=trace)
    assert [error is None for error in out.errors] == [True, False, True] and "no" in out.errors[1]
    if trace:
        assert [one.verdict for one in out.origin.unfinished[1]] == ["error", *["unseen"] * 4]


def test_the_round_in_which_a_population_fails_was_looked_at():
    class Fragile(RuleReward):
        def score(self, completions):
            own = [i for i, one in enumerate(completions) if one.response.prompt.source == [8]]
            return [ValueError("no") if i in own[:1] else 0.0 for i in range(len(completions))]

    config = StarsConfig(segment_length=4, max_new_tokens=8)
    engine = StarsEngine(tiny_policy(VOCAB, hidden=32), Fragile(predicates={len: 1.0}))
    with pytest.warns(UserWarning, match="1 of 3"):
        out = engine.generate(PROMPTS, config, seed=SEEDS, method=ParticleFilter(particles=4), trace=True)
    assert [one.verdict for one in out.origin.unfinished[1]] == ["error", *["rejected"] * 3]


def test_a_population_has_a_tree_whose_branch_is_the_answer():
    for seed in range(4):
        out = generate(make_engine(), ParticleFilter(particles=4), seed=[seed] * 3, trace=True)
        for completion, segments in zip(out.completions, out.segments, strict=True):
            every = [one for segment in segments for one in segment.candidates]
            assert [one.attempt for one in every] == list(range(len(every)))
            (place,) = (one.attempt for one in segments[-1].candidates if one.verdict == "accepted")
            branch = []
            while place is not None:
                assert every[place].verdict == "accepted"
                branch, place = every[place].tokens + branch, every[place].parent
            assert branch == completion
            assert all(one.parent is None or one.parent < one.attempt for one in every)
            assert [one.attempt for one in every if one.parent is None] == [0, 1, 2, 3]


def test_whole_answers_on_trial_are_candidates_with_their_rewards():
    out = generate(make_engine(), BestOfN(n=3), trace=True)
    for (segment,), reward in zip(out.segments, out.rewards, strict=True):
        assert sum_reward([one.tokens for one in segment.candidates]) == [one.reward for one in segment.candidates]
        assert max(one.reward for one in segment.candidates) == reward

"""Optimal stopping in the loop: the text is that of looking at one candidate after another."""

import math
from dataclasses import replace

import pytest
from conftest import sum_reward, tiny_policy, tiny_reward
from test_methods_fit import drawn

from stars_fast import StarsConfig, StarsEngine
from stars_fast.inputs.fits import made_for
from stars_fast.inputs.sampling import resolve_sampling
from stars_fast.methods import OptimalStopping
from stars_fast.methods.fit import learn

VOCAB = 32
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15], [16], [17, 18]]
SEEDS = [11, 12, 13, 14, 15, 16]
CONFIG = StarsConfig(segment_length=4, max_attempts=12, max_new_tokens=18, method=OptimalStopping(budget=3.0))


def engine(reward=None, **settings):
    return StarsEngine(tiny_policy(VOCAB, hidden=32), reward or tiny_reward(VOCAB, hidden=32), **settings)


@pytest.fixture(scope="module", params=[True, False], ids=["fit", "no fit"])
def config(request):
    if not request.param:
        return CONFIG
    one = engine()
    made = made_for(CONFIG, resolve_sampling(CONFIG, one.policy.model, None), one.policy, one.reward)
    return CONFIG.replace(fit=replace(learn(drawn(60), {}, {}), made_for=made))


@pytest.fixture(scope="module")
def alone(config):
    """One candidate after another, one prompt after another."""
    outputs = [engine().generate([p], config, seed=[s], candidates=1) for p, s in zip(PROMPTS, SEEDS, strict=True)]
    return [output.completions[0] for output in outputs], [output.segments[0] for output in outputs]


def test_a_text_does_not_depend_on_candidates_neighbours_or_room(config, alone):
    for settings in ({"candidates": 5}, {"candidates": "auto"}, {"candidates": "auto", "max_rows": 3}):
        rows = settings.pop("max_rows", None)
        out = engine(max_rows=rows).generate(PROMPTS, config, seed=SEEDS, **settings)
        assert out.completions == alone[0]
    out = engine(kv_cache_tokens=60).generate(PROMPTS, config, seed=SEEDS)
    assert out.stats["preemptions"] > 0
    assert out.completions == alone[0]


def test_the_best_of_those_looked_at_is_committed_once_it_reaches_the_threshold(config):
    out = engine().generate(PROMPTS, config, seed=SEEDS, candidates=4, trace=True)
    segments = [segment for row in out.segments for segment in row]
    assert len({segment.attempts for segment in segments}) > 2
    for segment in segments:
        looked = [one for one in segment.candidates if one.verdict != "unseen"]
        assert [one.attempt for one in segment.candidates] == list(range(len(segment.candidates)))
        assert len(looked) == segment.attempts <= config.max_attempts
        best = max(looked, key=lambda one: one.reward)
        assert (segment.tokens, segment.reward) == (best.tokens, best.reward)
        assert best.verdict == ("accepted" if segment.accepted else "fallback")
        so_far = -math.inf
        for one in looked[:-1]:
            so_far = max(so_far, one.reward)
            assert so_far < one.threshold
        assert segment.threshold == looked[-1].threshold, "what it was enough for"
        assert segment.accepted == (best.reward >= looked[-1].threshold)
        assert segment.accepted or segment.attempts == config.max_attempts


def test_the_engine_says_no_more_of_candidates_than_was_asked_for(config):
    out = engine().generate(PROMPTS[:1], config, seed=0)
    assert all(segment.candidates is None for row in out.segments for segment in row)


def test_rewards_that_reject_for_good_are_never_the_best():
    def reward(prompts, completions, **_):
        return [-math.inf if ids and ids[-1] % 2 else float(sum(ids)) for ids in completions]

    out = engine(reward).generate(PROMPTS, CONFIG, seed=SEEDS)
    assert out.errors == [None] * len(PROMPTS)
    assert all(math.isfinite(reward) for reward in out.rewards)


def test_a_candidate_that_cannot_be_scored_ends_its_request_alone():
    def reward(prompts, completions, **_):
        return [
            None if prompt == PROMPTS[2] else 1.0 * sum(ids) for prompt, ids in zip(prompts, completions, strict=True)
        ]

    out = engine(reward).generate(PROMPTS, CONFIG, seed=SEEDS)
    whole = engine(sum_reward).generate(PROMPTS, CONFIG, seed=SEEDS)
    assert [error is not None for error in out.errors] == [prompt == PROMPTS[2] for prompt in PROMPTS]
    assert out.finish_reasons.count("error") == 1
    assert len(whole.completions) == len(PROMPTS)


def test_a_search_that_fails_is_its_request_s_own_error(monkeypatch):
    def search(self, *_):
        raise ZeroDivisionError("spread 0")

    monkeypatch.setattr(OptimalStopping, "search", search)
    out = engine().generate(PROMPTS[:2], CONFIG, seed=SEEDS[:2])
    assert all("optimal stopping raised ZeroDivisionError: spread 0" in error for error in out.errors)


def test_what_is_drawn_side_by_side_goes_by_the_budget():
    """Before a heartbeat has told anything: of many rows, more where more will be looked at."""
    drawn = []
    for budget in (1.5, 10.0):
        one, first = engine(max_rows=64), []
        one.on_heartbeat = first.append
        one.generate(PROMPTS[:2], CONFIG, seed=0, method=OptimalStopping(budget=budget), max_new_tokens=4)
        drawn.append(first[0].drawn)
    assert drawn[0] < drawn[1]

"""Candidates behind an accepted one are not scored, and nothing else changes."""

import itertools
import math
import random
from dataclasses import replace

import numpy as np
import pytest
from conftest import make_requests, sum_reward, tiny_policy, tiny_reward
from test_methods_fit import drawn

from stars_fast import StarsConfig, StarsEngine
from stars_fast.inputs.fits import made_for
from stars_fast.inputs.sampling import resolve_sampling
from stars_fast.loop import core
from stars_fast.loop.heartbeat import Loop
from stars_fast.loop.in_order import Pass, first_stage
from stars_fast.loop.scheduler import Scheduler
from stars_fast.methods import Cards, OptimalStopping
from stars_fast.methods.fit import learn
from stars_fast.rewards import Reward, RuleReward, WeightedSum

VOCAB = 32
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15], [16], [17, 18]]
SEEDS = [11, 12, 13, 14, 15, 16]
CONFIG = StarsConfig(
    segment_length=4, max_attempts=8, target_reward=1.0, beta=0.6, max_new_tokens=18, ignore_eos=True, candidates=5
)


def engine(reward=None, **settings):
    return StarsEngine(tiny_policy(VOCAB, hidden=32), reward or tiny_reward(VOCAB, hidden=32), **settings)


def run(in_order, config=CONFIG, reward=None, **settings):
    one = engine(reward, **settings)
    one.core.in_order = in_order
    return one.generate(PROMPTS, config, seed=SEEDS)


@pytest.fixture
def one_by_one(monkeypatch):
    """Passes that cost no more than their tokens."""
    monkeypatch.setattr(core, "PASS", Pass(0, 0))


@pytest.fixture
def erratic(monkeypatch):
    """Stages of any size."""
    rng = random.Random(0)

    def some(scheduler, requests, groups):
        most = max((len(group) for group in groups), default=1)
        return most if scheduler.scoring is None else rng.randint(1, most)

    monkeypatch.setattr(Scheduler, "looked_at_together", some)


def fitted(method):
    one = engine()
    config = CONFIG.replace(method=method, target_reward=None)
    ruled = config.chosen_method.rule(config)
    made = made_for(ruled, resolve_sampling(ruled, one.policy.model, None), one.policy, one.reward)
    return config.replace(fit=replace(learn(drawn(60), {}, {}), made_for=made))


def same(got, want):
    assert got.completions == want.completions
    assert (got.finish_reasons, got.errors) == (want.finish_reasons, want.errors)
    assert got.rewards == pytest.approx(want.rewards, abs=1e-4, nan_ok=True)
    for ours, theirs in zip(itertools.chain(*got.segments), itertools.chain(*want.segments), strict=True):
        assert (ours.tokens, ours.attempts, ours.accepted) == (theirs.tokens, theirs.attempts, theirs.accepted)
        assert ours.threshold == pytest.approx(theirs.threshold, abs=1e-4)
    for name in ("policy_tokens", "committed_tokens", "heartbeats", "rows"):
        assert got.stats[name] == want.stats[name]


CONFIGS = {
    "stars": lambda: CONFIG,
    "cards": lambda: CONFIG.replace(method=Cards(entropy=2.0, shortest=2, longest=5)),
    "optimal stopping": lambda: CONFIG.replace(method=OptimalStopping(budget=2.5)),
    "optimal stopping with a fit": lambda: fitted(OptimalStopping(budget=2.5)),
    "quantiles": lambda: fitted("stars"),
    "cards on quantiles": lambda: fitted(Cards(entropy=2.0, shortest=2, longest=4)),
}


@pytest.mark.parametrize("method", CONFIGS)
def test_texts_rewards_attempts_and_verdicts_are_those_of_one_pass(method, erratic):
    config = CONFIGS[method]()
    whole = run(False, config)
    assert max(segment.attempts for row in whole.segments for segment in row) > 2
    in_stages = run(True, config)
    same(in_stages, whole)
    assert in_stages.stats["reward_tokens"] < whole.stats["reward_tokens"]


def test_as_many_candidates_are_scored_as_were_looked_at(one_by_one):
    out = run(True)
    looked_at = sum(len(segment.tokens) * segment.attempts for row in out.segments for segment in row)
    empty = sum(map(len, PROMPTS)) + len(PROMPTS)  # a token of each is read again for the empty answer
    assert out.stats["reward_tokens"] == empty + looked_at
    assert run(False).stats["reward_tokens"] == empty + out.stats["policy_tokens"]


def test_the_scheduler_learns_from_what_was_scored(one_by_one):
    one, seen = engine(), []
    one.on_heartbeat = seen.append
    out = one.generate(PROMPTS, CONFIG, seed=SEEDS)
    attempts = sum(segment.attempts for row in out.segments for segment in row)
    assert seen[-1].tested == attempts == sum(beat.timing.looked_at for beat in seen)
    assert attempts < sum(beat.timing.rows for beat in seen)
    assert all(beat.timing.scored == 0 for beat in seen[1:]), "no tokens beside the candidates'"


@pytest.mark.parametrize("slots", [60, 90])
def test_where_room_is_short_nothing_changes(erratic, slots):
    out = run(True, CONFIG.replace(candidates="auto"), kv_cache_tokens=slots)
    assert out.stats["preemptions"] > 0 or slots > 60
    assert out.completions == run(False, CONFIG.replace(candidates="auto")).completions


def test_rewards_that_stay_on_their_device_are_looked_at_stage_by_stage(erratic, monkeypatch):
    whole = run(False)
    monkeypatch.setattr(Loop, "_stays", lambda loop, scores, drawn: scores.tensor is not None)
    same(run(True), whole)


# Errors


class OfIds(Reward):
    """A plain scorer that says it is worth asking in order."""

    in_order = True

    def __init__(self, function):
        self.function, self.asked = function, []

    def score(self, completions):
        self.asked.append(len(completions))
        return self.function([completion.tokens for completion in completions])


@pytest.mark.parametrize("bad", [math.nan, math.inf, RuntimeError("no")])
def test_an_error_is_met_only_where_it_is_reached(erratic, bad):
    def rarely_bad(completions):
        rewards = sum_reward(completions)
        return [bad if ids and sum(ids) % 13 == 0 else r for ids, r in zip(completions, rewards, strict=True)]

    config = CONFIG.replace(num_return_sequences=8, target_reward=0.5)
    whole, in_stages = run(False, config, OfIds(rarely_bad)), run(True, config, OfIds(rarely_bad))
    assert 4 < whole.finish_reasons.count("error") < 44
    same(in_stages, whole)


def test_a_stage_that_raises_fails_only_what_it_is_about(erratic):
    def fails(completions):
        if any(len(ids) > 8 and ids[0] == first for ids in completions):
            raise RuntimeError("the judge is out")
        return sum_reward(completions)

    first = run(False, reward=OfIds(sum_reward)).completions[2][0]
    same(run(True, reward=OfIds(fails)), run(False, reward=OfIds(fails)))


def test_no_slot_is_lost(erratic):
    one = engine(kv_cache_tokens=100)
    for seed in range(6):
        assert one.generate(PROMPTS, CONFIG, seed=seed).errors == [None] * 6
    with one.core._turn():
        assert one.policy.tree.live_slots == one.reward.tree_models[0].tree.live_slots == 0


# Who is asked in one pass


def calls(reward, config=CONFIG, **settings):
    """Calls of the scorer a heartbeat, where one is not for the empty answers."""
    one = engine(reward)
    out = one.generate(PROMPTS, config, seed=SEEDS, **settings)
    return len(reward.asked) / out.stats["heartbeats"]


def test_a_function_has_all_candidates_in_one_call(one_by_one):
    asked = []

    def reward(completions):
        asked.append(len(completions))
        return sum_reward(completions)

    out = engine(reward).generate(PROMPTS, CONFIG, seed=SEEDS)
    assert len(asked) == out.stats["heartbeats"] + 1, "and one for the empty answers"
    assert sum(asked) == sum(rows * beats for rows, beats in out.stats["rows"].items()) + len(PROMPTS)


def test_methods_that_look_at_all_candidates_have_one_pass(one_by_one):
    base = CONFIG.replace(alpha=1.0)
    assert calls(OfIds(sum_reward), base) > 1.5
    assert calls(OfIds(sum_reward), base.replace(method="blockwise_best_of_n", target_reward=None)) == 1
    assert calls(OfIds(sum_reward), base.replace(method=OptimalStopping(budget=20))) == 1


def test_a_sum_is_asked_in_order_where_all_its_parts_are():
    rule = RuleReward(predicates={len: 1.0})
    assert WeightedSum([(1.0, rule), (1.0, OfIds(sum_reward))]).in_order
    assert not WeightedSum([(1.0, rule), (1.0, type("Plain", (Reward,), {"score": None})())]).in_order


def test_calls_of_several_methods_share_heartbeats(erratic):
    def texts(in_order):
        one = engine()
        one.core.in_order = in_order
        configs = [CONFIG, CONFIG.replace(method="blockwise_best_of_n", target_reward=None)]
        configs += [CONFIG.replace(method=OptimalStopping(budget=2.5)), CONFIG.replace(method="best_of_n")]
        streams = [one.stream(PROMPTS[:3], config, seed=SEEDS[:3]) for config in configs]
        events = [event for together in itertools.zip_longest(*streams) for event in together if event is not None]
        assert not any(event.error for event in events)
        return sorted((len(event.segment.tokens), event.segment.tokens, event.segment.attempts) for event in events)

    assert texts(True) == texts(False)


# How large stages are


def plans(most):
    return ([0, *cuts, most] for n in range(most) for cuts in itertools.combinations(range(1, most), n))


def expected(stops, sizes, tokens, acceptance, cost):
    total = 0.0
    for first, last in itertools.pairwise(stops):
        parts = zip(sizes, tokens, acceptance, strict=True)
        total += cost(np.array(sum(max(min(last, n) - first, 0) * t * (1 - a) ** first for n, t, a in parts)))
    return total


def test_the_first_stage_is_that_of_the_cheapest_plan():
    rng = random.Random(0)
    for _ in range(60):
        n, cost = rng.randint(1, 30), Pass(rng.choice([0, 32, 200]), rng.choice([0, 20, 100]))
        sizes = [rng.randint(1, 6) for _ in range(n)]
        tokens, acceptance = [rng.randint(1, 20) for _ in sizes], [rng.uniform(0.02, 0.98) for _ in sizes]
        case = sizes, tokens, acceptance, cost
        best = min(expected(stops, *case) for stops in plans(max(sizes)))
        chosen = min(expected(stops, *case) for stops in plans(max(sizes)) if stops[1] == first_stage(*case))
        assert chosen == pytest.approx(best)


def test_few_tokens_and_candidates_that_are_hardly_accepted_have_one_pass():
    cost = Pass(512, 128)
    assert first_stage([3] * 16, [16] * 16, [0.5] * 16, cost) == 3
    assert first_stage([3] * 64, [16] * 64, [0.02] * 64, cost) == 3
    assert first_stage([3] * 64, [16] * 64, [0.5] * 64, cost) == 1
    assert first_stage([1] * 64, [16] * 64, [0.5] * 64, cost) == 1


def test_rows_are_not_priced_with_scoring_that_they_would_not_cost():
    scheduler = Scheduler(400, 100_000)
    for rows in range(64, 320):  # scoring is dear
        scheduler.cost.propose.observe(rows, 0, 16 * (1 + 1e-3 * rows), 16)
        scheduler.cost.score.observe(rows, 0, 16 * 1e-2 * rows, 16)
    once, in_order = (scheduler.shares([0.4] * 64, [20] * 64, 400, together) for together in (None, 64))
    assert sum(once) < sum(in_order)
    requests = make_requests(CONFIG.replace(candidates="auto"), *[3] * 64)
    scheduler.scoring = Pass(64, 32)
    assert scheduler.candidates(requests, [20] * 64, 400, 10_000) == scheduler.shares(
        scheduler.acceptance(requests), [20] * 64, 400, scheduler.scoring.undivided // CONFIG.segment_length
    )

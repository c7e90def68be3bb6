"""Rows and slots are never exceeded, are given to whom they help most, and waiting is the last resort.

What happens where requests outgrow the slots stands in test_loop_queue.py.
"""

import itertools
import math
from collections import Counter

import pytest
import torch
from conftest import make_requests, sum_reward, tiny_policy, tiny_reward

from stars_fast import StarsConfig, StarsEngine
from stars_fast.loop.row_cost import HeartbeatCost
from stars_fast.loop.scheduler import Scheduler, acceptance_estimates
from stars_fast.text.media import Media

CONFIG = StarsConfig(segment_length=4, max_attempts=6, target_reward=1.5, beta=0.6, max_new_tokens=12)


def requests(*lengths, config=CONFIG, **fields):
    return make_requests(config, *lengths, **fields)


# Rows


def test_no_row_is_added_that_costs_more_than_it_brings():
    scheduler = Scheduler(64, 10_000)
    assert scheduler.shares([0.98] * 3, [20] * 3, 60) == [1, 1, 1]
    (few,), (many,) = scheduler.shares([0.6], [20], 64), scheduler.shares([0.1], [20], 64)
    assert 1 < few < many <= 20


def test_everybody_has_a_row_even_where_there_are_too_few():
    assert Scheduler(2, 10_000).shares([0.5] * 3, [5] * 3, 2) == [1, 1, 1]


def test_requests_that_were_accepted_more_often_are_expected_to_be_again():
    lucky, unlucky, new = requests(3, 3, 3)
    lucky.acceptance_sum, lucky.scored = 18.0, 20
    unlucky.acceptance_sum, unlucky.scored = 0.2, 20
    estimates = acceptance_estimates([lucky, unlucky, new])
    assert estimates[0] > estimates[2] > estimates[1]
    assert all(0 < estimate < 1 for estimate in acceptance_estimates(requests(1, 1)))


def test_a_new_request_is_expected_to_be_like_those_that_have_ended():
    scheduler, (ended, new) = Scheduler(4, 1000), requests(3, 3)
    ended.acceptance_sum, ended.scored = 1.0, 100
    before = scheduler.acceptance([new])
    scheduler.retire(ended)
    assert scheduler.acceptance([new])[0] < 0.1 < before[0]


# Candidates


def drawn(scheduler, running):
    """Candidates of requests that have the scheduler to themselves."""
    limits = [request.terms.config.max_attempts - request.attempts for request in running]
    return scheduler.candidates(running, limits, scheduler.max_rows, scheduler.spare(running))


@pytest.mark.parametrize("candidates", ["auto", 1, 3, 50])
def test_candidates_stay_within_rows_slots_attempts_and_the_setting(candidates):
    for max_rows, slots in itertools.product([3, 5, 100], [21, 26, 40, 1000]):
        running = requests(3, 4, 5, config=CONFIG.replace(candidates=candidates))
        running[1].attempts = CONFIG.max_attempts - 1
        scheduler = Scheduler(max_rows, slots)
        assert scheduler.held(running) == 12 and scheduler.spare(running) == slots - 21
        shares = drawn(scheduler, running)
        assert min(shares) >= 1 and shares[1] == 1 and max(shares) <= CONFIG.max_attempts
        assert sum(shares) <= max_rows
        assert scheduler.held(running) + sum(shares) * (CONFIG.segment_length - 1) <= slots
        if candidates != "auto":
            assert max(shares) <= candidates


@pytest.mark.parametrize("rows", [6, 7, 9, 14, 40])
@pytest.mark.parametrize("spare", [-3, 0, 9, 1000])
def test_requests_of_any_settings_share_rows_and_nobody_goes_without(rows, spare):
    """Those that were told how many beside those that are free, that accept nothing, and that accept everything."""
    told = [request for count in (1, 3, 50) for request in requests(3, config=CONFIG.replace(candidates=count))]
    running = told + requests(3) + requests(3, target=math.inf) + requests(3, target=-math.inf)
    limits = [6, 6, 5, 4, 6, 6]
    shares = Scheduler(rows, 1000).candidates(running, limits, rows, spare)
    assert min(shares) >= 1 and all(share <= most for share, most in zip(shares, limits, strict=True))
    assert shares[0] == 1 and shares[1] <= 3
    assert shares[5] == 1, "what accepts everything has no use for a second candidate"
    assert sum(shares) <= min(rows, 6 + max(spare, 0) // CONFIG.segment_length)
    if rows == 40 and spare == 1000:
        assert shares[:3] == [1, 3, 5] and shares[4] == 6


def test_where_nothing_is_accepted_all_attempts_are_drawn_at_once():
    running = requests(3, 4, 5, target=math.inf)
    assert drawn(Scheduler(100, 1000), running) == [CONFIG.max_attempts] * 3
    assert drawn(Scheduler(9, 1000), running) == [3, 3, 3]


# Admission


def test_admission_stops_at_the_last_row():
    scheduler, waiting = Scheduler(4, 10_000), requests(3, 3, 3, 3, 3, 3)
    assert scheduler.admit(waiting, []) == 4
    assert scheduler.admit(waiting[3:], waiting[:3]) == 1
    assert scheduler.admit(waiting[4:], waiting[:4]) == 0


def test_admission_counts_a_shared_prompt_once():
    waiting = requests(100, samples=4)
    two_heartbeats = 2 * CONFIG.segment_length - 1
    enough = 100 + 4 * two_heartbeats + 1  # and a slot in a hundred to spare
    assert Scheduler(64, enough).admit(waiting, []) == 4
    assert Scheduler(64, enough - 1).admit(waiting, []) == 3
    assert Scheduler(64, enough).admit(waiting[2:], waiting[:2]) == 2


def test_admission_counts_what_a_request_had_before_it_was_preempted():
    scheduler, waiting = Scheduler(64, 55), requests(10, 10, 10)
    assert scheduler.admit(waiting, []) == 3
    waiting[1].tokens[:] = [1] * 8
    assert scheduler.admit(waiting, []) == 2
    scheduler.prefill_tokens = 20
    assert scheduler.admit(waiting, []) == 1


def test_admission_keeps_the_order():
    """A long prompt that does not fit yet is not overtaken for ever."""
    scheduler, waiting = Scheduler(64, 60), requests(40, 2)
    assert scheduler.admit(waiting, requests(10)) == 0


def test_one_very_long_prompt_is_admitted_by_itself():
    scheduler = Scheduler(64, 100_000)
    assert scheduler.admit(requests(9000, 5), []) == 1
    assert scheduler.admit(requests(5, 9000), []) == 1


def test_rows_of_a_batch_that_one_pass_reads_are_admitted_together():
    scheduler, pending = Scheduler(64, 100_000), requests(3000, 3000, 3000, 3000)
    assert scheduler.admit(pending, []) == 1, "or this shows nothing"
    batch = {"input_ids": torch.zeros(3, 1000)}
    for row, request in enumerate(pending[:3]):
        request.prompt.media = Media(batch, row)
    assert scheduler.admit(pending, []) == 3
    assert scheduler.admit(pending[::-1], []) == 1


def test_what_is_encoded_takes_no_longer_than_decoding_unless_more_requests_wait_for_it():
    scheduler, length = Scheduler(64, 10_000), CONFIG.segment_length
    assert scheduler.encoding_tokens(running=0, encoding=3, segment_length=length) == scheduler.prefill_tokens
    one = scheduler.encoding_tokens(running=8, encoding=1, segment_length=length)
    assert one == int((length * (1 + 0.06 * 8) - 1) / 0.06) == scheduler.encoding_tokens(8, 8, length)
    assert scheduler.encoding_tokens(8, 24, length) == pytest.approx(3 * one, abs=3)
    scheduler.prefill_tokens = 5
    assert scheduler.encoding_tokens(8, 24, length) == 5


# In the engine


class Watch:
    """Counts rows and live slots at every proposal."""

    def __init__(self, engine, monkeypatch):
        self.rows, self.requests, self.live = [], [], []
        policy, propose = engine.policy, engine.policy.propose

        def watched(leaves):
            draws = propose(leaves)
            self.requests.append(len(leaves))
            self.rows.append(sum(leaf.candidates for leaf in leaves))
            self.live.append(policy.tree.live_slots)
            return draws

        monkeypatch.setattr(policy, "propose", watched)


PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15]]


def watched(monkeypatch, config=CONFIG, **limits):
    engine = StarsEngine(tiny_policy(32, hidden=32), sum_reward, **limits)
    watch = Watch(engine, monkeypatch)
    out = engine.generate(PROMPTS, config, seed=0, num_return_sequences=2)
    assert out.errors == [None] * 8
    return watch


@pytest.mark.parametrize("max_rows", [1, 2, 7, 64])
def test_the_engine_never_runs_more_rows_than_max_rows(monkeypatch, max_rows):
    watch = watched(monkeypatch, CONFIG.replace(candidates=6), max_rows=max_rows)
    assert max(watch.rows) <= max_rows
    assert max(watch.rows) >= min(max_rows, 7)


@pytest.mark.parametrize("slots", [21, 50, 120])
def test_the_engine_never_holds_more_tokens_than_kv_cache_tokens(monkeypatch, slots):
    watch = watched(monkeypatch, CONFIG.replace(candidates=6), kv_cache_tokens=slots)
    assert slots / 2 <= max(watch.live) <= slots


def test_candidates_shrink_before_requests_wait(monkeypatch):
    """With room for eight rows, eight requests run side by side with one candidate each; with room for 16, with two."""
    narrow = watched(monkeypatch, CONFIG.replace(candidates=6), max_rows=8)
    assert narrow.requests[0] == 8 and narrow.rows[0] == 8
    wide = watched(monkeypatch, CONFIG.replace(candidates=6), max_rows=64)
    assert wide.requests[0] == 8 and wide.rows[0] == 48
    slots = sum(map(len, PROMPTS)) + 8 * (2 * CONFIG.segment_length - 1)  # two candidates, or one and what it committed
    tight = watched(monkeypatch, CONFIG.replace(candidates=6), kv_cache_tokens=slots)
    assert tight.requests[0] == 8 and tight.rows[0] == 16


def long_prompt_among_short_ones(monkeypatch, **limits):
    """What twelve prompts give, one of them of 900 tokens; how many tokens each pass of prefill took; who drew when."""
    policy = tiny_policy(32, hidden=32, positions=1200)
    engine = StarsEngine(policy, tiny_reward(32, hidden=32, positions=1200), **limits)
    prompts = [[5, 6, 7], [(7 * i + i // 5) % 31 for i in range(900)], *([8, i] for i in range(10))]
    encoded, prefill = [], engine.policy.prefill
    monkeypatch.setattr(
        engine.policy, "prefill", lambda *args: encoded.append(sum(map(len, args[1]))) or prefill(*args)
    )
    config = CONFIG.replace(max_new_tokens=40, target_reward=-1e6, candidates=1)
    requests = []
    engine.on_heartbeat = lambda one: requests.append(one.requests)
    return engine.generate(prompts, config, seed=list(range(12)), ignore_eos=True), encoded, requests


def test_running_requests_commit_segments_while_a_long_prompt_is_encoded(monkeypatch):
    """Everything is accepted, so in each heartbeat all requests that run commit a segment."""
    out, encoded, _ = long_prompt_among_short_ones(monkeypatch, max_rows=12)
    assert out.errors == [None] * 12
    # All fits into the first heartbeat, where nobody decodes who could be stalled.
    assert out.stats["rows"] == {12: 10} and encoded[0] == 900 + 3 + 20
    # With less room for it, the first request does not wait: it commits three segments before the others run.
    monkeypatch.setattr("stars_fast.loop.scheduler._PREFILL_TOKENS", 256)
    chunked, pieces, requests = long_prompt_among_short_ones(monkeypatch, max_rows=12)
    assert chunked.completions == out.completions
    assert requests[:3] == [1, 1, 1] and max(pieces) <= 256
    assert sum(pieces) == sum(encoded), "nothing is encoded twice"


def test_every_heartbeat_is_counted_by_its_rows_and_requests(monkeypatch):
    engine = StarsEngine(tiny_policy(32, hidden=32), sum_reward, max_rows=7)
    watch = Watch(engine, monkeypatch)
    stats = engine.generate(PROMPTS, CONFIG, seed=0, num_return_sequences=2).stats
    assert stats["rows"] == Counter(watch.rows) and stats["requests"] == Counter(watch.requests)
    assert len(watch.rows) == stats["heartbeats"] and max(stats["rows"]) == 7


def test_an_observer_is_told_of_every_heartbeat():
    engine = StarsEngine(tiny_policy(32, hidden=32), sum_reward, max_rows=7)
    seen = []
    engine.on_heartbeat = seen.append
    out = engine.generate(PROMPTS, CONFIG, seed=0, num_return_sequences=2)
    assert Counter(one.timing.rows for one in seen) == out.stats["rows"]
    assert Counter(one.requests for one in seen) == out.stats["requests"]
    assert sum(one.drawn for one in seen) == out.stats["policy_tokens"]
    assert sum(one.committed for one in seen) == out.stats["committed_tokens"]
    assert seen[-1].tested == sum(one.timing.rows for one in seen)
    assert 0 < seen[-1].accepted < seen[-1].tested
    assert seen[0].timing.encoded and not seen[0].measured and seen[-1].measured


def test_what_a_call_has_learned_of_costs_serves_the_next():
    engine = StarsEngine(tiny_policy(32, hidden=32), sum_reward)
    engine.generate(PROMPTS, CONFIG, seed=0, num_return_sequences=2)
    cost = engine.core.cost
    assert 0 < cost.line()[0] < 1, "seconds, not the prior"
    engine.generate(PROMPTS, CONFIG, seed=1)
    assert engine.core.cost is cost


def test_what_a_call_has_learned_of_acceptance_serves_the_next_and_is_soon_outweighed():
    engine = StarsEngine(tiny_policy(32, hidden=32), sum_reward)
    lenient = CONFIG.replace(target_reward=-1e6)
    expected = [r.terms.method.expected_acceptance for r in requests(3)]
    engine.generate(PROMPTS, lenient, seed=0, num_return_sequences=8)
    scheduler, (new, refused) = Scheduler(4, 1000, before=engine.core._acceptance), requests(3, 3)
    assert scheduler.acceptance([new])[0] > 0.8 > max(expected)
    refused.scored = 64
    scheduler.retire(refused)
    assert scheduler.acceptance([new])[0] < 0.3 and scheduler.remembered()[1] == engine.core._acceptance[1]


@pytest.mark.parametrize("sharded", [False, True])
def test_a_policy_in_several_processes_plans_without_a_clock(sharded, monkeypatch):
    """Each process has a clock of its own, and all must draw and encode alike."""
    engine = StarsEngine(tiny_policy(32, hidden=32), sum_reward)
    engine.policy.sharded = sharded
    used, costs = [], Scheduler.costs
    monkeypatch.setattr(Scheduler, "costs", lambda self, *rows: used.append(self.cost.line()) or costs(self, *rows))
    engine.generate([[1, 2], [3]], CONFIG, seed=0)
    fresh = HeartbeatCost().line()
    assert all(line == fresh for line in used) == (engine.core.cost.line() == fresh) == sharded


def test_a_lack_of_memory_narrows_what_lacked_it_and_not_for_ever():
    scheduler = Scheduler(max_rows=16, kv_cache_tokens=1000)
    full = scheduler.prefill_tokens
    assert scheduler.shrink(tokens=0, rows=10) and (scheduler.max_rows, scheduler.prefill_tokens) == (5, full)
    assert scheduler.shrink(tokens=100, rows=0) and (scheduler.max_rows, scheduler.prefill_tokens) == (5, 50)
    assert not scheduler.shrink(tokens=1000, rows=10)
    for _ in range(2000):
        scheduler.recover()
    assert (scheduler.max_rows, scheduler.prefill_tokens) == (16, full)

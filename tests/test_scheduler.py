"""Rows and slots are never exceeded, are given to whom they help most, and waiting is the last resort.

What happens where requests outgrow the slots stands in test_memory.py.
"""

import itertools

import pytest
from conftest import sum_reward, tiny_policy

from stars_fast import StarsConfig, StarsEngine
from stars_fast.request import PromptNode, Request
from stars_fast.rewards import Response, RewardPrompt
from stars_fast.scheduler import Scheduler, acceptance_estimates, share_rows

CONFIG = StarsConfig(segment_length=4, max_attempts=6, target_reward=1.5, beta=0.6, max_new_tokens=12)


def requests(*lengths, samples=1):
    made = []
    for i, length in enumerate(lengths):
        prompt = PromptNode([1] * length, RewardPrompt(i, [1] * length, [1] * length))
        for j in range(samples):
            response = Response(prompt.reward_prompt)
            made.append(Request(len(made), i, j, prompt, 0, target=1.5, base=0.0, beta=0.6, response=response))
    return made


# What one row more is worth


def expected_acceptances(acceptance, shares):
    return sum(1 - (1 - a) ** m for a, m in zip(acceptance, shares, strict=True))


def test_rows_go_where_they_raise_expected_acceptances_most():
    """Against every other way of sharing the same number of rows."""
    acceptance, limits = [0.05, 0.3, 0.6, 0.95], [6, 6, 2, 6]
    for rows in range(4, 15):
        shares = share_rows(acceptance, limits, rows, adaptive=True)
        assert all(1 <= m <= limit for m, limit in zip(shares, limits, strict=True)) and sum(shares) <= rows
        others = itertools.product(*(range(1, limit + 1) for limit in limits))
        best = max(expected_acceptances(acceptance, m) for m in others if sum(m) == sum(shares))
        assert expected_acceptances(acceptance, shares) == pytest.approx(best)


def test_no_row_is_added_that_costs_more_than_it_brings():
    assert share_rows([0.98] * 3, [20] * 3, 60, adaptive=True) == [1, 1, 1]
    few, many = share_rows([0.3], [20], 64, adaptive=True), share_rows([0.05], [20], 64, adaptive=True)
    assert 1 < few[0] < many[0] <= 20


def test_a_fixed_number_of_candidates_is_shared_out_evenly():
    assert share_rows([0.9, 0.1, 0.5], [4, 4, 4], 12, adaptive=False) == [4, 4, 4]
    assert share_rows([0.9, 0.1, 0.5], [4, 4, 4], 9, adaptive=False) == [3, 3, 3]
    assert sorted(share_rows([0.9, 0.1, 0.5], [4, 4, 4], 8, adaptive=False)) == [2, 3, 3]
    assert share_rows([0.9, 0.1, 0.5], [4, 1, 4], 9, adaptive=False) == [4, 1, 4]


def test_everybody_has_a_row_even_where_there_are_too_few():
    assert share_rows([0.5] * 3, [5] * 3, 2, adaptive=True) == [1, 1, 1]


def test_requests_that_were_accepted_more_often_are_expected_to_be_again():
    lucky, unlucky, new = requests(3, 3, 3)
    lucky.acceptance_sum, lucky.scored = 18.0, 20
    unlucky.acceptance_sum, unlucky.scored = 0.2, 20
    estimates = acceptance_estimates([lucky, unlucky, new])
    assert estimates[0] > estimates[2] > estimates[1]
    assert all(0 < estimate < 1 for estimate in acceptance_estimates(requests(1, 1)))


# Candidates


@pytest.mark.parametrize("candidates", ["auto", 1, 3, 50])
def test_candidates_stay_within_rows_slots_attempts_and_the_setting(candidates):
    for max_rows, slots in itertools.product([3, 5, 100], [21, 26, 40, 1000]):
        running = requests(3, 4, 5)
        running[1].attempts = CONFIG.max_attempts - 1
        scheduler = Scheduler(CONFIG.replace(candidates=candidates), max_rows, slots)
        assert scheduler.held(running) == 12 and scheduler.spare(running) == slots - 21
        shares = scheduler.candidates(running)
        assert min(shares) >= 1 and shares[1] == 1 and max(shares) <= CONFIG.max_attempts
        assert sum(shares) <= max_rows
        assert scheduler.held(running) + sum(shares) * (CONFIG.segment_length - 1) <= slots
        if candidates != "auto":
            assert max(shares) <= candidates


# Admission


def test_admission_stops_at_the_last_row():
    scheduler, waiting = Scheduler(CONFIG, 4, 10_000), requests(3, 3, 3, 3, 3, 3)
    assert scheduler.admit(waiting, []) == 4
    assert scheduler.admit(waiting[3:], waiting[:3]) == 1
    assert scheduler.admit(waiting[4:], waiting[:4]) == 0


def test_admission_counts_a_shared_prompt_once():
    waiting = requests(100, samples=4)
    two_heartbeats = 2 * CONFIG.segment_length - 1
    enough = 100 + 4 * two_heartbeats + 1  # and a slot in a hundred to spare
    assert Scheduler(CONFIG, 64, enough).admit(waiting, []) == 4
    assert Scheduler(CONFIG, 64, enough - 1).admit(waiting, []) == 3
    assert Scheduler(CONFIG, 64, enough).admit(waiting[2:], waiting[:2]) == 2


def test_admission_counts_what_a_request_had_before_it_was_preempted():
    scheduler, waiting = Scheduler(CONFIG, 64, 55), requests(10, 10, 10)
    assert scheduler.admit(waiting, []) == 3
    waiting[1].tokens = [1] * 8
    assert scheduler.admit(waiting, []) == 2
    scheduler.prefill_tokens = 20
    assert scheduler.admit(waiting, []) == 1


def test_admission_keeps_the_order():
    """A long prompt that does not fit yet is not overtaken for ever."""
    scheduler, waiting = Scheduler(CONFIG, 64, 60), requests(40, 2)
    assert scheduler.admit(waiting, requests(10)) == 0


def test_one_very_long_prompt_is_admitted_by_itself():
    scheduler = Scheduler(CONFIG, 64, 100_000)
    assert scheduler.admit(requests(9000, 5), []) == 1
    assert scheduler.admit(requests(5, 9000), []) == 1


# In the engine


class Watch:
    """Counts rows and live slots at every proposal."""

    def __init__(self, engine, monkeypatch):
        self.rows, self.requests, self.live = [], [], []
        policy, propose = engine.policy, engine.policy.propose

        def watched(leaves, sampling):
            draws = propose(leaves, sampling)
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

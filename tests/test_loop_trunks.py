"""What requests hold of a tree: every text is encoded once, and whoever gives it back goes on from the same numbers."""

import pytest
import torch
from conftest import sum_reward, tiny_policy

from stars_fast import StarsConfig, StarsEngine
from stars_fast.loop.request import PromptNode, Trunk
from stars_fast.loop.scheduler import Scheduler
from stars_fast.loop.trunks import Trunks
from stars_fast.policy.policy import Policy
from stars_fast.rewards import RewardPrompt
from stars_fast.tree.attention import plugged

VOCAB = 32


@pytest.fixture
def trunks():
    policy = Policy(tiny_policy(VOCAB, hidden=32))
    policy.begin(300, 60, 4)
    with plugged(policy.model), torch.no_grad():
        yield Trunks(policy, Scheduler(8, 300))


@pytest.fixture
def encoded(trunks, monkeypatch):
    """Tokens of each pass."""
    seen, prefill = [], trunks.policy.prefill
    monkeypatch.setattr(trunks.policy, "prefill", lambda *args: seen.append(sum(map(len, args[1]))) or prefill(*args))
    return seen


def prompt(*ids):
    return PromptNode(list(ids), RewardPrompt(0, list(ids), list(ids)))


def expected(policy, ids):
    return policy.model(torch.tensor([ids]), use_cache=False).logits[0, -1]


def assert_ends_with(trunks, trunk, ids):
    assert trunks.ready(trunk)
    torch.testing.assert_close(trunk.logits, expected(trunks.policy, ids), atol=1e-4, rtol=0)


def test_samples_share_their_prompt_and_go_their_own_ways(trunks, encoded):
    one = prompt(5, 6, 7)
    first, second = Trunk(one), Trunk(one, pending=[8, 9])
    trunks.extend([first, second])
    assert encoded == [3, 2]
    assert_ends_with(trunks, first, [5, 6, 7])
    assert_ends_with(trunks, second, [5, 6, 7, 8, 9])
    assert trunks.policy.tree.live_slots == 5


def test_a_text_is_encoded_piece_by_piece_to_the_same_numbers(trunks, encoded):
    trunk = Trunk(prompt(*range(1, 11)), pending=[4, 3, 2])
    counts = []
    while not trunks.ready(trunk):
        counts.append(trunks.encode([trunk], 4))
    assert counts == [4, 4, 4, 1] and sum(encoded) == 13 and max(encoded) <= 4
    assert_ends_with(trunks, trunk, [*range(1, 11), 4, 3, 2])


def test_who_gave_its_slots_back_goes_on_from_the_same_numbers(trunks):
    one = prompt(5, 6, 7)
    trunk = Trunk(one, pending=[8, 9])
    trunks.extend([trunk])
    trunks.give_back(trunk, [8, 9])
    trunks.keep_prompts([])
    assert trunks.policy.tree.live_slots == 0 and not trunks.ready(trunk)
    trunks.extend([trunk])
    assert_ends_with(trunks, trunk, [5, 6, 7, 8, 9])


def test_a_cleared_tree_is_filled_again(trunks):
    trunk = Trunk(prompt(5, 6, 7), pending=[8])
    trunks.extend([trunk])
    trunks.clear()
    trunks.forget(trunk, [8])
    assert trunks.policy.tree.nodes == 0
    trunks.extend([trunk])
    assert_ends_with(trunks, trunk, [5, 6, 7, 8])


def test_a_fork_outlives_what_it_was_forked_from(trunks):
    trunk = Trunk(prompt(5, 6, 7), pending=[8])
    trunks.extend([trunk])
    twin = trunks.fork(trunk)
    trunks.give_back(trunk, [8])
    trunks.append(twin, [9, 10], -1)
    trunks.extend([twin])
    assert_ends_with(trunks, twin, [5, 6, 7, 8, 9, 10])
    trunks.give_back(twin, [])
    trunks.keep_prompts([])
    assert trunks.policy.tree.nodes == 0


def test_prompts_of_those_that_hold_no_slots_leave_the_tree(trunks):
    kept, gone = prompt(5, 6, 7), prompt(1, 2)
    for one in (kept, gone):
        trunks.extend([Trunk(one)])
    trunks.keep_prompts([kept])
    assert kept.logits is not None and (gone.node, gone.encoded, gone.logits) == (-1, 0, None)


def test_samples_of_a_long_prompt_encode_it_once(monkeypatch):
    policy = tiny_policy(32, hidden=32, positions=1200)
    engine = StarsEngine(policy, sum_reward)
    encoded, prefill = [], engine.policy.prefill
    monkeypatch.setattr(
        engine.policy, "prefill", lambda *args: encoded.append(sum(map(len, args[1]))) or prefill(*args)
    )
    monkeypatch.setattr("stars_fast.loop.scheduler._PREFILL_TOKENS", 100)
    config = StarsConfig(segment_length=4, max_attempts=6, target_reward=1.5, beta=0.6)
    prompt = [(7 * i + i // 5) % 31 for i in range(350)]
    out = engine.generate([prompt], config, seed=0, num_return_sequences=3, max_new_tokens=4)
    assert out.errors == [None] * 3 and encoded == [100, 100, 100, 50]

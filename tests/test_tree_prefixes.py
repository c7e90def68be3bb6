"""What texts begin with is found again, held as long as there is room, and encoded once."""

import numpy as np
import pytest
import torch
from conftest import tiny_policy
from hypothesis import given, settings
from hypothesis import strategies as st

from stars_fast.policy.policy import Policy
from stars_fast.tree import prefixes as module
from stars_fast.tree.attention import plugged
from stars_fast.tree.prefixes import LEAST, Prefixes, first_of_each
from stars_fast.tree.segment_tree import SegmentTree, SlotsExhausted, plan

SYSTEM = list(range(100, 200))


def encoded(tree, ids, parent=-1):
    """A node that holds these ids below its parent."""
    length = len(ids) - (tree.length(parent) if parent >= 0 else 0)
    return plan(tree, [parent], [1], [length], "cpu").branches[0]


def slots(tree, node):
    return plan(tree, [node], [0], [], "cpu").trunk_slots[0, : tree.length(node)].tolist()


def kept(tree, *runs):
    """Prefixes of these runs, which nobody else holds."""
    prefixes = Prefixes(tree)
    for run in runs:
        node = encoded(tree, run)
        prefixes.keep(run, node)
        tree.release(node)
    return prefixes


def test_the_longest_beginning_is_found_and_its_slots_are_those_of_its_tokens():
    tree = SegmentTree(1000)
    prefixes = Prefixes(tree)
    short, long = encoded(tree, SYSTEM[:60]), encoded(tree, SYSTEM)
    prefixes.keep(SYSTEM[:60], short)
    prefixes.keep(SYSTEM, long)
    node, length = prefixes.longest([*SYSTEM[:80], 1, 2, 3])
    assert length == 80 == tree.length(node)
    assert slots(tree, node) == slots(tree, long)[:80]
    tree.release_all([short, long, node])
    assert tree.live_slots == 160, "what is kept needs nobody else"


def test_the_last_token_is_left_to_whoever_needs_its_logits():
    prefixes = kept(SegmentTree(1000), SYSTEM)
    assert prefixes.longest(SYSTEM)[1] == len(SYSTEM) - 1
    assert prefixes.longest(SYSTEM, len(SYSTEM))[1] == len(SYSTEM)
    assert prefixes.longest([*SYSTEM, 1])[1] == len(SYSTEM)


def test_less_than_is_worth_a_node_is_neither_kept_nor_found():
    tree = SegmentTree(1000)
    prefixes = kept(tree, SYSTEM[: LEAST - 1])
    assert (len(prefixes), tree.live_slots) == (0, 0)
    prefixes = kept(tree, SYSTEM)
    for ids in ([], SYSTEM[:LEAST], [*SYSTEM[: LEAST - 1], 1, 2], SYSTEM[1:]):
        assert prefixes.longest(ids) == (-1, 0)
    assert prefixes.longest(SYSTEM[: LEAST + 1])[1] == LEAST


def test_those_not_used_for_longest_make_way_first_and_no_more_than_needed():
    tree = SegmentTree(301)
    runs = [[k] * 100 for k in range(3)]
    prefixes = kept(tree, *runs)
    tree.release(prefixes.longest(runs[0])[0])
    prefixes.keep(runs[1], -1)  # is there already: touched, and nothing is asked of the node
    prefixes.make_room(100)
    assert [prefixes.longest(run, 100)[1] for run in runs] == [100, 100, 0]
    prefixes.make_room(1000)
    assert len(prefixes) == 0


def test_there_are_never_more_than_so_many(monkeypatch):
    monkeypatch.setattr(module, "MOST", 2)
    tree = SegmentTree(1000)
    prefixes = kept(tree, *([k] * 50 for k in range(4)))
    assert (len(prefixes), tree.live_slots) == (2, 100)
    prefixes.clear()
    assert (len(prefixes), tree.live_slots, tree.nodes) == (0, 0, 0)


def test_a_plan_takes_the_slots_of_kept_prefixes_before_it_fails():
    policy = Policy(tiny_policy(16))
    policy.allocate(100)
    (node,) = policy.plan([-1], [1], [60]).branches
    policy.prefixes.keep([1] * 60, node)
    policy.tree.release(node)
    (held,) = policy.plan([-1], [1], [40]).branches
    assert len(policy.prefixes) == 1
    with pytest.raises(SlotsExhausted):
        policy.plan([held], [1], [61])
    assert len(policy.prefixes) == 0 and policy.tree.live_slots == 40
    policy.plan([held], [1], [60])


@pytest.mark.parametrize("empty", [lambda policy: policy.clear(), lambda policy: policy.allocate(50)])
def test_a_new_tree_keeps_nothing(empty):
    policy = Policy(tiny_policy(16))
    policy.allocate(100)
    policy.prefixes.keep([1] * 60, policy.plan([-1], [1], [60]).branches[0])
    empty(policy)
    assert len(policy.prefixes) == 0 and policy.prefixes.longest([1] * 60) == (-1, 0)


def test_a_text_that_goes_on_from_a_kept_beginning_has_the_logits_of_its_own_pass():
    policy = Policy(tiny_policy(32, hidden=32))
    first, second = [[(7 * i) % 31 for i in range(70)] + [k] * 5 for k in (3, 4)]
    policy.allocate(300)
    with torch.no_grad(), plugged(policy.model):
        ((node,), _) = policy.prefill([-1], [first])
        policy.prefixes.keep(first, node)
        policy.tree.release(node)
        node, length = policy.prefixes.longest(second)
        _, (logits,) = policy.prefill([node], [second[length:]])
        expected = policy.model(torch.tensor([second]), use_cache=False).logits[0, -1]
    assert length == 70
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


# Batches


def test_of_texts_that_begin_alike_the_first_goes_first():
    runs = [[*SYSTEM, 1], [*SYSTEM, 2], [5] * 90, [*SYSTEM, 3], SYSTEM[:50], [*SYSTEM[: LEAST - 1], 9, 9, 9]]
    assert first_of_each(runs, [0] * 6) == [0, 2, 5]
    assert first_of_each(runs, [100, 100, 0, 100, 49, 31]) == [0, 1, 2, 3, 4, 5], "they have it already"
    assert first_of_each(runs, [10, 100, 0, 68, 49, 31]) == [0, 1, 2, 4, 5], "32 more are worth waiting for"


@given(st.lists(st.tuples(st.lists(st.integers(0, 1), max_size=8), st.integers(0, 8)), max_size=6))
@settings(max_examples=200, deadline=None)
def test_who_waits_shares_enough_with_one_that_does_not(texts):
    runs = [ids for ids, _ in texts]
    known = [min(held, len(ids)) for ids, held in texts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LEAST", 2)
        chosen = first_of_each(runs, known)

    def gained(place, other):
        same = np.cumprod([a == b for a, b in zip(runs[place], runs[other], strict=False)], dtype=int)
        return int(same.sum()) - known[place]

    for place in range(len(runs)):
        waits = any(gained(place, other) >= 2 for other in chosen if other < place)
        assert waits == (place not in chosen)

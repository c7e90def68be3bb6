"""Small passes padded for graphs give the numbers of others, write nowhere else, and are used where they may be."""

import gc
import weakref

import pytest
import torch
from conftest import sum_reward, tiny_policy, tiny_reward
from test_same_text import CONFIG, PROMPTS, SEEDS, VOCAB

from stars_fast import StarsEngine
from stars_fast.policy.policy import Policy
from stars_fast.rewards import ImplicitReward
from stars_fast.tree.attention import plugged
from stars_fast.tree.model import TreeModel
from stars_fast.tree.passes import MOST_TOKENS, WORTH_CAPTURING, Pass, PassShape

TRUNKS = [[5, 6, 7, 8], [9], list(range(1, 12))]
BRANCHES = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [10, 11], [12]]
ROWS = [2, 1, 2]


def policy():
    return Policy(tiny_policy(VOCAB, hidden=32))


def reward():
    model = tiny_reward(VOCAB, hidden=32)
    return TreeModel(model, model.model, "reward")


def encoded(model, times=1):
    """Outputs of the same branches below the same trunks, again and again, and the keys in the branches' slots."""
    wanted = {"logits_to_keep": 0} if model.body is model.model else {}
    model.allocate(200)
    with plugged(model.model), torch.no_grad():
        leaves, _ = model.extend([-1] * len(TRUNKS), TRUNKS, **wanted)
        found = []
        for _ in range(times):
            plan = model.plan(leaves, ROWS, [len(branch) for branch in BRANCHES])
            for keys, values in (model.pool.layer(layer) for layer in model.shapes):
                keys[0], values[0] = torch.nan, torch.nan  # what padding leaves there reaches nobody
            output, last = model.encode(plan, BRANCHES, max(ROWS), **wanted)
            slots = torch.cat([row[:n] for row, n in zip(plan.branch_slots, plan.branch_len, strict=True)]).long()
            free = torch.ones(201, dtype=torch.bool).index_fill(0, slots, False).index_fill(0, torch.tensor([0]), False)
            numbers = output.logits if model.body is model.model else output.last_hidden_state
            keys = [model.pool.layer(layer)[0] for layer in model.shapes]
            found.append((numbers, last, [k[slots].clone() for k in keys], [k[free].clone() for k in keys]))
            for branch in plan.branches:
                model.tree.release(branch)
    return found


@pytest.mark.parametrize("make", [policy, reward])
def test_a_padded_pass_gives_the_numbers_of_any_other_and_writes_to_its_branches_alone(make):
    ((numbers, last, written, _),) = encoded(make())
    model = make()
    model.graphs.enabled = True
    first, *again = encoded(model, times=WORTH_CAPTURING + 2)
    assert [type(work) for work in model.graphs._kept.values()] == [Pass]
    torch.testing.assert_close(first[0], numbers, atol=1e-5, rtol=1e-5)
    assert torch.equal(first[1], last)
    torch.testing.assert_close(first[2], written, atol=1e-5, rtol=1e-5)
    for padded in again:  # to the last bit, whether it is kept or not
        assert torch.equal(padded[0], first[0]) and torch.equal(padded[1], last)
        assert all(torch.equal(a, b) for a, b in zip(padded[2] + padded[3], first[2] + first[3], strict=True))


def test_what_a_pass_returns_is_not_overwritten_by_the_next():
    model = policy()
    model.graphs.enabled = True
    *_, one, other = encoded(model, times=WORTH_CAPTURING + 2)
    assert one[0].data_ptr() != other[0].data_ptr()


def test_large_passes_watched_passes_and_unusual_outputs_are_left_alone():
    model = policy()
    model.graphs.enabled = True
    model.allocate(2 * MOST_TOKENS)
    plan = model.plan([-1], [1], [4])

    def small(tokens=4, **kwargs):
        return model._small_pass(plan, [tokens], 1, {"logits_to_keep": 0, **kwargs})

    passes = [small() for _ in range(WORTH_CAPTURING + 1)]
    assert all(isinstance(one, Pass) for one in passes)
    assert len({id(one) for one in passes}) == WORTH_CAPTURING  # kept from then on: a shape may never come back
    assert small(MOST_TOKENS + 1) is None
    for index in ([1], [0], [0, 2]):
        assert small(logits_to_keep=torch.tensor(index)) is None
    with model._head_inputs():
        assert small() is None


def test_shapes_that_were_met_are_forgotten_at_last_but_not_those_met_often(monkeypatch):
    monkeypatch.setattr("stars_fast.tree.model._MOST_SHAPES", 4)
    model = policy()
    model.graphs.enabled = True
    model.allocate(2 * MOST_TOKENS)
    often = 0
    for tokens in (1, 2, 4, 8, 16, 32, 64):
        for length in (512, tokens):
            model._small_pass(model.plan([-1], [1], [length]), [length], 1, {"logits_to_keep": 0})
            model.clear()
        often = max(model._met.values())
        assert len(model._met) <= 5
    assert often == 7 >= WORTH_CAPTURING


@pytest.mark.parametrize("padded", [False, True])
def test_rewards_that_read_logits_are_the_same_beside_captured_passes(padded):
    """They ask for logits at places of their own."""
    tuned, reference = tiny_policy(VOCAB, hidden=32, seed=5), tiny_policy(VOCAB, hidden=32, seed=6)
    engine = StarsEngine(tiny_policy(VOCAB, hidden=32), ImplicitReward(tuned, reference))
    for tree in (engine.policy, *engine.reward.tree_models):
        tree.graphs.enabled = padded
    out = engine.generate(PROMPTS, CONFIG, seed=SEEDS, candidates=3)
    assert out.errors == [None] * len(PROMPTS)
    for prompt, completion, reward in zip(PROMPTS[:4], out.completions, out.rewards, strict=False):
        ids = torch.tensor([prompt + completion])
        with torch.no_grad():
            laws = [model(ids, use_cache=False).logits[0].log_softmax(1) for model in (tuned, reference)]
        places = torch.arange(len(prompt), ids.shape[1])
        difference = laws[0] - laws[1]
        assert reward == pytest.approx(difference[places - 1, ids[0, places]].sum().item(), abs=1e-3)


def test_few_shapes_serve_all_passes():
    model = policy()
    model.allocate(5000)
    shapes = set()
    for rows in range(1, 65):
        plan = model.plan([-1] * rows, [1] * rows, [1] * rows)
        shapes.add(PassShape.padded(plan, [1] * rows, 1, True))
        for branch in plan.branches:
            model.tree.release(branch)
    assert len(shapes) == 7


@pytest.mark.parametrize("kind", ["classifier", "callable"])
def test_an_engine_that_is_dropped_gives_its_memory_back_at_once(kind):
    """Models of billions of parameters have pools of many gigabytes: the next engine must not find them still there."""
    scorer = sum_reward if kind == "callable" else tiny_reward(VOCAB, hidden=32)
    engine = StarsEngine(tiny_policy(VOCAB, hidden=32), scorer)
    trees = [engine.policy, *engine.reward.tree_models]
    for tree in trees:
        tree.graphs.enabled = True
    engine.generate(PROMPTS, CONFIG, seed=SEEDS, candidates=3)
    pools = [weakref.ref(tree.pool) for tree in trees]
    gc.disable()
    try:
        del engine, trees, tree
        assert [pool() for pool in pools] == [None] * len(pools)
    finally:
        gc.enable()


def test_where_memory_for_a_graph_is_short_the_pass_is_launched(monkeypatch):
    model = policy()
    model.graphs.enabled = True
    expected = encoded(model)[0][0]
    asked = []

    def get(shape, make, **_):
        asked.append(shape)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(model.graphs, "get", get)
    for numbers, *_ in encoded(model, times=WORTH_CAPTURING):
        assert torch.equal(numbers, expected)
    assert asked and model.graphs._impossible == {Pass}

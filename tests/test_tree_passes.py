"""Small passes padded for graphs give the numbers of others, write nowhere else, and are used where they may be."""

import gc
import weakref

import numpy as np
import pytest
import torch
from conftest import sum_reward, tiny_policy, tiny_reward
from hypothesis import given
from hypothesis import strategies as st
from test_same_text import CONFIG, PROMPTS, SEEDS, VOCAB

from benchmarks.micro.shapes import stand_ins
from stars_fast import StarsEngine
from stars_fast.policy.policy import Policy
from stars_fast.policy.steps import Shape
from stars_fast.rewards import ImplicitReward
from stars_fast.tree.attention import plugged
from stars_fast.tree.graphs import Captured
from stars_fast.tree.model import TreeModel
from stars_fast.tree.passes import MOST_TOKENS, Pass, PassShape, trunk_room

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
            for keys, values in (model.pool.layer(layer) for layer in model.shapes):
                keys[0], values[0] = torch.nan, torch.nan  # what padding leaves there reaches nobody
            nodes, output, last = model.encode(leaves, ROWS, BRANCHES, **wanted)
            paths = [torch.from_numpy(model.tree.slots(node)) for node in nodes]
            slots = torch.cat([path[-len(own) :] for path, own in zip(paths, BRANCHES, strict=True)]).long()
            free = torch.ones(201, dtype=torch.bool).index_fill(0, slots, False).index_fill(0, torch.tensor([0]), False)
            numbers = output.logits if model.body is model.model else output.last_hidden_state
            keys = [model.pool.layer(layer)[0] for layer in model.shapes]
            found.append((numbers, last, [k[slots].clone() for k in keys], [k[free].clone() for k in keys]))
            model.tree.release_all(nodes)
    return found


@pytest.mark.parametrize("make", [policy, reward])
def test_a_padded_pass_gives_the_numbers_of_any_other_and_writes_to_its_branches_alone(make):
    ((numbers, last, written, _),) = encoded(make())
    model = make()
    model.graphs.enabled = True
    first, *again = encoded(model, times=3)
    assert [type(work) for work in model.graphs._kept.values()] == [Pass]
    torch.testing.assert_close(first[0], numbers, atol=1e-5, rtol=1e-5)
    assert torch.equal(first[1], last)
    torch.testing.assert_close(first[2], written, atol=1e-5, rtol=1e-5)
    for padded in again:  # to the last bit, whether it is kept or not
        assert torch.equal(padded[0], first[0]) and torch.equal(padded[1], last)
        assert all(torch.equal(a, b) for a, b in zip(padded[2] + padded[3], first[2] + first[3], strict=True))


def test_what_a_pass_gives_depends_on_no_earlier_one_even_where_tokens_share_a_scale():
    model, kept = policy(), []

    def share(module, args):
        return (args[0] / args[0].abs().mean(),)

    model.model.model.layers[0].mlp.register_forward_pre_hook(share)
    model.graphs.enabled = True
    model.allocate(200)
    with plugged(model.model), torch.no_grad():
        for before in ([], [[20] * 12]):
            for branch in (*before, [1, 2, 3]):
                (node,), output, _ = model.encode([-1], [1], [branch], logits_to_keep=0)
                model.release(node)
            kept.append(output.logits)
    assert len(model.graphs._kept) == 1 and torch.equal(*kept)


def test_what_a_pass_returns_is_not_overwritten_by_the_next():
    model = policy()
    model.graphs.enabled = True
    *_, one, other = encoded(model, times=3)
    assert one[0].data_ptr() != other[0].data_ptr()


def test_large_passes_watched_passes_and_unusual_outputs_are_left_alone():
    model = policy()
    model.graphs.enabled = True
    model.allocate(2 * MOST_TOKENS)
    plan = model.plan([-1], [1], [4])

    def small(tokens=4, **kwargs):
        return model._small_pass(plan, [tokens], 1, {"logits_to_keep": 0, **kwargs})

    assert isinstance(small(), Pass) and small() is small()  # kept from the first time on
    assert small(MOST_TOKENS + 1) is None
    for index in ([1], [0], [0, 2]):
        assert small(logits_to_keep=torch.tensor(index)) is None
    with model._head_inputs():
        assert small() is None


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


@st.composite
def passes(draw):
    """Lengths of the rows of a pass, in how many groups they are, and the most rows of one."""
    length, rows = draw(st.sampled_from((1, 2, 16, 600))), draw(st.integers(1, 300))
    lengths = draw(st.lists(st.integers(1, length), min_size=1, max_size=rows))
    cuts = sorted(draw(st.sets(st.integers(1, len(lengths) - 1)))) if len(lengths) > 1 else []
    sizes = np.diff([0, *cuts, len(lengths)])
    return lengths, len(sizes), int(sizes.max())


@given(passes())
def test_shapes_have_room_for_their_pass(one):
    lengths, groups, most_rows = one
    shape = PassShape.padded(lengths, groups, most_rows, 256, True)
    if sum(lengths) > MOST_TOKENS:
        assert shape is None
        return
    room = (shape.tokens, shape.rows, shape.groups, shape.most_rows, shape.most_queries)
    needed = (sum(lengths), len(lengths), groups, most_rows, max(lengths))
    assert all(least <= given for least, given in zip(needed, room, strict=True))
    assert shape.groups <= shape.rows <= shape.tokens <= max(4 * sum(lengths), 16)


def test_few_shapes_serve_all_passes():
    segments = {
        PassShape.padded([length] * groups * rows, groups, rows, 256, False)
        for length in range(2, 17)
        for groups in range(1, 65)
        for rows in range(1, 9)
    }
    one_each = {PassShape.padded([1] * groups, groups, 1, 256, True) for groups in range(1, 257)}
    assert len(segments - {None}) <= 24
    assert [shape.tokens for shape in sorted(one_each)] == [1, 16, 64, 128, 192, 256]
    usual = set(PassShape.usual(256, False, 0)) | set(PassShape.usual(256, True, 256))
    assert one_each <= usual
    rows_of_eight = {PassShape.padded([8] * 4 * n, n, 4, 256, False) for n in range(1, 33)}
    assert rows_of_eight <= usual


def test_room_for_trunks_grows_seldom():
    assert [trunk_room(tokens) for tokens in (0, 1, 256, 257, 1000, 8192)] == [256, 256, 256, 512, 1024, 8192]


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


def _broken_off():
    """The end of a capture that a library broke off, for want of memory."""
    error = RuntimeError("CUDA error: operation failed due to a previous error during capture")
    error.__context__ = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    return error


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError(), torch.AcceleratorError("CUDA error: out of memory"), _broken_off()]
)
def test_where_memory_for_a_graph_is_short_the_pass_is_launched(monkeypatch, error):
    model, asked = policy(), []
    model.graphs.enabled = True
    expected = encoded(model)[0][0]
    model.graphs.drop()

    def capture(work, *_):
        asked.append(work.shape)
        raise error

    with stand_ins(), pytest.warns(UserWarning, match="no memory for a CUDA graph"):
        monkeypatch.setattr(Captured, "capture", capture)
        for numbers, *_ in encoded(model, times=3):
            assert torch.equal(numbers, expected)
    assert len(asked) == len(set(asked)) == len(model.graphs.unaffordable) == 1, "each shape is tried once"


def test_graphs_of_rooms_that_were_outgrown_are_dropped():
    model = policy()
    model.graphs.enabled = True
    with stand_ins():
        model.begin(600, 200, 8)
        small, step = (PassShape(16, 16, 16, 16, 16, room, True) for room in (256, 512))
        decode = Shape(1, 1, 2, 256, 8, 0, False)
        model.small_pass(small)
        model.steps(decode)
        model.begin(600, 200, 16)
        assert small in model.graphs and decode not in model.graphs
        model.begin(600, 500, 16)
        model.small_pass(step)
        assert list(model.graphs._kept) == [step]

"""Tree attention against a dense softmax, one query at a time."""

import itertools
import math

import pytest
import torch

from stars_fast.ops import tree_attention
from stars_fast.ops.tree_attention import tree_attention_reference


def tree(group_rows, trunk_lens, branch_lens, queries, *, heads=4, kv_heads=2, d=8, dv=8, dtype=torch.float32, seed=0):
    """Random tensors for a tree whose tables are wider than needed, with garbage where nothing may be read."""
    generator = torch.Generator().manual_seed(seed)
    rows, wide, long = len(branch_lens), max(trunk_lens) + 3, max(branch_lens) + 2
    needed = sum(trunk_lens) + sum(branch_lens)
    slots = torch.randperm(needed, generator=generator, dtype=torch.int32) + 1
    k_pool = torch.randn(needed + 2, kv_heads, d, generator=generator).to(dtype)
    v_pool = torch.randn(needed + 2, kv_heads, dv, generator=generator).to(dtype)
    k_pool[-1] = v_pool[-1] = torch.nan
    trunk_slots = torch.full((len(group_rows), wide), needed + 1, dtype=torch.int32)
    branch_slots = torch.full((rows, long), needed + 1, dtype=torch.int32)
    parts = iter(slots.split([*trunk_lens, *branch_lens]))
    for table, lengths in ((trunk_slots, trunk_lens), (branch_slots, branch_lens)):
        for line, length in zip(table, lengths, strict=True):
            line[:length] = next(parts)
    tokens = sum(queries)
    return {
        "q": torch.randn(tokens + 1, heads, d, generator=generator).to(dtype),  # the last one is padding
        "k_pool": k_pool,
        "v_pool": v_pool,
        "out": torch.full((tokens + 1, heads, dv), torch.nan, dtype=dtype),
        "trunk_slots": trunk_slots,
        "trunk_len": torch.tensor(trunk_lens, dtype=torch.int32),
        "branch_slots": branch_slots,
        "branch_len": torch.tensor(branch_lens, dtype=torch.int32),
        "group_indptr": torch.tensor([0, *itertools.accumulate(group_rows)], dtype=torch.int32),
        "query_indptr": torch.tensor([0, *itertools.accumulate(queries)], dtype=torch.int32),
        "max_rows": max(group_rows) + 1,
        "max_queries": max(queries) + 1,
        "scale": d**-0.5,
    }


def naive(case, window=0, softcap=0.0, sinks=None):
    """Dense softmax in float64, query by query."""
    out = torch.zeros(case["out"].shape, dtype=torch.float64)
    heads, kv_heads = case["q"].shape[1], case["k_pool"].shape[1]
    groups, queries = case["group_indptr"].tolist(), case["query_indptr"].tolist()
    for b in range(len(queries) - 1):
        g = sum(start <= b for start in groups) - 1
        trunk = case["trunk_slots"][g, : case["trunk_len"][g]]
        for token in range(queries[b], queries[b + 1]):
            index = int(case["branch_len"][b]) - (queries[b + 1] - token)
            slots = torch.cat((trunk, case["branch_slots"][b, : index + 1])).long()
            if window:
                slots = slots[-window:]
            for head in range(heads):
                keys = case["k_pool"][slots, head // (heads // kv_heads)].double()
                scores = keys @ case["q"][token, head].double() * case["scale"]
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                if sinks is not None:
                    scores = torch.cat((scores, sinks[head : head + 1].double()))
                weights = scores.softmax(0)[: len(slots)]
                out[token, head] = weights @ case["v_pool"][slots, head // (heads // kv_heads)].double()
    return out


SHAPES = {
    "decode": dict(group_rows=[3, 1, 2], trunk_lens=[7, 12, 1], branch_lens=[1, 2, 5, 1, 4, 4], queries=[1] * 6),
    "scoring": dict(group_rows=[2, 3], trunk_lens=[9, 4], branch_lens=[5, 3, 6, 1, 4], queries=[5, 2, 6, 1, 3]),
    "prefill": dict(group_rows=[1, 1, 1], trunk_lens=[0, 0, 0], branch_lens=[6, 1, 11], queries=[6, 1, 11]),
    "chunked prefill": dict(group_rows=[1, 1], trunk_lens=[0, 5], branch_lens=[8, 6], queries=[3, 4]),
    "a group without rows": dict(group_rows=[2, 0, 1], trunk_lens=[4, 3, 2], branch_lens=[2, 1, 3], queries=[1, 1, 1]),
    "a row without queries": dict(group_rows=[2, 1], trunk_lens=[4, 3], branch_lens=[2, 0, 3], queries=[2, 0, 1]),
}
OPTIONS = {
    "plain": {},
    "window": dict(window=3),
    "softcap": dict(softcap=0.7),
    "sinks": dict(sinks=torch.tensor([0.5, -1.0, 3.0, 0.0])),
    "all": dict(window=6, softcap=2.0, sinks=torch.tensor([0.5, -1.0, 3.0, 0.0])),
}


@pytest.fixture(params=["operator", "reference"])
def attention(request):
    """What a CPU tensor gets, and the plain torch that is the oracle of the kernels and runs on CUDA."""
    return tree_attention if request.param == "operator" else tree_attention_reference


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("option", OPTIONS)
def test_a_query_sees_its_trunk_and_the_past_of_its_branch(attention, shape, option):
    case = tree(**SHAPES[shape])
    attention(**case, **OPTIONS[option])
    torch.testing.assert_close(case["out"].double(), naive(case, **OPTIONS[option]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("heads", "kv_heads", "d", "dv"), [(4, 4, 8, 8), (6, 1, 16, 5), (8, 2, 5, 16)])
def test_heads_share_keys_and_values_may_have_another_size(attention, heads, kv_heads, d, dv):
    for shape in ("decode", "scoring"):
        case = tree(**SHAPES[shape], heads=heads, kv_heads=kv_heads, d=d, dv=dv)
        attention(**case)
        torch.testing.assert_close(case["out"].double(), naive(case), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_pools_are_accumulated_in_float32(attention, dtype):
    case = tree(**SHAPES["scoring"], dtype=dtype)
    attention(**case)
    torch.testing.assert_close(case["out"], naive(case).to(dtype), rtol=1e-2, atol=1e-3)


def test_strided_queries_are_taken_as_transformers_gives_them(attention):
    case = tree(**SHAPES["scoring"])
    expected = naive(case)
    case["q"] = case["q"].transpose(0, 1).contiguous().transpose(0, 1)
    attention(**case)
    torch.testing.assert_close(case["out"].double(), expected, rtol=1e-5, atol=1e-6)


def test_a_candidate_does_not_see_its_siblings(attention):
    case = tree(**SHAPES["decode"])
    attention(**case)
    before = case["out"].clone()
    slots = case["branch_slots"][1, :2].long()
    case["k_pool"][slots] += 10
    case["v_pool"][slots] += 10
    attention(**case)
    changed = (case["out"] != before).flatten(1).any(1).tolist()
    assert changed == [False, True, False, False, False, False, False]


def test_padding_and_queries_that_see_nothing_give_zero(attention):
    case = tree(group_rows=[1], trunk_lens=[2], branch_lens=[0], queries=[1])
    attention(**case, window=1)  # branch index -1: a row that is padding in every respect
    assert case["out"][1].eq(0).all()
    assert case["out"].isfinite().all()


def test_rows_after_the_last_group_are_padding(attention):
    case = tree(**SHAPES["decode"])
    expected = naive(case)
    expected[4:] = 0  # the last group's two rows
    for name in ("trunk_slots", "trunk_len"):
        case[name] = case[name][:-1].contiguous()
    case["group_indptr"] = case["group_indptr"][:-1].contiguous()
    attention(**case)
    torch.testing.assert_close(case["out"].double(), expected, rtol=1e-5, atol=1e-6)


def test_scores_far_from_zero_do_not_overflow(attention):
    case = tree(**SHAPES["scoring"])
    case["q"] *= 1e3
    attention(**case)
    assert math.isfinite(case["out"].abs().sum())
    torch.testing.assert_close(case["out"].double(), naive(case), rtol=1e-3, atol=1e-3)


def test_what_rows_that_ended_leave_in_slot_0_harms_nobody(attention):
    case = tree(**SHAPES["scoring"])
    expected = naive(case)
    case["k_pool"][0] = case["v_pool"][0] = math.nan
    attention(**case)
    torch.testing.assert_close(case["out"].double(), expected, rtol=1e-5, atol=1e-6)


def test_a_key_that_is_not_a_number_is_noticed_by_those_that_see_it_and_by_no_others(attention):
    for bad in (math.nan, math.inf):
        case = tree(**SHAPES["decode"])
        case["k_pool"][case["trunk_slots"][1, 4].long()] = bad  # the trunk of row 3
        case["k_pool"][case["branch_slots"][1, 0].long()] = bad
        case["q"] = case["q"].abs()  # so that an infinite key gives an infinite score
        attention(**case)
        assert case["out"].flatten(1).isnan().any(1).tolist() == [False, True, False, True, False, False, False]


def only_row(case, b):
    """The case without the other rows of row b's group, and without the other groups."""
    g = int((case["group_indptr"] <= b).sum()) - 1
    first, last = case["query_indptr"][b : b + 2].tolist()
    parts = {"trunk_slots": slice(g, g + 1), "trunk_len": slice(g, g + 1), "q": slice(first, last)}
    parts |= {"branch_slots": slice(b, b + 1), "branch_len": slice(b, b + 1), "out": slice(first, last)}
    one = {name: case[name][part].clone() for name, part in parts.items()}
    ends = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0, last - first], dtype=torch.int32)
    return case | one | dict(group_indptr=ends[0], query_indptr=ends[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_candidate_rounds_alike_alone_and_beside_others(dtype):
    shape = dict(
        group_rows=[5, 2], trunk_lens=[70, 9], branch_lens=[3, 9, 2, 66, 1, 4, 1], queries=[1, 2, 1, 3, 1, 4, 1]
    )
    case = tree(**shape, d=40, dv=72, heads=6, dtype=dtype)
    tree_attention(**case)
    for b in range(7):
        alone = only_row(case, b)
        tree_attention(**alone)
        first, last = case["query_indptr"][b : b + 2].tolist()
        assert torch.equal(alone["out"], case["out"][first:last])


def test_threads_share_the_work_and_change_nothing():
    case = tree(
        group_rows=[3] * 8, trunk_lens=[90] * 8, branch_lens=[9] * 24, queries=[1] * 24, heads=8, kv_heads=8, d=64
    )
    tree_attention(**case)
    before = case["out"].clone()
    threads = torch.get_num_threads()
    try:
        for _ in range(20):
            torch.set_num_threads(3)
            tree_attention(**case)
            assert torch.equal(case["out"], before)
    finally:
        torch.set_num_threads(threads)

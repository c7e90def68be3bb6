"""The Triton kernel computes what the reference computes, for any tree, tile and split."""

import importlib

import pytest
import torch
from conftest import KERNEL_DEVICE, KERNEL_DTYPES, tiny_policy
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tree_attention import OPTIONS, SHAPES, naive, tree

from stars_fast.ops import _library
from stars_fast.ops.tree_attention import tree_attention_reference
from stars_fast.policy.policy import Policy

pytest.importorskip("triton")
kernel = importlib.import_module("stars_fast.kernels.tree_attention")
append = pytest.importorskip("stars_fast.kernels.kv_append")
tiles = pytest.importorskip("stars_fast.kernels.tiles")

# Values are averages of standard normal ones. Float16 rounds its weights before they meet the values, and the result.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def on_device(case):
    return {name: x.to(KERNEL_DEVICE) if torch.is_tensor(x) else x for name, x in case.items()}


def assert_like_reference(case, parts=None, **options):
    """Runs the kernel on a copy whose output is NaN, so that an element it leaves out shows."""
    case = on_device(case)
    options = on_device(options)
    expected = torch.full_like(case["out"], torch.nan, dtype=torch.float32)
    tree_attention_reference(**(case | {"out": expected}), **options)
    case["out"].fill_(torch.nan)
    kernel.tree_attention(**case, **options, parts=parts)
    tolerance = TOLERANCES[case["q"].dtype]
    torch.testing.assert_close(case["out"].float(), expected, rtol=tolerance, atol=tolerance)


@st.composite
def trees(draw):
    group_rows = draw(st.lists(st.integers(0, 3), min_size=1, max_size=3).filter(any))
    rows = sum(group_rows)
    trunk_lens = [draw(st.sampled_from([0, 1, 5, 64, 131, 300])) for _ in group_rows]
    # A decode step, the scoring of a segment, or a prefill.
    most = draw(st.sampled_from([1, 5, 20]))
    queries = [draw(st.integers(0, most)) for _ in range(rows - 1)] + [draw(st.integers(1, most))]
    branch_lens = [n + draw(st.integers(0, 6)) for n in queries]
    kv_heads = draw(st.sampled_from([1, 2]))
    d = draw(st.sampled_from([8, 24, 64, 80, 96, 128, 192, 256]))
    return tree(
        group_rows,
        trunk_lens,
        branch_lens,
        queries,
        heads=kv_heads * draw(st.sampled_from([1, 4, 7, 8])),
        kv_heads=kv_heads,
        d=d,
        dv=draw(st.sampled_from([d, d, 40, 128])),
        dtype=draw(st.sampled_from(KERNEL_DTYPES)),
        seed=draw(st.integers(0, 999)),
    )


@settings(max_examples=60, deadline=None)
@given(
    case=trees(),
    parts=st.sampled_from([None, 1, 2, 5]),
    window=st.sampled_from([0, 0, 1, 3, 70]),
    softcap=st.sampled_from([0.0, 0.0, 1.5]),
    sinks=st.booleans(),
)
def test_any_tree_gives_the_references_numbers(case, parts, window, softcap, sinks):
    sink = torch.linspace(-2, 2, case["q"].shape[1]) if sinks else None
    assert_like_reference(case, parts, window=window, softcap=softcap, sinks=sink)


@pytest.mark.parametrize("parts", [1, 2])
def test_queries_beyond_a_branch_see_the_trunk_alone(parts):
    queries = [5, 1, 8, 2]
    case = tree([3, 1], [131, 64], queries, queries, heads=4, kv_heads=2, d=24, dv=24)
    assert_like_reference(case | {"branch_len": torch.zeros_like(case["branch_len"])}, parts)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("option", OPTIONS)
def test_small_trees_give_the_numbers_of_a_dense_softmax(shape, option):
    case = tree(**SHAPES[shape])
    expected = naive(case, **OPTIONS[option])
    case = on_device(case)
    kernel.tree_attention(**case, **on_device(OPTIONS[option]))
    torch.testing.assert_close(case["out"].double().cpu(), expected, rtol=1e-5, atol=1e-5)


def test_many_groups_and_many_rows_are_found():
    many = tree([1] * 150, [3] * 150, [2] * 150, [1] * 150, heads=1, kv_heads=1)
    assert_like_reference(many)
    assert_like_reference(tree([70, 40], [9, 0], [3] * 110, [2, 1] * 55, heads=2, kv_heads=1))


def test_rows_after_the_last_group_are_padding():
    case = tree(**SHAPES["decode"])
    for name in ("trunk_slots", "trunk_len", "group_indptr"):
        case[name] = case[name][:-1].contiguous()
    for parts in (1, 2):
        assert_like_reference(case, parts)


def test_what_rows_that_ended_leave_in_slot_0_harms_nobody():
    case = on_device(tree(**SHAPES["scoring"]))
    expected = naive(case)
    case["k_pool"][0] = case["v_pool"][0] = torch.nan
    kernel.tree_attention(**case)
    torch.testing.assert_close(case["out"].double().cpu(), expected.cpu(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_a_number_reaches_those_that_see_it_and_no_others(parts, bad):
    """Siblings share a tile, where a weight of 0 times a NaN is NaN: the append makes values finite, keys NaN."""
    case = on_device(tree(**SHAPES["decode"] | dict(trunk_lens=[200, 12, 150])))
    q = case["q"] = case["q"].abs()  # so that an infinite key gives an infinite score
    slots = torch.stack((case["trunk_slots"][1, 4], case["branch_slots"][1, 1], case["branch_slots"][4, 0]))
    k, v = (pool[slots.long()].clone() for pool in (case["k_pool"], case["v_pool"]))
    k[0], v[1, 0, 3], v[2] = bad, bad, -bad
    append.kv_append(k, v, case["k_pool"], case["v_pool"], slots)
    kernel.tree_attention(**case, parts=parts)
    wrong = case["out"].isnan().any(-1)  # [T, Hq]
    assert wrong.any(1).tolist() == [False, True, False, True, True, False, False]
    assert wrong[1].tolist() == [True, True, False, False]  # the heads of the one key-value head
    assert case["out"][~wrong].isfinite().all() and q.isfinite().all()


def test_a_table_that_is_not_what_its_shape_says_is_refused():
    case = on_device(tree(**SHAPES["decode"]))
    with pytest.raises(ValueError, match="trunk_slots must be contiguous"):
        kernel.tree_attention(**case | {"trunk_slots": case["trunk_slots"][:, :-1]})
    with pytest.raises(ValueError, match=r"branch_len must be torch.int32 \[6\], got torch.int64"):
        kernel.tree_attention(**case | {"branch_len": case["branch_len"].long()})


@pytest.mark.parametrize(("shape", "parts"), [("decode", 1), ("scoring", 2), ("prefill", 1)])
def test_layers_share_what_is_worked_out_from_the_tables(shape, parts):
    """It takes no more than sizes from queries and pools, and with it row pointers and trunk lengths are not read."""
    case = on_device(tree(**SHAPES[shape]))
    expected = naive(case)
    tables = {name: case[name] for name in ("trunk_len", "branch_len", "group_indptr", "query_indptr")}
    blank = torch.full_like(case["q"], torch.nan), torch.full_like(case["v_pool"], torch.nan)
    work = kernel.tree_work(*blank, **tables, max_rows=case["max_rows"], max_queries=case["max_queries"])
    for name in ("trunk_len", "group_indptr", "query_indptr"):
        case[name].fill_(1_000_000)
    kernel.tree_attention(**case, work=work, parts=parts)
    torch.testing.assert_close(case["out"].double().cpu(), expected, rtol=1e-5, atol=1e-5)


def test_a_table_for_other_heads_or_queries_is_refused():
    case, other = (on_device(tree(**SHAPES["scoring"], heads=heads)) for heads in (4, 16))
    names = ("q", "v_pool", "trunk_len", "branch_len", "group_indptr", "query_indptr", "max_rows", "max_queries")
    work = kernel.tree_work(*(other[name] for name in names))
    with pytest.raises(ValueError, match=r"work must be torch\.int32"):
        kernel.tree_attention(**case, work=work)


def test_strided_queries_are_taken_as_transformers_gives_them():
    case = tree(**SHAPES["scoring"])
    case["q"] = case["q"].transpose(0, 1).contiguous().transpose(0, 1)
    assert_like_reference(case)


def test_scores_far_from_zero_do_not_overflow():
    for option in ({}, {"softcap": 50.0}):
        case = on_device(tree(**SHAPES["scoring"]))
        case["q"] *= 1e3
        kernel.tree_attention(**case, **option)
        torch.testing.assert_close(case["out"].double().cpu(), naive(case, **option).cpu(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((288, 64, torch.float16), "head_size must be from 1 to 256, got 288"),
        ((64, 512, torch.float16), "value_size must be from 1 to 256, got 512"),
        ((64, 64, torch.float64), "must be float32, float16 or bfloat16, got torch.float64"),
    ],
)
def test_what_there_is_no_tile_for_is_refused_by_name(sizes, message):
    with pytest.raises(ValueError, match=message):
        tiles.check(*sizes)


def test_a_list_is_split_only_where_processors_would_idle():
    tile = tiles.choose_tile(128, 128, torch.bfloat16, 32)
    assert tiles.choose_parts(tile, programs=512, longest=4096, processors=132) == 1
    assert tiles.choose_parts(tile, programs=8, longest=4096, processors=132) == 32
    assert tiles.choose_parts(tile, programs=8, longest=200, processors=132) == 2
    assert tiles.choose_parts(tile, programs=8, longest=0, processors=132) == 1


def test_short_lists_are_cut_finer_where_processors_would_idle():
    """8 candidates of one request: 13 µs in four parts, 11 in seven of an H100 (docs/findings/gpu-kernels.md)."""
    tile = tiles.choose_tile(128, 128, torch.bfloat16, 8)
    few = dict(programs=32, longest=416, processors=132)
    fine = tiles.fit_warps(tile, **few)
    assert fine.keys == 32 and tiles.choose_parts(fine, **few) == 7 > tiles.choose_parts(tile, **few)
    for enough in ({"programs": 4, "longest": 4224}, {"longest": 2048}):
        assert tiles.fit_warps(tile, **few | enough) == tile


@pytest.mark.parametrize("room", [256, 8192])
@pytest.mark.parametrize("parts", [2, 8])
def test_lists_far_shorter_than_their_room_are_read_by_as_many_parts(room, parts, monkeypatch):
    """The room of captured work is that of the longest text: parts are chosen by it, and used by the actual lengths."""
    seen, launched = [], kernel.merge_parts_kernel

    class Merge:
        def __getitem__(self, grid):
            return lambda *tensors, **rest: seen.append(tensors[2].clone()) or launched[grid](*tensors, **rest)

    monkeypatch.setattr(kernel, "merge_parts_kernel", Merge())
    case = tree([2], [230], [8, 8], [1, 1], heads=2, kv_heads=1, d=64, dv=64, dtype=torch.float16)
    case["trunk_slots"] = torch.nn.functional.pad(case["trunk_slots"], (0, room - case["trunk_slots"].shape[1]))
    assert_like_reference(case, parts)
    at_work = (seen[0][:, :2].amax((1, 2)) > 0).tolist()
    assert at_work == [True] * min(parts, 4) + [False] * max(0, parts - 4), "246 keys are four blocks"


def test_few_queries_take_fewer_warps_where_there_are_many_programs():
    tile = tiles.choose_tile(128, 128, torch.bfloat16, 16)
    assert tiles.fit_warps(tile, programs=100, longest=4096, processors=132) == tile
    many = tiles.fit_warps(tile, programs=2048, longest=4096, processors=132)
    assert many.warps < tile.warps and tile.pipelined and not many.pipelined
    assert many == tiles.CANDIDATES[16][0]  # what others are timed against
    for other in ((torch.bfloat16, 64), (torch.float32, 16)):
        tile = tiles.choose_tile(128, 128, *other)
        assert tiles.fit_warps(tile, programs=2048, longest=4096, processors=132) == tile


def test_a_model_is_refused_when_it_is_planned_not_when_it_runs(monkeypatch):
    operator = _library.operators["tree_attention"]
    monkeypatch.setitem(_library.operators, "tree_attention", operator._replace(cpu=operator.cuda))
    model = tiny_policy(head_dim=288)
    with pytest.raises(
        NotImplementedError, match=r"the policy is a LlamaForCausalLM .* head_size must be from 1 to 256, got 288"
    ):
        Policy(model)
    Policy(tiny_policy())

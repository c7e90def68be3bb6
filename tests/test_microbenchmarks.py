"""The cases of benchmarks/micro: tiny ones of each operator go through the same check, which can fail."""

import pytest
import torch

from benchmarks.micro.attention import Tree
from benchmarks.micro.cases import OPERATORS, Absent, Case, Prepared, contenders, refcheck
from benchmarks.micro.limits import alternating
from benchmarks.micro.sampling import FILTERS, Draw, Gather
from benchmarks.micro.tables import Append, Select
from benchmarks.micro.timing import Rates, floor_seconds, median_seconds
from benchmarks.micro.trees import Forest, tables_of_lists

CPU = torch.device("cpu")
TINY = [
    ("kv_append", Append(3, 2, 4)),
    ("tree_attention", Tree("llama-3.2-1b", 2, 3, 5, 4, 1)),
    ("tree_attention", Tree("qwen2.5-7b", 2, 2, 5, 4, 3, torch.float32)),
    *(
        ("sample_step", Draw(2, 3000, filters, dtype))
        for filters in FILTERS
        for dtype in (torch.float32, torch.bfloat16)
    ),
    ("select_and_commit", Select(3, 2)),
    ("gather_logprobs", Gather(3, 50)),
]


@pytest.fixture(autouse=True)
def few_copies(monkeypatch):
    """Enough to rotate, not enough to leave a cache."""
    for module in ("attention", "sampling", "tables"):
        monkeypatch.setattr(f"benchmarks.micro.{module}.copies", lambda size, device: 2)
    for name in ("_ROUND", "_ROTATION", "_TOTAL"):
        monkeypatch.setattr(f"benchmarks.micro.timing.{name}", 1e-4)


@pytest.mark.parametrize(("operator", "shape"), TINY, ids=lambda x: getattr(x, "name", x))
def test_all_contenders_compute_what_the_reference_does(operator, shape):
    case = OPERATORS[operator].build(shape, CPU)
    assert tuple(case.contenders) == contenders(operator, "cpu")
    for name in case.contenders:
        try:
            prepared = case.prepared(name)
        except Absent as absent:
            assert "kernel" in str(absent)
            continue
        refcheck(case, name, prepared)
        assert median_seconds(case, prepared) > 0
        refcheck(case, name, prepared)  # what timing has written is restored


@pytest.mark.parametrize(("operator", "shape"), TINY, ids=lambda x: getattr(x, "name", x))
def test_one_wrong_element_of_any_result_is_found(operator, shape):
    case = OPERATORS[operator].build(shape, CPU)
    prepared = case.prepared("torch reference")
    for name in case.expected:

        def wrong(result, name=name):
            found = {key: value.clone() for key, value in prepared.observe(result).items()}
            first = found[name].view(-1)[:1]
            first.copy_(~first if first.dtype == torch.bool else 2 * first + 1)
            return found

        with pytest.raises(AssertionError, match=rf"{case.operator} .*: {name} deviates"):
            refcheck(case, "a planted error", Prepared(prepared.call, wrong))


def test_the_floor_is_the_slower_of_memory_and_products():
    tree = Tree("llama-3.2-1b", groups=2, rows=3, trunk=5, branch=4, queries=2)
    case = OPERATORS["tree_attention"].build(tree, CPU)
    slots, queries = 2 * 5 + 6 * 4, 6 * 2
    assert case.bytes == slots * (2 * 8 * 64 * 2 + 4) + 2 * queries * 32 * 64 * 2
    assert case.operations == 6 * (8 + 9) * 4 * 32 * 64  # the first of the two queries sees one token less
    assert floor_seconds(case, Rates(copy=case.bytes / 2, matrix=case.operations)) == 2
    assert floor_seconds(case, Rates(copy=case.bytes, matrix=case.operations / 3)) == 3


def test_a_nan_does_not_pass():
    nan = Prepared(lambda _: torch.tensor([torch.nan]), lambda out: {"x": out})
    case = Case("none", "nan", CPU, 1, {}, {"x": torch.ones(1)}, {"x": 1.0})
    with pytest.raises(AssertionError, match="deviates"):
        refcheck(case, "nan", nan)


def test_limits_are_ratios_of_medians_that_alternate():
    order = []

    def clock(name, times):
        rest = iter(times)
        return name, lambda: order.append(name) or next(rest)

    limit = alternating(clock("a", [9, 1, 2, 5]), clock("b", [9, 8, 6, 7]), at_least=3.0, rounds=3)
    assert order == ["a", "b"] * 4
    assert (limit.ratio, limit.seconds) == (3.5, 2)  # the first of each does not count
    assert "ok" in str(limit) and "BROKEN" in str(limit._replace(at_least=4.0))


def test_a_tree_is_as_before_when_its_heartbeat_is_over():
    forest = Forest(groups=3, rows=2, segment=4, trunk=5)
    before = forest.tree.free_slots, forest.tree.nodes
    nodes, packed = forest.plan()
    assert len(nodes) == 6 and forest.tree.free_slots == before[0] - 6 * 3
    forest.commit(nodes.tolist())
    forest.commit(forest.fork())
    assert (forest.tree.free_slots, forest.tree.nodes) == before
    paths = [forest.tree.slots(leaf).tolist() for leaf in forest.leaves]
    assert len(tables_of_lists(paths, list(range(18)), 6, 3)) <= len(packed)

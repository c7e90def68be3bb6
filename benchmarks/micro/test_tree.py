"""The tree of slots, 64 requests with 8 candidates of 16 tokens each: fork, plan, commit."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from stars_fast.tree.segment_tree import plan

from .conftest import Report
from .limits import alternating, clocked
from .trees import PROMISE, Forest, tables_of_lists


@pytest.fixture(scope="module")
def forest() -> Forest:
    return Forest()


def _timed(benchmark: BenchmarkFixture, target: Callable[..., Any], setup: Any, teardown: Any) -> None:
    benchmark.group = "tree 64x8"
    benchmark.pedantic(target, setup=setup, teardown=teardown, rounds=200, warmup_rounds=20)


def test_plan(benchmark: BenchmarkFixture, forest: Forest) -> None:
    last: list[Any] = []
    _timed(benchmark, lambda: last.append(forest.plan()[0]), None, lambda: forest.commit(last.pop().tolist()))


def test_plan_as_tensors(benchmark: BenchmarkFixture, forest: Forest) -> None:
    last: list[Any] = []

    def call() -> None:
        last.append(plan(forest.tree, forest.named, forest.rows, forest.new_slots, "cpu").branches)

    _timed(benchmark, call, None, lambda: forest.commit(last.pop()))


def test_fork_one_by_one(benchmark: BenchmarkFixture, forest: Forest) -> None:
    last: list[Any] = []
    _timed(benchmark, lambda: last.append(forest.fork()), None, lambda: forest.commit(last.pop()))


def test_commit(benchmark: BenchmarkFixture, forest: Forest) -> None:
    _timed(benchmark, forest.commit, lambda: ((forest.plan()[0].tolist(),), {}), None)


def _plan_seconds(forest: Forest, commit: bool = False) -> float:
    start = time.perf_counter()
    nodes = forest.plan()[0]
    planned = time.perf_counter()
    names = nodes.tolist()
    begun = time.perf_counter()
    forest.commit(names)
    return planned - start + (time.perf_counter() - begun if commit else 0)


def test_a_plan_costs_no_more_than_a_few_copies_of_its_tables(forest: Forest, report: Report) -> None:
    """50 us for 64 requests with 8 candidates, said as a ratio, so that it holds on any machine."""
    nodes, packed = forest.plan()
    forest.commit(nodes.tolist())
    # The copy is the faster one: "at least 1/25" reads: a plan takes at most 25 copies.
    report.require(
        alternating(
            (f"plan 64x8 (promised: {PROMISE * 1e6:.0f} us)", lambda: _plan_seconds(forest)),
            (f"a copy of its {packed.nbytes:,} bytes", clocked(packed.copy, 10)),
            at_least=1 / 25,
            rounds=200,
        )
    )


def test_plan_and_commit_beat_lists(forest: Forest, report: Report) -> None:
    paths = [forest.tree.slots(leaf).tolist() for leaf in forest.leaves]
    free = list(range(len(forest.new_slots) * forest.segment))
    branches, new_slots = len(forest.new_slots), forest.segment - 1
    report.require(
        alternating(
            ("plan and commit 64x8", lambda: _plan_seconds(forest, commit=True)),
            ("the tables from Python lists", clocked(lambda: tables_of_lists(paths, free, branches, new_slots))),
            at_least=3,
            rounds=200,
        )
    )
    assert forest.tree.nodes == len(forest.leaves)

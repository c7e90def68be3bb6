"""Each contender of each case: compared with the reference, then timed."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from .cases import OPERATORS, Absent, Case, contenders, refcheck
from .conftest import Report, Row
from .timing import floor_seconds, round_of

HAS = {"cpu": True, "cuda": torch.cuda.is_available()}


def _all() -> list[Any]:
    """Contenders of a case stand together; for a device that is not there, each is listed once, to be skipped."""
    return [
        pytest.param(operator, device, shape, contender, id=f"{operator}-{device}-{name}-{contender}")
        for operator, found in OPERATORS.items()
        for device in HAS
        for shape, name in ([(s, s.name) for s in found.shapes[device]] if HAS[device] else [(None, "any")])
        for contender in contenders(operator, device)
    ]


@functools.lru_cache(maxsize=1)
def _built(operator: str, shape: Any, device: str) -> Case:
    return OPERATORS[operator].build(shape, torch.device(device))


@pytest.mark.parametrize(("operator", "device", "shape", "contender"), _all())
def test_agrees_with_the_reference_and_is_timed(
    operator: str, device: str, shape: Any, contender: str, benchmark: BenchmarkFixture, report: Report
) -> None:
    try:
        if not HAS[device]:
            raise Absent("no CUDA device")
        reached = report.rates_of(torch.device(device))
        case = _built(operator, shape, device)
        prepared = case.prepared(contender)
    except Absent as absent:
        report.absent[str(absent), operator].add(contender)
        pytest.skip(str(absent))
    refcheck(case, contender, prepared)
    one = round_of(case, prepared)
    benchmark.group = f"{operator} {device} {case.name}"
    benchmark.pedantic(one.run, setup=one.reset, rounds=one.rounds)
    if benchmark.disabled:
        return
    seconds = benchmark.stats.stats.median / one.calls
    bandwidth, floor = case.bytes / seconds, floor_seconds(case, reached)
    row = Row(
        operator, case.name, device, contender, seconds, bandwidth, bandwidth / reached.copy, floor / seconds, one.graph
    )
    report.rows.append(row)
    benchmark.extra_info.update(
        row._asdict(), bytes=case.bytes, operations=case.operations, calls=one.calls, sets=prepared.sets, floor=floor
    )

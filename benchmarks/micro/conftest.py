"""The yardsticks of a session, and the table at its end."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

import pytest
import torch

from stars_fast.bench.yardsticks import Rates, rates

from .limits import Limit
from .refcheck import OURS
from .timing import in_table


class Row(NamedTuple):
    """One line of the table."""

    operator: str
    case: str
    device: str
    backend: str
    seconds: float
    bandwidth: float
    of_copy: float
    of_floor: float
    graph: bool


class Report:
    """What a session has found."""

    def __init__(self) -> None:
        self.rates: dict[str, Rates] = {}
        self.rows: list[Row] = []
        self.limits: list[Limit] = []
        self.absent: dict[tuple[str, str], set[str]] = defaultdict(set)  # who, by reason and operator

    def rates_of(self, device: torch.device) -> Rates:
        """Measured when first asked for."""
        if device.type not in self.rates:
            self.rates[device.type] = rates(device)
        return self.rates[device.type]

    def require(self, limit: Limit) -> None:
        """Note a ratio, and raise AssertionError where it is under its limit."""
        self.limits.append(limit)
        assert limit.ratio >= limit.at_least, str(limit)


REPORT = pytest.StashKey[Report]()


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.stash[REPORT] = Report()
    config.option.benchmark_quiet = True  # its table shows rounds, ours calls; --benchmark-verbose shows both


@pytest.fixture(scope="session")
def report(pytestconfig: pytest.Config) -> Report:
    return pytestconfig.stash[REPORT]


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    if torch.cuda.is_available():
        machine_info["gpu"] = torch.cuda.get_device_name()


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    report = config.stash[REPORT]
    output_json["rates"] = {device: found._asdict() for device, found in report.rates.items()}
    output_json["limits"] = [limit._asdict() for limit in report.limits]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    report = config.stash[REPORT]
    for device, found in report.rates.items():
        terminalreporter.section(_yardsticks(torch.device(device), found))
        for operator in dict.fromkeys(row.operator for row in report.rows if row.device == device):
            rows = [row for row in report.rows if (row.device, row.operator) == (device, operator)]
            for line in table(operator, rows):
                terminalreporter.write_line(line)
    for limit in report.limits:
        terminalreporter.write_line(str(limit))
    for (reason, operator), who in report.absent.items():
        terminalreporter.write_line(f"not measured, {reason}: {operator} by {', '.join(sorted(who))}")


def _yardsticks(device: torch.device, found: Rates) -> str:
    gpu = in_table(device)
    of_peak = f" ({found.copy / gpu.bandwidth:.0%} of the data sheet)" if gpu else ""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{name}: a copy moves {found.copy / 1e9:.4g} GB/s{of_peak}, a product {found.matrix / 1e12:.3g} TFLOP/s"


def table(operator: str, rows: list[Row]) -> list[str]:
    """Lines for one operator. ``speed``: ours over that of the fastest other in the same case."""
    width = max(len(operator), *(len(row.case) for row in rows))
    head = f"{operator:{width}}  {'backend':18}  {'time, us':>10}  {'GB/s':>7}  {'of copy':>7}  {'of floor':>8}"
    lines = ["", f"{head}  speed"]
    previous = ""
    for row in rows:
        others = [other for other in rows if other.case == row.case and other.backend != OURS[row.device]]
        compared = ""
        if row.backend == OURS[row.device] and others:
            best = min(others, key=lambda other: other.seconds)
            compared = f"{best.seconds / row.seconds:.2f}x {best.backend}"
        if row.device == "cuda" and not row.graph:
            compared += " (not captured: launches included)"
        case = row.case if row.case != previous else ""
        previous = row.case
        measured = f"{row.seconds * 1e6:10.1f}  {row.bandwidth / 1e9:7.3g}  {row.of_copy:7.1%}  {row.of_floor:8.1%}"
        lines.append(f"{case:{width}}  {row.backend:18}  {measured}  {compared}".rstrip())
    return lines

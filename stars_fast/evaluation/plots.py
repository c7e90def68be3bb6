"""Quality against compute, one point per method and budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stars_fast.evaluation.cells import BASELINE
from stars_fast.evaluation.tables import Row, budget_text
from stars_fast.report.figures import new_figure, save

_MARKERS = "osD^vPX*<>ph"


def plot(rows: Sequence[Row], folder: Path) -> None:
    """Draw the judge's reward and the win rate against compute per token, as ``quality_against_compute`` in a folder.

    Raises
    ------
    ImportError
        Without matplotlib, saying what to install.
    """
    x = "compute per returned token (policy forward passes)"
    both = "judge's reward", f"wins against {BASELINE}, ties half (%)"
    figure, (left, right) = new_figure(folder.name, x, *both)
    for place, method in enumerate(dict.fromkeys(row.method for row in rows)):
        points = sorted((row for row in rows if row.method == method), key=lambda row: row.compute)
        style = {"marker": _MARKERS[place % len(_MARKERS)], "color": f"C{place % 10}", "label": method}
        _line(left, points, [(row.judge.value, row.judge.low, row.judge.high) for row in points], style)
        _line(right, points, [(100 * row.win.value, 100 * row.win.low, 100 * row.win.high) for row in points], style)
    right.axhline(50, color="0.6", linewidth=0.8, zorder=0)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    save(figure, folder, "quality_against_compute")


def _line(axes: Any, rows: Sequence[Row], values: Sequence[tuple[float, float, float]], style: dict[str, Any]) -> None:
    middle = [value for value, _, _ in values]
    spread = [[value - low for value, low, _ in values], [high - value for value, _, high in values]]
    places = [row.compute for row in rows]
    axes.errorbar(places, middle, yerr=spread, linewidth=1, elinewidth=0.5, markersize=5, **style)
    for row, place, value in zip(rows, places, middle, strict=True):
        axes.annotate(budget_text(row.budget), (place, value), (3, 3), textcoords="offset points", fontsize=6)

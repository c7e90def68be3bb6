"""The plots of ``stars-fast bench``, drawn from its record: one idea each."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stars_fast.bench.workload import title
from stars_fast.report.figures import log_axis, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record = dict[str, Any]


class _Plot(NamedTuple):
    """What is drawn of a sweep."""

    sweep: str
    name: str
    measure: str  # "tokens_per_second" or "seconds"
    x: str
    log: bool = True


_PLOTS = (
    _Plot("batch", "speed-by-batch", "tokens_per_second", "prompts in the batch"),
    _Plot("candidates", "speed-by-candidates", "tokens_per_second", "candidates drawn side by side, per prompt"),
    _Plot(
        "acceptance",
        "speed-by-acceptance",
        "tokens_per_second",
        "candidates that the target lets pass (share)",
        log=False,
    ),
    _Plot("segment-length", "speed-by-segment-length", "tokens_per_second", "segment length (tokens)"),
    _Plot("prompts", "cost-by-prompts", "seconds", "prompts in one call"),
    _Plot("prompt-length", "cost-by-prompt-length", "seconds", "prompt length (tokens)"),
    _Plot("new-tokens", "cost-by-new-tokens", "seconds", "new tokens per prompt (max_new_tokens)"),
    _Plot("candidates", "cost-by-candidates", "seconds", "candidates drawn side by side, per prompt"),
)
_Y = {"tokens_per_second": "accepted tokens/s (median, range)", "seconds": "seconds per call (median, range)"}
_MARKERS = "osD^v*x"


def draw(record: Record, folder: Path) -> list[Path]:
    """Draw every plot that the record has a sweep for. Returns the files: a PNG and an SVG each.

    Raises
    ------
    ImportError
        Without matplotlib, naming the extra.
    """
    paths: list[Path] = []
    for plot in _PLOTS:
        points = [point for point in record["points"] if point["sweep"] == plot.sweep]
        if points:
            paths += _draw(plot, points, record, folder)
    return paths


def _draw(plot: _Plot, points: list[Record], record: Record, folder: Path) -> list[Path]:
    field = record["sweeps"][plot.sweep]
    same = title(points[0]["workload"], field)
    figure, (axes,) = new_figure(f"{record['models']}, {record['dtype']}\n{same}", plot.x, _Y[plot.measure])
    x = [point["workload"][field] for point in points]
    for marker, name in zip(_MARKERS, points[0]["contestants"], strict=False):
        found = [point["contestants"][name][plot.measure] for point in points]
        y = [one["median"] for one in found]
        spread = [[one["median"] - one["min"] for one in found], [one["max"] - one["median"] for one in found]]
        axes.errorbar(x, y, spread, marker=marker, markersize=5, linewidth=1.5, capsize=2, label=name)
    if plot.log:
        log_axis(axes, "x", x)
    _scale_y(axes, plot, x, points)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(frameon=False, fontsize=9)
    return save(figure, folder, plot.name)


def _scale_y(axes: Axes, plot: _Plot, x: list[float], points: list[Record]) -> None:
    """Speed from zero, unless it spans a decade. Cost on a logarithmic axis, beside the line of proportional cost."""
    values = [one[plot.measure]["median"] for point in points for one in point["contestants"].values()]
    if plot.measure == "seconds":
        first = next(iter(points[0]["contestants"].values()))["seconds"]["median"]
        axes.plot(x, [first * value / x[0] for value in x], color="0.6", linestyle=":", label="proportional")
    elif max(values) < 10 * min(values):
        axes.set_ylim(bottom=0)
        return
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    log_axis(axes, "y", [step * 10.0**power for power in range(low, high + 1) for step in (1, 2, 5)])
    axes.set_ylim(min(values) / 2, max(values) * 2)

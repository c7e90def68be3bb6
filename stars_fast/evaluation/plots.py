"""Quality against what it costs, one point per method and budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stars_fast.evaluation.cells import BASELINE
from stars_fast.evaluation.tables import Row, budget_text
from stars_fast.report.figures import new_figure, save

_MARKERS = "osD^vPX*<>ph"


# By name of a plot: what it is drawn against, and how that axis is divided.
_AGAINST = {
    "compute": ("compute per returned token (policy forward passes)", "log"),
    "answers": ("policy tokens of an answer, in an unguided one's", "log"),
    "kl": ("KL to the policy (nats a text; of a search: at most)", "linear"),
}


def plot(rows: Sequence[Row], folder: Path) -> None:
    """Draw guide's and judge's reward and the win rate against compute, policy tokens and KL into a folder, each as
    ``quality_against_...``. Rows without a KL are not in that plot.

    Raises
    ------
    ImportError
        Without matplotlib, saying what to install.
    """
    for name, (label, scale) in _AGAINST.items():
        figure, every = new_figure(
            folder.name, label, "guide's reward", "judge's reward", f"wins against {BASELINE} (%)"
        )
        for place, method in enumerate(dict.fromkeys(row.method for row in rows)):
            own = [row for row in rows if row.method == method and math.isfinite(getattr(row, name))]
            points = sorted(own, key=lambda row: getattr(row, name))
            style = {"marker": _MARKERS[place % len(_MARKERS)], "color": f"C{place % 10}", "label": method}
            for axes, scorer, unit in zip(every, ("guide", "judge", "win"), (1, 1, 100), strict=True):
                _line(axes, points, name, scorer, unit, style)
        every[-1].axhline(50, color="0.6", linewidth=0.8, zorder=0)
        if scale == "log":
            for axes in every:
                axes.set_xscale("log", base=2)
                axes.xaxis.set_major_formatter("{x:g}")
        handles, labels = every[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", frameon=False)
        save(figure, folder, f"quality_against_{name}")


def _line(axes: Any, rows: Sequence[Row], against: str, scorer: str, unit: float, style: dict[str, Any]) -> None:
    if not rows:
        return
    found = [getattr(row, scorer) for row in rows]
    middle = [unit * one.value for one in found]
    spread = [[unit * (one.value - one.low) for one in found], [unit * (one.high - one.value) for one in found]]
    places = [getattr(row, against) for row in rows]
    axes.errorbar(places, middle, yerr=spread, linewidth=1, elinewidth=0.5, markersize=5, **style)
    for row, place, value in zip(rows, places, middle, strict=True):
        axes.annotate(budget_text(row.budget), (place, value), (3, 3), textcoords="offset points", fontsize=6)

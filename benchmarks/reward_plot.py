"""README's plot: reward against policy tokens, from the newest record of each task in ``benchmarks/results``.

python benchmarks/reward_plot.py                  # writes docs/reward.svg
python benchmarks/reward_plot.py --scorer guide   # under the reward that methods follow, not the judge

A record is the ``table.json`` of ``stars-fast eval``, kept as ``<date>-eval-<task>.json``. Of its rows five methods are
drawn: the point of vanilla, and from it best-of-N, blockwise best-of-N, STARS as its paper has it (``stars``, one
target for all prompts; ``stars+fit`` is in the record) and optimal stopping with a fit.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS, OUTPUT = ROOT / "benchmarks" / "results", ROOT / "docs" / "reward.svg"
# Methods of a table, what the plot calls them, and colours that can be told apart on white and on black.
SERIES = {
    "optimal_stopping+fit": ("optimal stopping", "#2f81f7"),
    "blockwise_best_of_n": ("blockwise best-of-N", "#d1741c"),
    "stars": ("STARS", "#2da44e"),
    "best_of_n": ("best-of-N", "#bf4b8a"),
}
_BASELINE = "vanilla"
_GREY = "#858d96"  # text and axes: as dark on white as it is bright on black
_MOST = 20.0  # best-of-64 would leave the others a corner


def newest(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """By task, its latest record."""
    records = {}
    for path in sorted(folder.glob("*-eval-*.json")):
        records[path.stem.partition("-eval-")[2]] = json.loads(path.read_text(encoding="utf-8"))
    return records


def points(record: Mapping[str, Any], method: str, scorer: str) -> list[tuple[float, float, float, float]]:
    """Of each budget, from the baseline on: policy tokens of an answer in an unguided one's, mean reward, interval."""
    rows = [row for row in record["rows"] if row["method"] in (_BASELINE, method)]
    found = [tuple(row[name] for name in ("answers", scorer, f"{scorer}_low", f"{scorer}_high")) for row in rows]
    return sorted(point for point in found if point[0] <= _MOST)


def draw(records: Mapping[str, Mapping[str, Any]], scorer: str, output: Path) -> None:
    """Write the plot, the same bytes for the same records: a panel for each task."""
    import matplotlib
    from matplotlib.figure import Figure

    look: Any = {
        "svg.hashsalt": "stars-fast",
        "svg.fonttype": "none",
        "font.size": 10,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _GREY),
    }
    with matplotlib.rc_context(look):
        figure = Figure(figsize=(4.6 * len(records), 3.6), layout="constrained")
        figure.patch.set_alpha(0.0)
        every = figure.subplots(1, len(records), squeeze=False)[0]
        for axes, (task, record) in zip(every, records.items(), strict=True):
            panel(axes, record, scorer)
            axes.set_title(task, fontsize=10)
        every[0].set_ylabel({"guide": "reward", "judge": "reward of a judge (it guided none)"}[scorer])
        figure.legend(
            *every[0].get_legend_handles_labels(),
            loc="outside lower center",
            ncols=2 * min(2, len(records)),
            frameon=False,
        )
        figure.savefig(output, metadata={"Date": None, "Creator": None})


def panel(axes: Any, record: Mapping[str, Any], scorer: str) -> None:
    """One task: a line for each method from vanilla on, with a band for its intervals."""
    for method, (label, colour) in SERIES.items():
        found = points(record, method, scorer)
        tokens, means, lows, highs = zip(*found, strict=True)
        axes.fill_between(tokens, lows, highs, color=colour, alpha=0.12, linewidth=0)
        axes.plot(tokens, means, color=colour, linewidth=1.6, marker="o", markersize=3.5, label=label)
    tokens, mean, *_ = points(record, _BASELINE, scorer)[0]
    axes.plot([tokens], [mean], color=_GREY, linewidth=0, marker="D", markersize=6, zorder=3)
    axes.annotate("vanilla", (tokens, mean), (9, -9), textcoords="offset points", fontsize=9)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("answers: policy tokens drawn for one answer,\nover those of an unguided one")
    axes.patch.set_alpha(0.0)
    axes.grid(True, color=_GREY, alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scorer", choices=("judge", "guide"), default="judge")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    given = parser.parse_args(arguments)
    records = newest(given.results)
    if not records:
        parser.error(f"no *-eval-*.json in {given.results}")
    draw(records, given.scorer, given.output)


if __name__ == "__main__":
    main()

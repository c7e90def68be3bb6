"""A figure, and its files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stars_fast.names import with_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIZE = (6.4, 4.0)  # inches, of a pair of axes
_DOTS_PER_INCH = 160


def require_matplotlib() -> None:
    """Raise ImportError, saying what to install, where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(f"plots need matplotlib: {with_extra('report')} ({error})") from error


def new_figure(title: str, x: str, *y: str) -> tuple[Figure, list[Axes]]:
    """An empty figure with a pair of labelled axes for each ``y``. It belongs to no display and no global state."""
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_SIZE[0] * len(y), _SIZE[1]), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    every: list[Axes] = list(figure.subplots(1, len(y), squeeze=False)[0])
    for axes, label in zip(every, y, strict=True):
        axes.set_xlabel(x)
        axes.set_ylabel(label)
        axes.grid(True, which="major", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    return figure, every


def log_axis(axes: Axes, which: str, values: Sequence[float]) -> None:
    """Make the "x" or "y" axis logarithmic, with a tick at each of these values, written out."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(FixedLocator(list(values)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write ``name.png`` and ``name.svg`` into a folder, which is made if needed. Returns both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{kind}" for kind in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=_DOTS_PER_INCH)
    return paths

"""A progress bar for one call of the engine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from stars_fast.outputs import SegmentEvent


@contextmanager
def progress_bar(show: bool, total: int) -> Iterator[Callable[[SegmentEvent], None]]:
    """Yield a function to be called with every event of ``total`` responses; it does nothing unless ``show``.

    The bar goes to stderr and leaves stdout alone.
    """
    if not show:
        yield lambda event: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    started, segments, attempts, tokens, tested = time.perf_counter(), 0, 0, 0, False
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, TextColumn("{task.fields[rate]}"), console=console, redirect_stdout=False) as bar:
        task = bar.add_task("responses", total=total, rate="")

        def advance(event: SegmentEvent) -> None:
            nonlocal segments, attempts, tokens, tested
            if event.segment is not None:
                segments += event.segment.accepted
                attempts += event.segment.attempts
                tokens += len(event.segment.tokens)
                tested |= math.isfinite(event.segment.threshold)  # best-of-N's is inf, a population's NaN
            speed = tokens / (time.perf_counter() - started)
            acceptance = f", acceptance {segments / attempts:.0%}" if tested else ""
            rate = f"{speed:.0f} accepted tokens/s{acceptance}"
            bar.update(task, advance=event.finish_reason is not None, rate=rate)

        yield advance

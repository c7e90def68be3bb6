"""What is told of requests while they run: events of a stream, transformers' streamers, and a progress bar."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from stars_fast.loop.request import Request
from stars_fast.methods.numbers import shown
from stars_fast.notices import warn
from stars_fast.outputs import Cause, SegmentEvent, SegmentTrace


def new_events(request: Request, tokenizer: Any) -> Iterator[SegmentEvent]:
    """One event per segment that was not told of yet; one without a segment where the request failed."""
    if request.finish_reason in ("error", "abort"):
        yield _event(request, None, request.tokens, request.finish_reason, tokenizer)
        return
    first, request.reported = request.reported, len(request.segments)
    new = request.segments[first:]
    end = len(request.tokens) - sum(len(segment.tokens) for segment in new)
    for place, segment in enumerate(new, 1):
        end += len(segment.tokens)
        reason = request.finish_reason if place == len(new) else None
        yield _event(request, segment, request.tokens[:end], reason, tokenizer)


def _event(
    request: Request, segment: SegmentTrace | None, tokens: Sequence[int], reason: str | None, tokenizer: Any
) -> SegmentEvent:
    text = None
    if tokenizer is not None:
        text, cause = request.text.piece(tokenizer, tokens, last=reason is not None)
        if reason is not None and request.error is None:
            request.error = cause
    return SegmentEvent(
        index=request.index,
        prompt_index=request.prompt_index,
        sample_index=request.sample_index,
        segment=segment,
        text=text,
        finish_reason=reason,
        error=None if reason is None or request.error is None else str(request.error),
    )


class Streaming:
    """A transformers streamer, or none, that is ended once when the outermost ``with`` is left, however it is left:
    whoever reads it waits for that.
    """

    def __init__(self, streamer: Any) -> None:
        self.wanted = streamer is not None
        self._streamer, self._depth = streamer, 0

    @classmethod
    def of(cls, streamer: Any) -> Streaming:
        """``streamer`` itself where somebody outside has taken it already. Raises TypeError for what is none."""
        if isinstance(streamer, cls):
            return streamer
        if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
            raise TypeError(f"streamer={shown(streamer)}: give a transformers streamer, with put and end")
        return cls(streamer)

    def put(self, tokens: torch.Tensor) -> None:
        self._streamer.put(tokens)

    def __enter__(self) -> Streaming:
        self._depth += 1
        return self

    def __exit__(self, *error: object) -> None:
        self._depth -= 1
        if self.wanted and not self._depth:
            try:
                self._streamer.end()
            except Exception as raised:  # the answer is whole, or another error is on its way
                warn(f"the streamer could not be ended: it raised {Cause.of(raised)}")


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

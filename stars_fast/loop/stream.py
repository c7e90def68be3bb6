"""What is told of requests while they run: events of a stream, transformers' streamers, and a progress bar."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from stars_fast.loop.request import Request
from stars_fast.methods.base import Method
from stars_fast.methods.numbers import shown
from stars_fast.notices import warn
from stars_fast.outputs import Cause, SegmentEvent, SegmentTrace, as_cause


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
        error=None if reason is None or request.error is None else as_cause(request.error).without_frames(),
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


class Progress:
    """What a bar shows of a call; nothing where it has none.

    Parameters
    ----------
    method : Method
        Of the call: what is told beside the speed goes by it.
    bar : rich.progress.Progress, optional
    responses, calibrating : rich.progress.TaskID, optional
        The bar's lines.
    """

    def __init__(self, method: Method, bar: Any = None, responses: Any = None, calibrating: Any = None) -> None:
        self._method, self._bar, self._responses, self._calibrating = method, bar, responses, calibrating
        self._started = time.perf_counter()
        self._segments, self._accepted, self._attempts, self._tokens, self._tested = 0, 0, 0, 0, False
        self._pilots, self._drawn = 0, 0

    def expect(self, prompts: int) -> None:
        """So many prompts more are calibrated first."""
        self._pilots += prompts
        if self._bar is not None and self._pilots:
            self._bar.update(self._calibrating, total=self._pilots, visible=True)

    def calibrated(self, tokens: int) -> None:
        """A prompt has its target, for which so many tokens were drawn."""
        self._drawn += tokens
        if self._bar is not None:
            self._bar.update(self._calibrating, advance=1, rate=f"{self._drawn:,} tokens drawn")

    def advance(self, event: SegmentEvent) -> None:
        """A response has grown, or ended."""
        if event.segment is not None:
            self._segments += 1
            self._accepted += event.segment.accepted
            self._attempts += event.segment.attempts
            self._tokens += len(event.segment.tokens)
            self._tested |= math.isfinite(event.segment.threshold)
        if self._bar is not None:
            speed = self._tokens / (time.perf_counter() - self._started)
            rate = ", ".join(filter(None, (f"{speed:.0f} tokens/s", self.choice)))
            self._bar.update(self._responses, advance=event.finish_reason is not None, rate=rate)

    @property
    def choice(self) -> str:
        """How candidates were chosen so far, in the terms of the method."""
        if self._method.has_target:
            return f"acceptance {self._accepted / self._attempts:.0%}" if self._tested and self._attempts else ""
        if self._method.loop == "rsd":
            return f"{self._accepted / self._segments:.0%} of drafts kept" if self._segments else ""
        if self._method.loop in ("chains", "persona") or self._method.name == "mara":
            return ""  # attempts count no candidates there (docs/methods.md)
        if self._attempts <= self._segments:
            return ""
        return f"{self._attempts / self._segments:.1f} candidates a segment"


@contextmanager
def progress_bar(show: bool, total: int, method: Method, name: str = "responses") -> Iterator[Progress]:
    """Yield what is told of ``total`` responses, and shows it where it is to ``show``.

    The bar goes to stderr and leaves stdout alone.
    """
    if not show:
        yield Progress(method)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    # The bar takes what room the words leave.
    columns = (TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Bar(*columns, TextColumn("{task.fields[rate]}"), console=console, expand=True, redirect_stdout=False) as bar:
        calibrating = bar.add_task("calibrating", total=0, rate="", visible=False)
        yield Progress(method, bar, bar.add_task(name, total=total, rate=""), calibrating)

"""What a stream tells of a request: its segments, one event each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from stars_fast.outputs import SegmentEvent, SegmentTrace
from stars_fast.request import Request


def new_events(request: Request, tokenizer: Any) -> Iterator[SegmentEvent]:
    """One event per segment that was not told of yet; one without a segment where the request failed."""
    if request.error is not None:
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
        whole = tokenizer.decode(tokens, skip_special_tokens=True)
        # A character may be split between segments: what is not complete waits for the next event.
        ready = whole if reason else whole.rstrip("\ufffd")
        text = ready[request.text_length :]
        request.text_length = max(len(ready), request.text_length)
    return SegmentEvent(
        index=request.index,
        prompt_index=request.prompt_index,
        sample_index=request.sample_index,
        segment=segment,
        text=text,
        finish_reason=reason,
        error=request.error,
    )

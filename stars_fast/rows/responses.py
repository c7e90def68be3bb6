"""Runs rows through the engine, batch after batch, and gives back each as it is finished."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from stars_fast.config import StarsConfig
from stars_fast.engine import StarsEngine
from stars_fast.inputs.arguments import Arguments
from stars_fast.inputs.job import Job
from stars_fast.loop.stream import Progress
from stars_fast.outputs import SegmentEvent, SegmentTrace, StarsOutput
from stars_fast.rows.reading import Row
from stars_fast.rows.records import record
from stars_fast.text.tokens import text_of

Records = list[dict[str, Any]]


def finished_rows(
    engine: StarsEngine,
    rows: Sequence[Row],
    config: StarsConfig,
    batch_size: int,
    bar: Progress,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    traced: Callable[[StarsOutput], None] | None = None,
) -> Iterator[Records]:
    """Records of one row at a time, one per sample. Rows that cannot be used come first, with their error.

    ``traced`` is given each batch once it is through, with its trace.

    Raises
    ------
    ValueError, TypeError, NotImplementedError
        For what is wrong with every row: a setting, a missing tokenizer.
    """
    sound = list[Row]()
    for row in rows:
        error = row.error
        if error is None and row.shows_pictures and engine.processor is None:
            error = f"{row.place}: has a picture, and there is no processor to read it: give processor="
        if error is None:
            sound.append(row)
        else:
            yield _rejected(row, error, config, bar)
    for start in range(0, len(sound), batch_size):
        batch = sound[start : start + batch_size]
        yield from _finished_batch(engine, batch, config, bar, chat_template_kwargs, traced)


def _finished_batch(
    engine: StarsEngine,
    rows: list[Row],
    config: StarsConfig,
    bar: Progress,
    chat_template_kwargs: Mapping[str, Any] | None,
    traced: Callable[[StarsOutput], None] | None,
) -> Iterator[Records]:
    def asked(some: Sequence[Row]) -> Arguments:
        prompts, seeds = [row.asked for row in some], [row.seed for row in some]
        kept = traced is not None
        return Arguments(prompts, config, seed=seeds, chat_template_kwargs=chat_template_kwargs, trace=kept)

    while rows:
        try:
            job = Job(engine.prepare(asked(rows)), engine.tokenizer)
            events = engine.events(job)
            job.show_on(bar)
            first = next(events)
        except (ValueError, TypeError) as error:  # nothing has been generated yet
            place, cause = _culprit(error)
            if place is None:
                raise
            refused = {place: cause}
        else:
            yield from _gathered(engine, chain([first], events), rows, config, bar)
            if traced is not None:
                traced(engine.output(job))
            return
        # Where one is refused others may be: each is asked for alone, since a batch names the first and no more.
        for other in set(range(len(rows))) - {place}:
            try:
                engine.prepare(asked([rows[other]]))
            except (ValueError, TypeError) as error:
                named, cause = _culprit(error)
                if named is not None:
                    refused[other] = cause
        for place in sorted(refused):
            yield _rejected(rows[place], refused[place], config, bar)
        rows = [row for place, row in enumerate(rows) if place not in refused]


def _culprit(error: Exception) -> tuple[int | None, str]:
    """The prompt that the engine complains about, and the complaint of one that is given alone."""
    named = re.match(r"prompts\[(\d+)\]", str(error))
    return (int(named[1]), str(error).replace(named[0], "the prompt")) if named else (None, str(error))


def _gathered(
    engine: StarsEngine,
    events: Iterable[SegmentEvent],
    rows: Sequence[Row],
    config: StarsConfig,
    bar: Progress,
) -> Iterator[Records]:
    segments: dict[int, list[SegmentTrace]] = {}
    records: dict[int, Records] = {}
    for event in events:
        bar.advance(event)
        own = segments.setdefault(event.index, [])
        if event.segment is not None:
            own.append(event.segment)
        if event.finish_reason is None:
            continue
        tokens = [token for segment in segments.pop(event.index) for token in segment.tokens]
        text, cause = (None, None) if engine.tokenizer is None else text_of(engine.tokenizer, tokens)
        row, done = rows[event.prompt_index], records.setdefault(event.prompt_index, [])
        error = event.error or (None if cause is None else str(cause))
        done.append(record(row, event.sample_index, tokens, text, own, event.finish_reason, error))
        if len(done) == config.num_return_sequences:
            yield sorted(records.pop(event.prompt_index), key=lambda one: one["sample"])


def _rejected(row: Row, error: str, config: StarsConfig, bar: Progress) -> Records:
    samples = range(config.num_return_sequences)
    for sample in samples:
        bar.advance(SegmentEvent(-1, -1, sample, None, None, "error", error))
    return [record(row, sample, error=error) for sample in samples]

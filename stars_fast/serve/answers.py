"""The answers to one request: its prompts run side by side, and their events become texts that only grow."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, NamedTuple

from stars_fast.async_engine import QueueFull, usage_at, was_refused
from stars_fast.config import StarsConfig
from stars_fast.outputs import CandidateTrace, SegmentEvent, SegmentTrace, as_cause
from stars_fast.report.files import rounded, summary
from stars_fast.serve.errors import Refusal, failed, unavailable
from stars_fast.serve.schema import Asked, ChatRequest
from stars_fast.serve.service import Service
from stars_fast.text.decode import continuation
from stars_fast.text.tokens import legible

_log = logging.getLogger("stars_fast.serve")


class StopCut:
    """Text up to the first stop string. What may be the beginning of one waits for what follows."""

    def __init__(self, strings: Sequence[str]) -> None:
        self.strings, self.held, self.found = strings, "", False

    def add(self, text: str, last: bool) -> str:
        """What may be shown, now that the text goes on like this."""
        if self.found:
            return ""
        text, self.held = self.held + text, ""
        found = [(place + len(string), place) for string in self.strings if (place := text.find(string)) >= 0]
        if found:  # which is complete first does not depend on how the text came in pieces
            self.found = True
            return text[: min(found)[1]]
        begun = 0 if last else max((_beginning(text, string) for string in self.strings), default=0)
        self.held = text[len(text) - begun :]
        return text[: len(text) - begun]


def _beginning(text: str, string: str) -> int:
    """Length of the longest end of the text that is a beginning of the string."""
    return next((n for n in range(min(len(string) - 1, len(text)), 0, -1) if text.endswith(string[:n])), 0)


class Choice:
    """One answer, as far as it has come; with a tokenizer, its trace as well.

    ``trace`` has all its segments where they are ``kept``, and otherwise those of the last event alone.
    """

    def __init__(self, index: int, stops: Sequence[str], tokenizer: Any, kept: bool) -> None:
        self.index, self.attempts, self.reward, self.tokens, self.kept = index, 0, math.nan, 0, kept
        self.trace = list[dict[str, Any]]()
        self.finish_reason: str | None = None
        self._tokenizer, self._ids = tokenizer, list[int]()  # candidates are decoded behind them
        self._cut, self._texts = StopCut(stops), list[str]()

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def add(self, event: SegmentEvent) -> str:
        """Take the event in. Returns what the text has grown by."""
        if not self.kept:
            self.trace = []
        if event.segment is not None:
            self.attempts += event.segment.attempts
            self.reward = event.segment.reward
            if self._tokenizer is not None:
                self.trace.append(self._segment(event.segment))
                self._ids += event.segment.tokens
            self.tokens += len(event.segment.tokens)
        return self._show(event.text or "", event.finish_reason)

    def end(self) -> str:
        """The time is up. Returns what was held back."""
        if not self.kept:
            self.trace = []
        return self._show("", "abort")

    def _show(self, text: str, reason: str | None) -> str:
        text = self._cut.add(text, last=reason is not None)
        if self.kept:
            self._texts.append(text)
        self.finish_reason = "stop" if reason is not None and self._cut.found else reason
        return text

    @property
    def about(self) -> dict[str, Any]:
        """What there is to say of an answer that has ended beside its text."""
        return {"reward": rounded(self.reward), "tokens": self.tokens, "attempts": self.attempts}

    def _segment(self, segment: SegmentTrace) -> dict[str, Any]:
        record = {**summary(segment), "logprob": rounded(segment.logprob)}
        if segment.candidates is not None:
            record["candidates"] = [self._candidate(candidate) for candidate in segment.candidates]
        return record

    def _candidate(self, candidate: CandidateTrace) -> dict[str, Any]:
        text = continuation(self._tokenizer, self._ids, candidate.tokens, skip_special_tokens=True)
        record: dict[str, Any] = {
            name: rounded(value) if isinstance(value, float) else value for name, value in candidate._asdict().items()
        }
        parts: dict[str, Any] | None = None
        if candidate.parts is not None:
            parts = {name: rounded(value) for name, value in candidate.parts.items()}
        return {**record, "text": legible(self._tokenizer, candidate.tokens) if text is None else text, "parts": parts}


class _End(NamedTuple):
    """A prompt is through, or came to an error."""

    place: int
    error: BaseException | None


class _TimeIsUp(Exception):
    """Not a TimeoutError, which a reward may raise."""


class Exchange:
    """One request: from its place in the queue to what it has cost."""

    def __init__(self, service: Service, name: str, body: Asked, prompts: Sequence[Any], config: StarsConfig) -> None:
        self.service, self.name, self.body, self.prompts, self.config = service, name, body, prompts, config
        stops = () if config.stop_strings is None else config.stop_strings
        count = len(prompts) * body.samples
        tokenizer = service.engine.engine.tokenizer if body.traced else None
        self.choices = [Choice(index, stops, tokenizer, not body.stream) for index in range(count)]
        self.costs: dict[int, dict[str, Any]] = {}  # by prompt
        self.segments, self._began = 0, time.monotonic()
        self.left = False  # the client has
        self.refusal: Refusal | None = None  # what it came to, if not to answers

    async def steps(self) -> AsyncGenerator[tuple[Choice, str], None]:
        """Each choice that has moved, with what its text has grown by. Leaving early ends what is under way.

        Raises
        ------
        Refusal
            For what cannot be answered; where the time is up before anything was.
        """
        metrics, began, left = self.service.metrics, time.perf_counter(), True
        try:
            async with aclosing(self._events()) as events:
                async for event in events:
                    metrics.count(event)
                    self._check(event)
                    if not self.segments:
                        metrics.first.observe(time.perf_counter() - began)
                    self.segments += event.segment is not None
                    choice = self.choices[event.index]
                    yield choice, choice.add(event)
            left = False
        except _TimeIsUp:
            left = False
            if not self.segments:
                seconds = self.service.seconds(self.body)
                headers = {"X-Should-Retry": "false"}  # openai's client would
                self.refusal = Refusal(f"timeout={seconds:g}: nothing was there in time", 408, "timeout", headers)
                raise self.refusal from None
        except Refusal as refusal:
            left, self.refusal = False, refusal
            raise
        finally:
            self.left = left
            metrics.unheard.inc(left)
            metrics.prompt_tokens.inc(sum(cost.get("prompt_tokens", 0) for cost in self.costs.values()))
        for choice in self.choices:
            if choice.finish_reason is None:
                metrics.answers.labels("timeout").inc()
                yield choice, choice.end()

    def _check(self, event: SegmentEvent) -> None:
        if event.finish_reason == "abort":
            if not self.segments and (reason := self.service.trouble()) is not None:
                raise unavailable(reason)
        elif event.error is not None:
            _log.error("a request failed", extra={"fields": {"id": self.name, "error": event.error}})
            raise failed(as_cause(event.error).kind)

    async def _events(self) -> AsyncGenerator[SegmentEvent, None]:
        """Of all prompts, by the order in which they come; ``index`` counts all choices."""
        engine, prompts = self.service.engine, self.prompts
        try:
            engine.reserve(len(self.choices))
        except QueueFull as error:
            self.service.metrics.rejections.inc()
            raise unavailable(str(error)) from error
        news: asyncio.Queue[SegmentEvent | _End] = asyncio.Queue()
        begun = set[int]()
        tasks = [asyncio.create_task(self._pump(place, begun, news)) for place in range(len(prompts))]
        open_ = len(tasks)
        try:
            while open_:
                event = await news.get()
                if isinstance(event, SegmentEvent):
                    yield event
                elif event.error is not None:
                    raise self._failure(event)
                else:
                    open_ -= 1
        finally:
            for task in tasks:
                task.cancel()
            # Of each prompt that has begun, one ends itself. First: whoever waits here may be cancelled once more.
            engine.release(len(self.choices) - len(begun))
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pump(self, place: int, begun: set[int], news: asyncio.Queue[SegmentEvent | _End]) -> None:
        end: BaseException | None = None
        body, engine, name = self.body, self.service.engine, f"{self.name}-{place}"
        try:
            answer: Any = engine.generate(
                self.prompts[place],
                self.config,
                name,
                seed=body.seed,
                chat_template_kwargs=body.chat_template_kwargs if isinstance(body, ChatRequest) else None,
                priority=body.priority or 0,
                timeout=self.service.seconds(body),
                trace=body.traced,
                reserved=True,
            )
            begun.add(place)
            async with aclosing(answer) as events:
                async for event in events:
                    self.costs[place] = engine.usage(name) or {}
                    news.put_nowait(replace(event, index=place * body.samples + event.index))
        except BaseException as error:  # a tokenizer in Rust may panic, which is no Exception
            end = error
            self.costs[place] = usage_at(error) or self.costs.get(place, {})
            if isinstance(error, (asyncio.CancelledError, KeyboardInterrupt, SystemExit)):
                raise
        finally:
            news.put_nowait(_End(place, end))  # or the request would wait for ever

    def _failure(self, end: _End) -> Exception:
        """What a request is told that was not let in, or whose answers broke off together."""
        error, seconds = end.error, self.service.seconds(self.body)
        assert error is not None
        if isinstance(error, TimeoutError) and seconds is not None and time.monotonic() >= self._began + seconds:
            return _TimeIsUp()
        if was_refused(error):
            where = f"prompt[{end.place}]" if len(self.body.prompts) > 1 else "prompt"
            return self.service.refused(str(error).replace("prompts[0]", where))
        if (reason := self.service.trouble()) is not None:
            return unavailable(reason)
        _log.error("a request failed", exc_info=error, extra={"fields": {"id": self.name}})
        return failed(type(error).__name__)

    @property
    def notes(self) -> dict[str, Any]:
        """What the log says of it: no texts."""
        usage = self.usage
        return {
            "id": self.name,
            "stream": bool(self.body.stream),
            "prompts": len(self.body.prompts),
            "n": self.body.samples,
            **usage.pop("stars"),
            **usage,
            "segments": self.segments,
            "rewards": [rounded(choice.reward) for choice in self.choices],
            "finish_reasons": [choice.finish_reason for choice in self.choices],
            **({"disconnected": True} if self.left else {}),
            **({} if self.refusal is None else {"error": self.refusal.body["error"]["type"]}),
        }

    @property
    def usage(self) -> dict[str, Any]:
        """OpenAI's counts, and beside them what was drawn for these tokens."""
        costs, tokens = list(self.costs.values()), sum(choice.tokens for choice in self.choices)
        total = {
            name: sum(cost.get(field, 0) for cost in costs)
            for name, field in (
                ("prompt_tokens", "prompt_tokens"),
                ("drawn_tokens", "policy_tokens"),
                ("scored_tokens", "reward_tokens"),
                ("calibration_tokens", "calibration_tokens"),
            )
        }
        prompt = total.pop("prompt_tokens")
        candidates = sum(choice.attempts for choice in self.choices)
        stars = {**total, "discarded_tokens": total["drawn_tokens"] - tokens, "candidates": candidates}
        return {
            "prompt_tokens": prompt,
            "completion_tokens": tokens,
            "total_tokens": prompt + tokens,
            "stars": stars,
        }

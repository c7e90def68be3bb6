"""Answers as server-sent events: a chunk for each committed segment, of which nothing is ever taken back."""

from __future__ import annotations

import asyncio
import logging
from asyncio import Task
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing, suppress
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from stars_fast.serve.answers import Choice, Exchange
from stars_fast.serve.errors import Refusal, to_json

_log = logging.getLogger("stars_fast.serve")
_T = TypeVar("_T")
_DONE = b"data: [DONE]\n\n"
_KEEP_ALIVE = b": keep-alive\n\n"
Steps = AsyncGenerator[tuple[Choice, str], None]
First = Task[tuple[Choice, str] | None]


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class Form(Protocol):
    """How an endpoint writes its answers."""

    prefix: str  # of ids
    whole: str  # what objects call themselves
    chunk: str

    def choice(self, choice: Choice) -> dict[str, Any]:
        """A whole answer."""

    def begin(self) -> dict[str, Any] | None:
        """What the first chunk of each answer holds, before any text."""

    def text(self, text: str) -> dict[str, Any]:
        """What a chunk holds."""


class Completion:
    prefix, whole, chunk = "cmpl-", "text_completion", "text_completion"

    def choice(self, choice: Choice) -> dict[str, Any]:
        return {"text": choice.text}

    def begin(self) -> dict[str, Any] | None:
        return None

    def text(self, text: str) -> dict[str, Any]:
        return {"text": text}


class Chat:
    prefix, whole, chunk = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def choice(self, choice: Choice) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": choice.text, "refusal": None}}

    def begin(self) -> dict[str, Any] | None:
        return {"delta": {"role": "assistant", "content": ""}}

    def text(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text}}


async def while_heard(request: Request, work: Coroutine[Any, Any, _T], seconds: float | None = None) -> Task[_T]:
    """Await the work, for so many seconds. Raises ClientGone, and cancels it, where the client leaves first.

    What it raises within that time is raised here.
    """
    task, gone = asyncio.create_task(work), asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
        elif gone.done():
            raise ClientGone
    except BaseException:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        raise
    finally:
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
    return task


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def next_of(steps: Steps) -> tuple[Choice, str] | None:
    """The next step; None behind the last."""
    with suppress(StopAsyncIteration):
        return await anext(steps)
    return None


def whole_choice(form: Form, choice: Choice, traced: bool) -> dict[str, Any]:
    """An answer that has ended."""
    stars = {**choice.about, **({"trace": choice.trace} if traced else {})}
    common = {"index": choice.index, "finish_reason": choice.finish_reason, "logprobs": None}
    return {**common, **form.choice(choice), "stars": stars}


class Stream(StreamingResponse):
    """Server-sent events. What makes them is closed however the response ends, and then ``ended`` is called."""

    def __init__(
        self, events: AsyncGenerator[bytes, None], first: First, steps: Steps, ended: Callable[[], None]
    ) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx would collect the events
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._events, self._first, self._steps, self._ended = events, first, steps, ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()
            self._first.cancel()  # where the client left before the first event was made
            await asyncio.gather(self._first, return_exceptions=True)
            await self._steps.aclose()
            self._ended()


async def server_sent(
    form: Form, head: dict[str, Any], exchange: Exchange, waiting: First, steps: Steps
) -> AsyncGenerator[bytes, None]:
    """The events of an exchange whose first step is under way. ``head``: what all chunks have in common."""
    options, traced = exchange.body.stream_options, exchange.body.traced
    counted = bool(options and options.include_usage)
    head = {**head, "object": form.chunk, **({"usage": None} if counted else {})}
    begun = set[int]()
    async with aclosing(steps):
        try:
            while True:
                while not waiting.done():
                    yield _KEEP_ALIVE
                    await asyncio.wait({waiting}, timeout=exchange.service.keep_alive)
                if (step := waiting.result()) is None:
                    break
                choice, text = step
                begin = form.begin()
                if begin is not None and choice.index not in begun:
                    begun.add(choice.index)
                    yield _event(head, {"index": choice.index, "finish_reason": None, "logprobs": None, **begin})
                yield _event(head, _chunk(form, choice, text, traced))
                waiting = asyncio.create_task(next_of(steps))
                await asyncio.wait({waiting}, timeout=exchange.service.keep_alive)
            if counted:
                yield _data({**head, "choices": [], "usage": exchange.usage})
        except Refusal as refusal:
            yield _data(refusal.body)
        except Exception as error:
            _log.error("a stream failed", exc_info=error, extra={"fields": {"id": exchange.name}})
            yield _data(Refusal(f"the server failed: {type(error).__name__}", 500).body)
        finally:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
    yield _DONE


def _chunk(form: Form, choice: Choice, text: str, traced: bool) -> dict[str, Any]:
    stars = choice.about if choice.finish_reason is not None else {}
    if traced and choice.trace:
        stars = {**stars, "trace": choice.trace}
    common = {"index": choice.index, "finish_reason": choice.finish_reason, "logprobs": None}
    return {**common, **form.text(text), **({"stars": stars} if stars else {})}


def _event(head: dict[str, Any], choice: dict[str, Any]) -> bytes:
    return _data({**head, "choices": [choice]})


def _data(content: dict[str, Any]) -> bytes:
    return b"data: " + to_json(content) + b"\n\n"

"""Many callers on one event loop: a thread that takes the core's steps, and a stream of events for each caller."""

from __future__ import annotations

import asyncio
import os
import queue
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import fields
from itertools import count
from typing import Any

from stars_fast.config import StarsConfig
from stars_fast.engine import StarsEngine
from stars_fast.inputs.arguments import Arguments
from stars_fast.inputs.job import Job
from stars_fast.loop.caller import MOST_POSITIONS, SEGMENT_LENGTH, Size
from stars_fast.loop.core import of_its_own
from stars_fast.loop.team import release_team
from stars_fast.methods.numbers import MOST, integer, real, shown, truth
from stars_fast.outputs import SegmentEvent, Stats
from stars_fast.stays import Stays


class QueueFull(RuntimeError):
    """As many requests are open as may be."""


# What errors carry.
_REFUSED, _USAGE = "_stars_fast_refused", "_stars_fast_usage"


def was_refused(error: BaseException) -> bool:
    """Whether :meth:`AsyncStarsEngine.generate` raised it for its arguments, before anything was drawn."""
    return hasattr(error, _REFUSED)


def usage_at(error: BaseException) -> dict[str, Any] | None:
    """:meth:`AsyncStarsEngine.usage` when it raised this; None where it had not begun."""
    return vars(error).get(_USAGE)


@contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, NotImplementedError) as error:
        vars(error)[_REFUSED] = True
        raise


class _Place:
    """An open request's name in its session, given back once: when its events have been read or closed, or else with
    the frame that holds this. An event loop that ends right behind a reader who broke off never closes them.
    """

    def __init__(self, session: AsyncStarsEngine, name: str) -> None:
        self._session, self._name, self._held = session, name, True
        self.job: Job | None = None
        session._jobs[name] = None

    def give_back(self) -> None:
        if self._held:
            self._held = False
            self._session._leave(self._name, self.job)

    __del__ = give_back


class AsyncStarsEngine(Stays):
    """Serves requests of many callers at a time, each with its own configuration, seed, deadline and priority.

    They share both models, their trees and every heartbeat; the text of (prompt, config, seed) is that of
    ``StarsEngine.generate([prompt], config, seed=[seed])``. Prompts that begin alike share their keys and values, also
    with requests that have ended, as far as room allows: the models' weights must not change while this is open.

    Parameters
    ----------
    engine : StarsEngine
        Held open until :meth:`close`. Its own ``generate`` and ``stream`` may be used meanwhile, from other threads. A
        forked child has none of this: it makes an AsyncStarsEngine of its own.
    max_model_len : int, optional
        Most tokens of a prompt with its answer, at least 2. Where the policy has fewer positions, an encoder-decoder in
        both its parts, these are taken without a word; the attribute says what holds. Default: the policy's positions,
        at most 8,192.
    max_segment_length : int
        Longest segment, at least 1. A heartbeat lasts as long as its longest segment, and admission, abort, timeout and
        the first event wait for one.
    max_waiting : int
        Most open requests, at least 1; one more raises :class:`QueueFull`.

    Raises
    ------
    RuntimeError
        If the engine is generating.
    TypeError, ValueError
        For arguments that are not what they should be.

    Examples
    --------
    >>> async def answer(prompt):  # doctest: +SKIP
    ...     async with AsyncStarsEngine(engine) as served:
    ...         async for event in served.generate(prompt, StarsConfig(target_reward=2.0), seed=0):
    ...             print(event.text, end="", flush=True)
    """

    def __init__(
        self,
        engine: StarsEngine,
        *,
        max_model_len: int | None = None,
        max_segment_length: int = SEGMENT_LENGTH,
        max_waiting: int = 256,
    ) -> None:
        if not isinstance(engine, StarsEngine):
            raise TypeError(f"engine={shown(engine)}: give a StarsEngine")
        self.engine, self._process = engine, os.getpid()
        longest = MOST_POSITIONS if max_model_len is None else integer("max_model_len", max_model_len, 2, MOST)
        self.max_model_len = min(longest, engine.policy.longest or longest)
        self.max_segment_length = min(integer("max_segment_length", max_segment_length, 1), self.max_model_len)
        self.max_waiting = integer("max_waiting", max_waiting, 1)
        self.dead: BaseException | None = None  # what ended the thread
        self._jobs: dict[str, Job | None] = {}  # None while the prompt is being read
        self._aborted: set[str] = set()  # of those that are being read
        self._closed = False
        self._inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._names, self._reserved, self._draining = count(), 0, False
        self._ended = Stats()  # of requests that have ended, added up
        self._leaving: list[Job] = []  # whose callers have gone
        engine.core.hold(Size.of_session(engine.max_rows, self.max_model_len, self.max_segment_length))
        release_team()
        self._thread = threading.Thread(target=self._run, name="stars-fast-engine", daemon=True)
        self._thread.start()

    def reserve(self, requests: int = 1) -> None:
        """Count further open requests, before anything is awaited: a burst may not pass the limit together.

        Each is for one :meth:`generate` with ``reserved=True``, which ends it, or for :meth:`release`.

        Raises
        ------
        QueueFull
            Where they would be more than ``max_waiting``.
        """
        if self._open + integer("requests", requests, 0) > self.max_waiting:
            raise QueueFull(f"{self._open} requests are open, of max_waiting={self.max_waiting}")
        self._reserved += requests

    def release(self, requests: int = 1) -> None:
        """Take back what :meth:`reserve` has counted, of requests that will not be made."""
        self._reserved -= requests

    async def __aenter__(self) -> AsyncStarsEngine:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, where: Any) -> None:
        """Wait until the open requests have ended, unless something was raised, and :meth:`close`."""
        if kind is None:
            await self.drain()
        await asyncio.to_thread(self.close)

    async def generate(
        self,
        prompt: Any,
        config: StarsConfig | None = None,
        request_id: str | None = None,
        *,
        seed: int | None = None,
        reward_prompt: Any = None,
        columns: dict[str, Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        priority: int = 0,
        timeout: float | None = None,
        trace: bool = False,
        reserved: bool = False,
    ) -> AsyncIterator[SegmentEvent]:
        """Answer one prompt. Leaving the loop early, or cancelling it, aborts the request.

        Parameters
        ----------
        prompt : str, chat message list, list of int, or what a tokenizer or processor returns of one
        config : StarsConfig, optional
        request_id : str, optional
            For :meth:`abort`.
        seed : int, optional
            None draws one from torch's global generator.
        reward_prompt : like prompt, optional
            What the reward sees as the prompt, where that differs.
        columns : dict, optional
            Further arguments of a callable reward: a value each.
        chat_template_kwargs : mapping, optional
            Variables for chat templates, as in :meth:`StarsEngine.generate`.
        priority : int
            Lower is let in first, and gives way last.
        timeout : float, optional
            Seconds, at least 0.
        trace : bool
            Whether the events' segments have their ``candidates``, as in :meth:`StarsEngine.generate`.
        reserved : bool
            Whether :meth:`reserve` has counted this request already.

        Yields
        ------
        SegmentEvent
            One per committed segment. The last of every sample has a ``finish_reason``: "stop", "length", "error"
            (with ``error``), or "abort".

        Raises
        ------
        ValueError, TypeError, NotImplementedError
            For what :meth:`StarsEngine.generate` refuses, and what the session has no room for.
        QueueFull
            Where as many requests are open as may be.
        TimeoutError
            When the time is up; what was yielded stays good.
        RuntimeError
            If this is closed or draining, the thread that takes the steps has died, or this process was forked from the
            one that made it.
        """
        if not reserved:
            self.reserve()
        self._reserved -= 1  # from here on it counts by its name
        place, loop, news = None, asyncio.get_running_loop(), asyncio.Event()

        def notify() -> None:
            with suppress(RuntimeError):  # the event loop is gone, and its callers with it
                loop.call_soon_threadsafe(news.set)

        try:
            with _refusing():
                if not isinstance(request_id, (str, type(None))):
                    raise TypeError(f"request_id={shown(request_id)} must be a string")
                if not isinstance(columns, (Mapping, type(None))):
                    raise TypeError(f"columns={shown(columns)}: give a mapping of name to value")
                priority = integer("priority", priority)
                timeout = None if timeout is None else real("timeout", timeout, 0.0)
                name = request_id or self._new_name()
                self._check_open(name)
                place = _Place(self, name)
                deadline = None if timeout is None else time.monotonic() + timeout
                arguments = Arguments(
                    [prompt],
                    config,
                    columns={key: [value] for key, value in (columns or {}).items()},
                    reward_prompts=None if reward_prompt is None else [reward_prompt],
                    seed=None if seed is None else [integer("seed", seed)],
                    chat_template_kwargs=chat_template_kwargs,
                    trace=truth("trace", trace),
                )
                call = await asyncio.to_thread(self.engine.prepare, arguments)
            call.priority = priority
            self._check_alive()
            job = place.job = self._jobs[name] = Job(call, self.engine.tokenizer, deadline=deadline, notify=notify)
            job.aborted = name in self._aborted
            self._inbox.put(job)
            if self._closed or self.dead is not None:  # meanwhile, by another thread: nobody reads it any more
                self._end_inbox()
            while not (job.over and not job.events):
                await news.wait()
                news.clear()
                while job.events:
                    yield job.events.popleft()
            if job.error is not None:
                vars(job.error)[_USAGE] = self.usage(name)
                asked = job.begun or self.dead is not None
                with nullcontext() if asked else _refusing():  # the thread that refused it may not have come so far
                    raise job.error
        finally:
            if place is not None:
                place.give_back()
                self._count_ended()

    async def abort(self, request_id: str) -> None:
        """End a request: its last events say "abort". Nothing happens where it is not known, or over."""
        job = self._jobs.get(request_id)
        if job is not None and not job.over:
            job.aborted = True
            self.engine.core.abort(job)
        elif request_id in self._jobs:
            self._aborted.add(request_id)

    def usage(self, request_id: str) -> dict[str, Any] | None:
        """What an open request has cost so far: ``prompt_tokens``, and the fields of :class:`Stats`; None where it is
        not known, over, or still being read. At its last event, that is the whole cost.
        """
        job = self._jobs.get(request_id)
        if job is None:
            return None
        return {"prompt_tokens": sum(len(prompt.ids) for prompt in job.call.prompts), **job.stats.to_dict()}

    async def drain(self, timeout: float | None = None) -> None:
        """Take no more requests and wait until the open ones have ended; after ``timeout`` seconds, at least 0, abort
        them.
        """
        self._check_process()
        timeout = None if timeout is None else real("timeout", timeout, 0.0)
        self._draining = True
        deadline = None if timeout is None else time.monotonic() + timeout
        # Not until they are read to their end: who has left off reading may never go on.
        while any(job is None or not job.over for job in list(self._jobs.values())):
            if deadline is not None and time.monotonic() >= deadline:
                break
            await asyncio.sleep(0.01)
        for name in list(self._jobs):
            await self.abort(name)

    def metrics(self) -> dict[str, Any]:
        """Counts since this was opened: the fields of :class:`Stats` added up over all requests, ``open_requests``,
        ``running``, ``waiting``, and slots of the policy's tree: ``policy_slots``, ``policy_slots_free`` (kept prefixes
        hold some).
        """
        total, loop = Stats(), self.engine.core.loop
        self._count_ended()
        running = [job for job in [*self._leaving, *self._jobs.values()] if job is not None]
        for stats in (self._ended, *(job.stats for job in running)):
            _add(total, stats)
        tree = self.engine.policy.tree
        return {
            **total.to_dict(),
            "open_requests": self._open,
            "running": 0 if loop is None else len(loop.running) + len(loop.encoding),
            "waiting": 0 if loop is None else len(loop.waiting),
            "policy_slots": tree.capacity - 1,
            "policy_slots_free": tree.free_slots,
        }

    def close(self) -> None:
        """End all requests and the thread; the engine is free again, and every slot.

        A reward of its own that calls this does not wait: the thread ends behind the step that asks it.
        """
        self._closed = True
        self._end_all()
        if self._thread.is_alive():
            self._inbox.put(None)
            if not self.engine.core.inside:
                self._thread.join()
        self._end_inbox()

    @property
    def _open(self) -> int:
        """Requests that are open, or to be made."""
        return self._reserved + len(self._jobs)

    def _leave(self, name: str, job: Job | None) -> None:
        """A caller has gone. Each step is one of the interpreter's: it may be collecting garbage, on any thread."""
        del self._jobs[name]
        self._aborted.discard(name)
        if job is not None:
            self._leaving.append(job)
            if not job.over:
                job.aborted = True
                self.engine.core.abort(job)

    def _end_all(self) -> None:
        for job in list(self._jobs.values()):
            if job is not None:
                job.end(self._end())
                self.engine.core.abort(job)

    def _end_inbox(self) -> None:
        """End what nobody will read. The thread's end may be among it, and must still come."""
        with suppress(queue.Empty):
            while True:
                if (job := self._inbox.get_nowait()) is not None:
                    job.end(self._end())
        self._inbox.put(None)

    def _end(self) -> Exception:
        """What a caller is told of the end of all, an error of its own."""
        if self.dead is None:
            return RuntimeError("this engine was closed")
        if isinstance(self.dead, Exception):
            return of_its_own(self.dead)
        # By what is no Exception, such as a panic in Rust, the callers' event loops would end, too.
        return RuntimeError(f"the engine's thread has died: {self.dead!r}")

    def _count_ended(self) -> None:
        """Those who left early count on until the heartbeat is through."""
        for job in [job for job in self._leaving if job.over]:
            self._leaving.remove(job)
            _add(self._ended, job.stats)

    def _new_name(self) -> str:
        return next(name for name in (f"request-{i}" for i in self._names) if name not in self._jobs)

    def _check_open(self, name: str) -> None:
        self._check_alive()
        if self._draining:
            raise RuntimeError("this engine takes no more requests: it is draining")
        if name in self._jobs:
            raise ValueError(f"request_id={name!r} is in use")

    def _check_process(self) -> None:
        if self._process != os.getpid():
            raise RuntimeError(
                "this AsyncStarsEngine stayed in the process that was forked, with its thread: make another one here, "
                "AsyncStarsEngine(engine)"
            )

    def _check_alive(self) -> None:
        self._check_process()
        if self.engine.core.inside:
            raise RuntimeError("this engine is generating: a reward or hook of its own call cannot wait for it")
        if self.dead is not None:
            raise RuntimeError("the engine's thread has died") from self.dead
        if self._closed:
            raise RuntimeError("this engine takes no more requests: it is closed")

    def _run(self) -> None:
        """The thread: lets jobs in between steps, and sleeps where there is nothing to do."""
        core, busy = self.engine.core, False
        try:
            while True:
                try:
                    job = self._inbox.get(block=not busy)
                except queue.Empty:
                    busy = core.step()
                    continue
                if job is None:
                    return
                try:
                    if not job.over:
                        with _refusing():
                            core.submit(job)
                        busy = True
                except Exception as error:  # what the session has no room for, or the reward cannot score
                    job.end(error)
        except BaseException as error:
            self.dead = error
            self._end_all()
            raise
        finally:
            core.let_go()


def _add(total: Stats, stats: Stats) -> None:
    for field in fields(Stats):
        value = getattr(stats, field.name)
        if isinstance(value, Counter):
            value = Counter(dict(value))  # a copy in one step: the engine's thread goes on counting
        setattr(total, field.name, getattr(total, field.name) + value)  # a Counter adds up, too

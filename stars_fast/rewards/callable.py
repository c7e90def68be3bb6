"""A plain function as the reward, called as TRL calls reward functions."""

from __future__ import annotations

import asyncio
import inspect
import os
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from typing import Any

import torch
from transformers import PreTrainedModel

from stars_fast.methods.numbers import shown
from stars_fast.notices import warn
from stars_fast.rewards.base import Completion, Reward, RewardPrompt
from stars_fast.rewards.values import one_each
from stars_fast.text.prompts import ends_with_answer
from stars_fast.text.tokenizers import check_tokenizer
from stars_fast.text.turns import in_one_piece
from stars_fast.tree.media import takes_media

_OWN_ARGUMENTS = ("prompts", "completions", "completion_ids")


class CallableReward(Reward):
    """Wraps ``function(prompts, completions, completion_ids=..., **columns) -> list[float | None]``, sync or async.

    Parameters
    ----------
    function : callable
        Called by keyword with those of ``prompts``, ``completions``, ``completion_ids`` and the columns that it can
        take. Chats arrive as message lists, their completions as ``[{"role": "assistant", "content": text}]``; where a
        chat ends with the beginning of the answer, that stands in the completion and not in the prompt. A prompt's
        pictures are the column ``images``, a list of them, unless the call has one of that name; one that needs
        ``images`` gets an empty list for a prompt that has none. What an async one keeps between calls (clients, locks)
        stays good: a session of the engine has one event loop.
    tokenizer : transformers tokenizer, optional
        The policy's. Without one, prompts and completions are lists of ids.
    """

    reads_text = True

    def __init__(self, function: Callable[..., Any], tokenizer: Any = None) -> None:
        if not callable(function):
            raise TypeError(f"function={shown(function)} must be callable")
        check_tokenizer("tokenizer", tokenizer)
        self.function = function
        self.tokenizer = tokenizer
        called = function.forward if isinstance(function, torch.nn.Module) else function
        try:
            parameters = inspect.signature(called).parameters.values()
        except ValueError as error:  # of some that are not written in Python
            raise ValueError(f"function={shown(function)}: {error}; give a Python function that calls it") from error
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._names = {p.name for p in parameters if p.kind in named}
        self._positional = [p for p in parameters if p.kind is p.POSITIONAL_ONLY]
        self._required = [p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, *named)]
        self._loop: _LoopThread | None = None
        self._may_see = False

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_loop": None, "_calls": 0}  # a copy is in no session

    @property
    def described(self) -> str:
        return f"{super().described} of {getattr(self.function, '__qualname__', type(self.function).__name__)}"

    def check_policy(self, policy: PreTrainedModel, tokenizer: Any) -> None:
        self._may_see = takes_media(policy)

    @property
    def needed(self) -> list[str]:
        """Columns that the function cannot do without."""
        return [name for name in self._required if name not in _OWN_ARGUMENTS]

    def check(self, prompts: Sequence[RewardPrompt], max_new_tokens: int, kv_cache_tokens: int | None) -> None:
        for name in self.needed:
            # Of a policy of text, `images` is a column like any other: nobody's prompts have pictures.
            told = (prompt.media is not None or name in prompt.columns for prompt in prompts)
            may_see = name != "images" or self._may_see or any(told)
            if not may_see or any(name not in self._columns(prompt) for prompt in prompts):
                if not any(map(self._takes, _OWN_ARGUMENTS)):
                    raise ValueError(
                        f"the reward function takes {', '.join(self._required)} and none of prompts, completions and "
                        "completion_ids: it is called by these names, with a list of each"
                    )
                raise ValueError(
                    f"the reward function needs {name!r}, which is neither prompts, completions or completion_ids nor "
                    f"a column: pass columns={{{name!r}: one value per prompt}}, or give the parameter a default"
                )

    def begin(
        self, prompts: Sequence[RewardPrompt], max_new_tokens: int, rows: int, kv_cache_tokens: int | None
    ) -> None:
        self._enter_call()

    def end(self) -> None:
        if self._leave_call() and self._loop is not None:
            self._loop.close()
            self._loop = None

    def score(self, completions: Sequence[Completion]) -> Sequence[float | None] | torch.Tensor:
        groups: dict[tuple[str, ...], list[int]] = {}  # one call serves those with the same columns
        for place, completion in enumerate(completions):
            names = tuple(name for name in sorted(self._columns(completion.response.prompt)) if self._takes(name))
            groups.setdefault(names, []).append(place)
        if len(groups) == 1:
            (names,) = groups
            return self._call(completions, names)
        rewards: list[float | None] = [None] * len(completions)
        for names, places in groups.items():
            values = one_each(self._call([completions[place] for place in places], names), len(places))
            for place, value in zip(places, values, strict=True):
                rewards[place] = value
        return rewards

    def _columns(self, prompt: RewardPrompt) -> dict[str, Any]:
        """What the function may be called with of the prompt, besides what is its own."""
        pictures = [] if prompt.media is None else list(prompt.media.images)
        known = bool(pictures) or (prompt.media is None and "images" in self._required)
        return {"images": pictures, **prompt.columns} if known else prompt.columns

    def _takes(self, name: str) -> bool:
        return self._takes_all or name in self._names or any(name == p.name for p in self._positional)

    def _call(self, completions: Sequence[Completion], columns: Sequence[str]) -> Sequence[float | None] | torch.Tensor:
        own: dict[str, Callable[[Completion], Any]] = {
            "prompts": self._prompt,
            "completions": self._completion,
            "completion_ids": lambda completion: completion.tokens,
        }
        # Text is made for those who read it: ids that cannot be decoded are none of the others' business.
        arguments = {name: list(map(read, completions)) for name, read in own.items() if self._takes(name)}
        for name in columns:
            arguments[name] = [self._columns(completion.response.prompt)[name] for completion in completions]
        positional = [arguments.pop(p.name, p.default) for p in self._positional]
        keywords = arguments if self._takes_all else {k: v for k, v in arguments.items() if k in self._names}
        result = self.function(*positional, **keywords)
        return self._wait(result) if inspect.isawaitable(result) else result

    def _wait(self, awaitable: Awaitable[Any]) -> Any:
        if self._calls:  # from begin to end: one loop for all
            if self._loop is not None and not self._loop.runs:
                self._loop.close()
                self._loop = None
            self._loop = self._loop or _LoopThread()
            return self._loop.wait(awaitable)
        loop = _LoopThread()
        try:
            return loop.wait(awaitable)
        finally:
            loop.close()

    def _prompt(self, completion: Completion) -> Any:
        source = completion.response.prompt.source
        if isinstance(source, list) and self.tokenizer is not None and not _is_messages(source):
            return self.tokenizer.decode(source, skip_special_tokens=True)
        return source[:-1] if self.tokenizer is not None and ends_with_answer(source) else source

    def _completion(self, completion: Completion) -> Any:
        if self.tokenizer is None:
            return completion.tokens
        source: Any = completion.response.prompt.source
        if ends_with_answer(source):
            begun = in_one_piece(source[-1]).get("content", "")
            return [{"role": "assistant", "content": begun + completion.continuation}]
        if _is_messages(source):
            return [{"role": "assistant", "content": completion.text}]
        return completion.text


def _is_messages(source: Any) -> bool:
    return isinstance(source, list) and bool(source) and isinstance(source[0], dict)


_PATIENCE = 5.0  # seconds for cancelled tasks: who waits for the engine waits for them, too
# Loops of a parent process: to close one in its child would reach into the parent's.
_left_to_parent: list[_LoopThread] = []


class _LoopThread:
    """An event loop on a thread of its own, so that one may already run on the caller's (a notebook)."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._ended: Future[BaseException | None] = Future()
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._run, name="stars-fast-reward", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        cause = None
        with torch.no_grad():  # torch keeps this per thread
            try:
                self._loop.run_forever()
            except BaseException as error:  # of a task: asyncio lets SystemExit end the loop
                cause = error
            self._ended.set_result(cause)
            with suppress(BaseException):
                self._loop.run_until_complete(self._wind_up())
            self._loop.close()

    @property
    def runs(self) -> bool:
        """Whether it can wait for anything: neither ended by what ran in it, nor left behind by a fork."""
        return self._process == os.getpid() and not self._ended.done()

    def wait(self, awaitable: Awaitable[Any]) -> Any:
        """The awaitable's result; it is cancelled where waiting is interrupted.

        Raises
        ------
        RuntimeError
            For an awaitable that exits or stops the loop.
        """

        async def result() -> Any:
            try:
                return await awaitable
            except (SystemExit, KeyboardInterrupt) as error:
                raise RuntimeError(f"it raised {type(error).__name__}: {error}") from error

        future = asyncio.run_coroutine_threadsafe(result(), self._loop)
        try:
            wait([future, self._ended], return_when=FIRST_COMPLETED)
        except BaseException:
            future.cancel()
            raise
        if self._ended.done() and (not future.done() or future.cancelled()):
            cause = self._ended.result()
            raise RuntimeError(f"it stopped its event loop{f' by {type(cause).__name__}' if cause else ''}")
        return future.result()

    def close(self) -> None:
        """Cancel what still runs, and end the thread; one that does not end is left behind, with a warning."""
        if self._process != os.getpid():
            _left_to_parent.append(self)
            return
        if not self._ended.done():
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_PATIENCE)
        if self._thread.is_alive():
            warn(
                f"the async reward had what did not end within {_PATIENCE:g} s of being cancelled, and left its thread "
                "behind: let its tasks end at asyncio.CancelledError, and call what blocks by asyncio.to_thread"
            )

    async def _wind_up(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._loop.shutdown_asyncgens()

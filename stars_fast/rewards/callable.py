"""A plain function as the reward, called as TRL calls reward functions."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from stars_fast.rewards.base import Completion, Reward


class CallableReward(Reward):
    """Wraps ``function(prompts, completions, completion_ids=..., **columns) -> list[float | None]``, sync or async.

    Parameters
    ----------
    function : callable
        Called by keyword with those of ``prompts``, ``completions``, ``completion_ids`` and the columns that it can
        take. Chats arrive as message lists, their completions as ``[{"role": "assistant", "content": text}]``.
    tokenizer : transformers tokenizer, optional
        The policy's. Without one, prompts and completions are lists of ids.
    """

    def __init__(self, function: Callable[..., Any], tokenizer: Any = None) -> None:
        self.function = function
        self.tokenizer = tokenizer
        parameters = inspect.signature(function).parameters.values()
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        self._positional = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]

    def score(self, completions: Sequence[Completion]) -> Sequence[float | None]:
        arguments: dict[str, Any] = {
            "prompts": [self._prompt(c) for c in completions],
            "completions": [self._completion(c) for c in completions],
            "completion_ids": [c.tokens for c in completions],
        }
        for name in completions[0].response.prompt.columns:
            arguments[name] = [c.response.prompt.columns[name] for c in completions]
        positional = [arguments.pop(name) for name in self._positional if name in arguments]
        keywords = arguments if self._takes_all else {k: v for k, v in arguments.items() if k in self._names}
        result = self.function(*positional, **keywords)
        return _wait(result) if inspect.isawaitable(result) else result

    def _prompt(self, completion: Completion) -> Any:
        source = completion.response.prompt.source
        if isinstance(source, list) and self.tokenizer is not None and not _is_messages(source):
            return self.tokenizer.decode(source, skip_special_tokens=True)
        return source

    def _completion(self, completion: Completion) -> Any:
        if self.tokenizer is None:
            return completion.tokens
        if _is_messages(completion.response.prompt.source):
            return [{"role": "assistant", "content": completion.text}]
        return completion.text


def _is_messages(source: Any) -> bool:
    return isinstance(source, list) and bool(source) and isinstance(source[0], dict)


def _wait(awaitable: Any) -> Any:
    """The result of an awaitable, also where an event loop already runs on this thread (a notebook)."""

    async def result() -> Any:
        return await awaitable

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(result())
    return _in_thread(result())


def _in_thread(coroutine: Coroutine[Any, Any, Any]) -> Any:
    outcome: list[Any] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(asyncio.run(coroutine))
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]

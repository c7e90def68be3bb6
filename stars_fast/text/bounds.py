"""Chat templates within bounds: they come with a model, and are programs that may run for ever or fill the memory.

A template is compiled by transformers, but for an environment that counts what it does while :func:`bounded` holds.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.runtime import Context, markup_join, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils import chat_template_utils

_CHARACTERS = 4 << 20  # that a template may make on top of what it is given
_SECONDS = 0.6  # of its thread's processor time, and as much again for every so many characters that it is given:
_CHARACTERS_A_SECOND = 1 << 20
_VALUES = 200_000  # in a list or mapping that is written as text
_BITS = 4096  # of a number
_SOURCE = 200_000  # characters of a template
_ENVIRONMENT = "ImmutableSandboxedEnvironment"  # what transformers calls the class that it compiles for
# Calls whose result is no longer than what they are called on. Of others it is estimated first.
_LINEAR = {
    *(
        "strip",
        "lstrip",
        "rstrip",
        "split",
        "rsplit",
        "splitlines",
        "partition",
        "rpartition",
        "startswith",
        "endswith",
    ),
    *(
        "endswith",
        "find",
        "rfind",
        "index",
        "rindex",
        "count",
        "lower",
        "upper",
        "title",
        "capitalize",
        "swapcase",
        "casefold",
    ),
    *("removeprefix", "removesuffix", "isdigit", "isalpha", "isalnum", "isspace", "isupper", "islower", "isnumeric"),
    *("trim", "length", "default", "d", "first", "last", "list", "map", "select", "reject", "selectattr", "rejectattr"),
    *("safe", "int", "float", "abs", "unique", "reverse", "sort", "dictsort", "sum", "min", "max", "attr", "string"),
    *("items", "e", "escape"),
}


class TooMuch(ValueError):
    """What a template asks for is beyond its bounds."""


class _Budget:
    """What one rendering may still make."""

    def __init__(self, given: int, turns: int) -> None:
        # Templates that add turn to turn make the beginning of the text as often as there are turns.
        self.characters = _CHARACTERS + given * (16 + turns)
        self.left = self.characters
        self.seconds = _SECONDS * (1 + given / _CHARACTERS_A_SECOND)
        self.deadline = time.thread_time() + self.seconds
        self.steps = 0

    def spend(self, size: int, by: str) -> None:
        self.left -= size
        if self.left < 0:
            raise TooMuch(f"the chat template makes more than {self.characters} characters, by {by}")
        if size > 4096:
            self.check_time()

    def step(self) -> None:
        self.steps += 1
        if self.steps % 256 == 0:
            self.check_time()

    def check_time(self) -> None:
        if time.thread_time() > self.deadline:
            raise TooMuch(f"the chat template runs for more than {self.seconds:.1f} s")

    def vet(self, name: str, arguments: Sequence[Any]) -> None:
        """Spend on a call what it may come to at most; the first of its arguments is what it is called on."""
        self.step()
        subject, others = (arguments[0], arguments[1:]) if arguments else ("", ())
        if name in _LINEAR:
            most = _size(subject)
        elif name == "replace" and isinstance(subject, str) and all(isinstance(one, str) for one in others[:2]):
            old, new = others[0] if others else "", others[1] if len(others) > 1 else ""
            most = len(subject) + subject.count(old) * len(new)
        else:
            widths = sum(map(int, re.findall(r"\d{1,12}", subject))) if name in ("format", "%") else 0
            most = (_size(subject) + 1) * (1 + widths + sum(map(_extent, others)))
        self.spend(most, f"{name}()")


_budget: ContextVar[_Budget | None] = ContextVar("stars_fast_template_budget", default=None)
_compiling = threading.Lock()


@contextmanager
def bounded(source: str, turns: Sequence[Any], variables: Any) -> Iterator[None]:
    """Renderings of this template, of these turns, raise :class:`TooMuch` where they go too far."""
    if len(source) > _SOURCE:
        raise TooMuch(f"the chat template has {len(source)} characters, more than {_SOURCE}")
    token = _budget.set(_Budget(_size(turns) + _size(variables), len(turns)))
    try:
        _compile(source)
        yield
    finally:
        _budget.reset(token)


def _compile(source: str) -> None:
    """Have transformers compile the template, which it remembers, for the environment that counts.

    Outside of :func:`bounded` that behaves as transformers' own.
    """
    compiled = getattr(chat_template_utils, "_compile_jinja_template", None)
    if compiled is None or not hasattr(chat_template_utils, _ENVIRONMENT):
        return  # a later transformers: better without bounds than not at all
    with _compiling:
        own = vars(chat_template_utils)[_ENVIRONMENT]
        vars(chat_template_utils)[_ENVIRONMENT] = BoundedEnvironment
        try:
            if not isinstance(compiled(source).environment, BoundedEnvironment):  # somebody else's rendering was first
                compiled.cache_clear()
                compiled(source)
        finally:
            vars(chat_template_utils)[_ENVIRONMENT] = own


def _size(value: Any) -> int:
    """Characters of a value, or a measure of them; a list or mapping may hold itself many times over."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, int):
        return value.bit_length() // 3
    size, values, stack = 0, 0, [value]
    while stack:
        one = stack.pop()
        values += 1
        if values > _VALUES:
            raise TooMuch(f"the chat template makes a list or mapping of more than {_VALUES} values")
        if isinstance(one, dict):
            stack += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple | set):
            stack += one
        size += 2 + (len(one) if isinstance(one, str | bytes) else 0)
    return size


def _extent(argument: Any) -> int:
    """How far an argument may stretch a result: a width, or the text that is put in."""
    if isinstance(argument, int):
        return abs(argument)
    several = argument.values() if isinstance(argument, dict) else argument
    numbers = (
        sum(abs(one) for one in several if isinstance(one, int)) if isinstance(argument, dict | list | tuple) else 0
    )
    return numbers + _size(argument)


class _Counted:
    """An iterable of which every step is counted."""

    def __init__(self, iterable: Any, budget: _Budget) -> None:
        self._iterable, self._budget = iterable, budget

    def __len__(self) -> int:
        return len(self._iterable)

    def __iter__(self) -> Iterator[Any]:
        for value in self._iterable:
            self._budget.step()
            yield value


class _Filters(dict[str, Callable[..., Any]]):
    """Filters that are vetted when they are called."""

    def __getitem__(self, name: str) -> Callable[..., Any]:
        return _vetted(name, super().__getitem__(name))

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self.keys() else default


def _vetted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    passed = 1 if hasattr(function, "jinja_pass_arg") else 0  # the context, or such, comes first

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if (budget := _budget.get()) is not None:
            budget.vet(name, [*args[passed:], *kwargs.values()])
        return function(*args, **kwargs)

    return call


class _Generator(CodeGenerator):
    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        """``a ~ b``, measured before it is made."""
        escape = "context.eval_ctx.autoescape" if frame.eval_ctx.volatile else bool(frame.eval_ctx.autoescape)
        self.write(f"environment.joined({escape}, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, which counts characters, steps and time while a budget holds."""

    code_generator_class = _Generator
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, optimized=False, finalize=_finalized)
        self.filters = _Filters(self.filters)

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        for loop in source.find_all(nodes.For):
            counted = nodes.EnvironmentAttribute("counted", environment=self, lineno=loop.lineno)
            loop.iter = nodes.Call(counted, [loop.iter], [], None, None, environment=self, lineno=loop.lineno)
        return super()._generate(source, *args, **kwargs)

    def counted(self, iterable: Any) -> Any:
        budget = _budget.get()
        if budget is None:
            return iterable
        return _Counted(iterable, budget) if hasattr(iterable, "__len__") else iter(_Counted(iterable, budget))

    def joined(self, escape: bool, parts: Sequence[Any]) -> str:
        if (budget := _budget.get()) is not None:
            budget.spend(sum(map(_size, parts)), "~")
        return (markup_join if escape else str_join)(parts)

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        if (budget := _budget.get()) is None:
            return "".join(pieces)
        kept = []
        for piece in pieces:
            budget.spend(len(piece), "its output")
            kept.append(piece)
        return "".join(kept)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if (budget := _budget.get()) is not None:
            budget.step()
            if isinstance(left, int) and isinstance(right, int):
                bits = left.bit_length() * (abs(right) if operator == "**" else 1) + right.bit_length()
                if bits > _BITS:
                    raise TooMuch(f"the chat template makes a number of more than {_BITS} bits, by {operator}")
            elif operator == "*":
                text, times = (right, left) if isinstance(left, int) else (left, right)
                budget.spend(_size(text) * max(times, 0) if isinstance(times, int) else 0, "*")
            elif operator == "%" and isinstance(left, str):
                budget.vet("%", [left, right])
            elif operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
                budget.spend(len(left) + len(right), "+")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        if (budget := _budget.get()) is not None:
            name, owner = getattr(function, "__name__", ""), getattr(function, "__self__", None)
            if name == "format":  # the sandbox's own, around the text's
                owner = getattr(getattr(function, "__wrapped__", None), "__self__", owner)
            if name == "generate_lorem_ipsum":
                budget.vet("lipsum", ["word" * 100, *args, *kwargs.values()])
            elif isinstance(owner, str | bytes | int | float):
                budget.vet(name, [owner, *args, *kwargs.values()])
            else:
                budget.step()
        return super().call(context, function, *args, **kwargs)


def _finalized(value: Any) -> Any:
    """What is written out: of lists and mappings, whose text may be longer than they are, the size is spent first."""
    if isinstance(value, dict | list | tuple) and (budget := _budget.get()) is not None:
        budget.spend(_size(value), "its output")
    return value

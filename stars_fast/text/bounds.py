"""Chat templates within bounds: they come with a model, and are programs that may run for ever or fill the memory.

transformers compiles them and keeps what it compiled. It is handed the source as a text of another class, for which it
keeps a template apart, and in that stands what is compiled here, for a sandbox that counts: nobody else's renderings
change, and none is done twice. Its own compiler never sees the source: it would compute ``'a' * 10**12`` right away.
"""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from itertools import islice
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.runtime import Context, markup_join, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils import chat_template_utils

from stars_fast.locks import Lock

_CHARACTERS = 4 << 20  # that a template may make on top of what it is given
_SECONDS = 0.8  # of its thread's processor time, and one more for every so many characters that it is given:
_CHARACTERS_A_SECOND = 1 << 20
_SECONDS_A_PAIR = 1e-5  # and so much for every pair of turns: some templates walk the chat at each of its turns
_VALUES = 1_000_000  # in a list or mapping that is written as text
_BITS = 4096  # of a number
_SOURCE = 200_000  # characters of a template
# Calls whose result may be much longer than what they are given, and in how many places of a text they put that.
_PLACES: dict[str, Callable[[str], int]] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill", "to_bytes", "batch", "slice"), lambda text: 1),
    **dict.fromkeys(("format", "format_map", "%"), lambda text: 1 + text.count("%") + text.count("{")),
    **dict.fromkeys(("join", "translate", "wordwrap", "tojson", "replace"), len),
    "indent": lambda text: 1 + text.count("\n"),
    "expandtabs": lambda text: text.count("\t"),
}
_WIDTH_GIVEN = re.compile(r"\*|\{[^{}]*\{")  # in a format: a width that is an argument
# Filters that look at a list's items and no deeper. Others write it as text, which may be far longer than it.
_ITEMS = {
    *(
        "length",
        "count",
        "first",
        "last",
        "list",
        "items",
        "dictsort",
        "sort",
        "unique",
        "reverse",
        "groupby",
        "random",
    ),
    *("map", "select", "reject", "selectattr", "rejectattr", "default", "d", "attr", "min", "max", "batch", "slice"),
}


class TooMuch(ValueError):
    """What a template asks for is beyond its bounds."""


class _Budget:
    """What one rendering may still make."""

    def __init__(self, given: int, turns: int) -> None:
        # Templates that add turn to turn make the beginning of the text as often as there are turns.
        self.characters = _CHARACTERS + given * (16 + turns)
        self.left = self.characters
        self.seconds = _SECONDS + given / _CHARACTERS_A_SECOND + turns**2 * _SECONDS_A_PAIR
        self.deadline = time.thread_time() + self.seconds
        self.steps = 0

    def spend(self, size: int, by: str) -> None:
        self.left -= size
        if self.left < 0:
            raise TooMuch(f"the chat template makes more than {self.characters} characters, by {by}")

    def step(self) -> None:
        self.steps += 1
        if self.steps % 16 == 0 and time.thread_time() > self.deadline:
            raise TooMuch(f"the chat template runs for more than {self.seconds:.1f} s")

    def vet(self, name: str, subject: Any, others: Sequence[Any]) -> None:
        """Spend on a call of ``_PLACES`` what it may come to at most."""
        size = 0 if name in _ITEMS else _size(subject)
        places = _PLACES[name](subject) if isinstance(subject, str) else max(size, 1)
        if name == "replace" and isinstance(subject, str):
            places = max((subject.count(one) for one in others if isinstance(one, str)), default=0)
        widths = name != "wordwrap"
        if isinstance(subject, str) and name in ("format", "format_map", "%"):
            size += sum(map(int, re.findall(r"\d{1,12}", subject)))
            widths = _WIDTH_GIVEN.search(subject) is not None
        self.spend(size + places * sum(_size(one, widths=widths) for one in others), f"{name}()")


_budget: ContextVar[_Budget] = ContextVar("stars_fast_template_budget")
_compiling = Lock()


class _Source(str):
    """A template's source that equals no other text, and that transformers' compiler takes for another."""

    def __str__(self) -> str:
        return "{{ raise_exception('the chat template was forgotten while it was rendered') }}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Source) and str.__eq__(self, other)

    def __hash__(self) -> int:
        return hash((_Source, str.__hash__(self)))


@contextmanager
def bounded(source: str, turns: Sequence[Any], variables: Any) -> Iterator[str]:
    """Yields the source as ``chat_template=`` of one rendering of these turns, which raises :class:`TooMuch` where it
    goes too far.
    """
    if len(source) > _SOURCE:
        raise TooMuch(f"the chat template has {len(source)} characters, more than {_SOURCE}")
    source = _compiled(source)
    token = _budget.set(_Budget(_size(turns, None) + _size(variables, None), len(turns)))
    try:
        yield source
    finally:
        _budget.reset(token)


def _compiled(source: str) -> str:
    """The source as transformers knows it, once what it keeps for it is the template that counts."""
    compiled, own = getattr(chat_template_utils, "_compile_jinja_template", None), _Source(source)
    if compiled is None:
        return source  # a later transformers: better without bounds than not at all
    with _compiling.held():
        template = compiled(own)
        if not isinstance(template.environment, BoundedEnvironment):
            vars(template).update(vars(BoundedEnvironment.like(template.environment).from_string(source)))
    return own


def _size(value: Any, most: int | None = _VALUES, widths: bool = False) -> int:
    """Characters of a value, or a measure of them, at most so many values (a list or mapping may hold itself many times
    over). ``widths``: numbers count as that many.
    """
    if isinstance(value, str | bytes):
        return len(value)
    size, values, stack = 0, 0, [value]
    while stack:
        one = stack.pop()
        values += 1
        if most is not None and values > most:
            raise TooMuch(f"the chat template makes a list or mapping of more than {most} values")
        if isinstance(one, dict):
            stack += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple | set):
            stack += one
        size += 2 + (len(one) if isinstance(one, str | bytes) else abs(one) if widths and isinstance(one, int) else 0)
    return size


def _vetted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that is vetted when it is called. The compiler, which has no budget, cannot call it on constants."""
    passed = 1 if hasattr(function, "jinja_pass_arg") else 0  # the context, or such, comes first

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        budget.step()
        args = _at_hand(name, args)
        subject, *others = args[passed:] or ("",)
        if name in _PLACES:
            budget.vet(name, subject, [*others, *kwargs.values()])
        elif name not in _ITEMS and isinstance(subject, dict | list | tuple):
            budget.spend(_size(subject), f"{name}()")
        return function(*args, **kwargs)

    return call


def _at_hand(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of a call that joins what they yield: all of it, so that it can be measured."""
    return tuple(list(one) if hasattr(one, "__next__") else one for one in args) if name in ("join", "sum") else args


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
    """jinja2's sandbox, which counts characters, steps and time."""

    code_generator_class = _Generator
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    @classmethod
    def like(cls, environment: Any) -> BoundedEnvironment:
        """A copy of transformers' own, with its filters, globals and extensions."""
        made: Any = copy.copy(environment)
        made.__class__ = cls
        made.optimized, made.finalize = False, _finalized
        made.filters = {name: _vetted(name, function) for name, function in environment.filters.items()}
        made.globals = {name: value for name, value in environment.globals.items() if name != "lipsum"}
        bounded: BoundedEnvironment = made
        return bounded

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        for loop in source.find_all(nodes.For):
            counted = nodes.EnvironmentAttribute("counted", environment=self, lineno=loop.lineno)
            loop.iter = nodes.Call(counted, [loop.iter], [], None, None, environment=self, lineno=loop.lineno)
        return super()._generate(source, *args, **kwargs)

    @staticmethod
    def counted(iterable: Iterable[Any]) -> Iterator[Any]:
        budget = _budget.get()
        for value in iterable:
            budget.step()
            yield value

    @staticmethod
    def joined(escape: bool, parts: Sequence[Any]) -> str:
        _budget.get().spend(sum(map(_size, parts)), "~")
        return (markup_join if escape else str_join)(parts)

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        budget, kept, rest = _budget.get(), list[str](), iter(pieces)
        while some := list(islice(rest, 1024)):
            budget.spend(sum(map(len, some)), "its output")
            kept += some
        return "".join(kept)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = _budget.get()
        if operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            budget.spend(len(left) + len(right), "+")
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * (abs(right) if operator == "**" else 1) + right.bit_length()
            if bits > _BITS:
                raise TooMuch(f"the chat template makes a number of more than {_BITS} bits, by {operator}")
        elif operator == "*":
            text, times = (right, left) if isinstance(left, int) else (left, right)
            budget.spend(_size(text) * max(times, 0) if isinstance(times, int) else 0, "*")
        elif operator == "%" and isinstance(left, str):
            budget.vet("%", left, [right])
        return self.binop_table[operator](left, right)

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        budget.step()
        name, owner = getattr(function, "__name__", ""), getattr(function, "__self__", None)
        if name in ("format", "format_map"):  # the sandbox's own, around the text's
            owner = getattr(getattr(function, "__wrapped__", None), "__self__", owner)
        if name in _PLACES and isinstance(owner, str | bytes | int):
            args = _at_hand(name, args)
            budget.vet(name, owner, [*args, *kwargs.values()])
        return super().call(context, function, *args, **kwargs)


def _finalized(value: Any) -> Any:
    """What is written out: of lists and mappings, whose text may be longer than they are, the size is spent first."""
    if isinstance(value, dict | list | tuple):
        _budget.get().spend(_size(value), "its output")
    return value

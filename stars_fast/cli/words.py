"""What the library says of its arguments, in the options of the command line."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields

from stars_fast.config import StarsConfig
from stars_fast.methods import METHODS

# Arguments that have options of their own.
_OPTIONS = (
    *("policy", "reward", "tokenizer", "processor", "reward_tokenizer", "reward_tail", "max_rows", "kv_cache_tokens"),
    *("dtype", "device", "chat_template_kwargs", "method", "max_new_tokens", "seed"),
)
_FIELDS = tuple(field.name for field in fields(StarsConfig) if field.name not in _OPTIONS)
_VALUE = r"'[^']*'|\[[^\]]*\]|-?[\w.+]*\w"
# An argument with its value, or with none at the end of what is to be passed; not what is an option's already.
_ARGUMENT = re.compile(
    rf"(?<![-\w./'{{])(?<!--set )(?P<name>{'|'.join((*_OPTIONS, *_FIELDS))})="
    rf"(?:(?P<value>{_VALUE})(?![\w(]|\.\w)|(?=[\s,;:.)]|$))"
)
_other = dict[str, str]()  # options of the command that runs, where they are not called like the argument
_METHODS = {method.__name__: name for name, method in METHODS.items()}


def _method(found: re.Match[str]) -> str:
    name, parameters = _METHODS[found["name"]], found["parameters"].split(", ")
    return " ".join([f"--method {name}", *(f"--set {one}" for one in parameters if one)])


def _option(found: re.Match[str]) -> str:
    name, value = found["name"], found["value"]
    value = "none" if value == "None" else value
    if value and re.fullmatch(r"'[\w./:-]+'", value):  # which a shell need not have in quotes
        value = value[1:-1]
    if name in _OPTIONS or name in _other:
        option = _other.get(name, f"--{name.replace('_', '-')}")
        return option if value is None else f"{option} {value}"
    return f"--set {name}={('DIR' if name == 'fit' else '...') if value is None else value}"


_SAID: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"output\.errors has them all; on_error='raise' raises the first", "each row's error says why"),
    (r"What stars_fast\.fit\(engine, prompts\) returns", "What `stars-fast fit` writes"),
    (r"what stars_fast\.fit returns, the path it was saved to", "what `stars-fast fit` has written"),
    (r"stars_fast\.fit(\(engine, prompts\))?", "`stars-fast fit`"),
    (r" to StarsEngine, stars_fast\.generate or [\w.]+", ""),
    (r"(the chat's messages|a chat that ends with the user's turn) as reward_prompts=", r"\1 as the row's messages"),
    (rf"(?:StarsConfig\()?method=(?P<name>{'|'.join(_METHODS)})\((?P<parameters>[^()]*)\)\)?", _method),
)


@contextmanager
def speaking_of(**options: str) -> Iterator[None]:
    """Within a command that calls these arguments otherwise."""
    _other.update(options)
    try:
        yield
    finally:
        _other.clear()


def in_options(message: str) -> str:
    """A message of the library, with options in place of arguments; what speaks of options already is left alone."""
    for said, instead in _SAID:
        message = re.sub(said, instead, message)
    return _ARGUMENT.sub(_option, message)

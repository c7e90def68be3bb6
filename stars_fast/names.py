"""Names that users write: what a misspelt one was meant to be, and the extras to install."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any, TypeVar

_ClassT = TypeVar("_ClassT", bound=type)


def near(name: Any, known: Iterable[str]) -> str:
    """`` (did you mean ...?)`` where a known name is much like it, in whatever case, else nothing."""
    known = list(known)
    found = [
        one
        for spelt in ((name, name.lower()) if isinstance(name, str) else ())
        for one in get_close_matches(spelt, known, 1)
    ]
    return f" (did you mean {found[0]!r}?)" if found else ""


def with_extra(extra: str) -> str:
    """What to do where a part of the package wants what it does not bring."""
    return f"install the extra {extra!r} of stars-fast (in a checkout: pip install -e '.[{extra}]')"


def refusing_unknown(said: Callable[[type, str], str]) -> Callable[[_ClassT], _ClassT]:
    """A decorator of dataclasses: arguments that they do not have raise TypeError with what ``said`` says of the class
    and the name.
    """

    def decorate(made: _ClassT) -> _ClassT:
        own: Callable[..., None] = made.__init__  # type: ignore[misc]

        @functools.wraps(own)
        def checked(self: Any, *args: Any, **given: Any) -> None:
            fields = {field.name for field in dataclasses.fields(self)}
            for name in given:
                if name not in fields:
                    raise TypeError(said(type(self), name))
            own(self, *args, **given)

        made.__init__ = checked  # type: ignore[misc]
        return made

    return decorate

"""Calls of a tokenizer that fail in words: what it cannot read or write is a ValueError."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from stars_fast.notices import warn
from stars_fast.outputs import Cause

T = TypeVar("T")

# Characters of a text of which a first part is read alone, to see whether it is too long already.
_LONG = 1 << 16


def token_ids(tokenizer: Any, text: str, **options: Any) -> list[int]:
    """Ids of the text.

    Raises
    ------
    ValueError
        If the tokenizer refuses it, or panics.
    """
    return guarded(lambda: list(tokenizer(text, **options)["input_ids"]), text)


def guarded(call: Callable[[], T], text: str = "", what: str = "the tokenizer cannot read it") -> T:
    """What a call of a tokenizer returns; ValueError, which begins with ``what``, for errors and panics."""
    try:
        return call()
    except BaseException as error:
        if isinstance(error, MemoryError) or not (isinstance(error, Exception) or is_panic(error)):
            raise
        said = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{what}: {_half_a_pair(text) or said}") from error


def is_panic(error: BaseException) -> bool:
    """Whether a library written in Rust, tokenizers first of all, has panicked. What it raises then is no Exception."""
    return type(error).__name__ == "PanicException"


def _half_a_pair(text: str) -> str | None:
    """Where the text holds a character of which there is only one half."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"character {error.start}, {text[error.start]!r}, is half of a surrogate pair"
    return None


def refuse_long(name: str, texts: Iterable[str], tokenizer: Any, most: int | None, role: str) -> None:
    """Raise ValueError where the beginnings of long texts alone have more than ``most`` tokens.

    So that what is far too long costs no more than its beginning. Of texts that may fit, nothing is said.
    """
    if most is None:
        return
    for text in texts:
        size = max(_LONG, 8 * most)
        while size < len(text):
            # A margin, since a cut in the middle of a word may cost some tokens.
            if len(token_ids(tokenizer, text[:size], add_special_tokens=False)) > most + 64:
                raise ValueError(
                    f"{name} has {len(text)} characters, the first {size} of which alone have more tokens than the "
                    f"limit of the {role}'s {most} positions"
                )
            size *= 4


def text_of(tokenizer: Any, tokens: Sequence[int], name: str | None = None) -> tuple[str, Cause | None]:
    """Text of the tokens, special ones left out: "" and the cause where the tokenizer cannot decode it.

    An id that it cannot decode by itself costs a replacement character; of what is named, a warning says so.
    """
    try:
        text = legible(tokenizer, tokens)
    except Exception as error:
        return "", Cause.of(error, "its text could not be decoded: the tokenizer raised ")
    if name is not None and "\ufffd" in text and (bad := undecodable(tokenizer, tokens)):
        warn(
            f"{name}: the tokenizer cannot decode id {bad[0]} of the completion: in its text stands a replacement "
            "character"
        )
    return text, None


def decoded(tokenizer: Any, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
    """``tokenizer.decode``, of which a panic is a RuntimeError."""
    try:
        return str(tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens))
    except BaseException as error:
        if is_panic(error):
            raise RuntimeError(f"PanicException: {error}") from error
        raise


def legible(tokenizer: Any, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
    """Text of the tokens; ids that the tokenizer cannot decode are replacement characters."""
    try:
        return decoded(tokenizer, tokens, skip_special_tokens)
    except Exception:
        bad = undecodable(tokenizer, tokens)
        if not bad:
            raise
    parts, run = [], list[int]()
    for token in tokens:
        if token in bad:
            parts += [legible(tokenizer, run, skip_special_tokens) if run else "", "\ufffd"]
            run = []
        else:
            run.append(token)
    return "".join(parts) + (legible(tokenizer, run, skip_special_tokens) if run else "")


def undecodable(tokenizer: Any, tokens: Sequence[int]) -> list[int]:
    """Those of the ids, each once, that the tokenizer cannot decode by themselves."""
    bad = []
    for token in dict.fromkeys(tokens):
        try:
            decoded(tokenizer, [token], skip_special_tokens=False)
        except Exception:
            bad.append(token)
    return bad

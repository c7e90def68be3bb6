"""A tokenizer's chat template: called within bounds, and asked what it makes of contents."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from jinja2 import Environment, TemplateError
from transformers import PreTrainedTokenizerBase

from stars_fast.text.bounds import bounded
from stars_fast.text.turns import all_in_parts, has_pictures, in_one_piece, in_parts

Variables = Mapping[str, Any]

# Survives every chat template we know: no white space to strip, no characters that Jinja or a tokenizer treats.
SENTINEL = "STARSFASTANSWER"
_KEPT = 64  # templates of which it is remembered what they make of contents
_MOST_LITERALS = 256
_SECONDS = 1.0  # for telling its habits
_parts_alone: dict[str, bool] = {}  # of templates, by their source: :func:`_shows_parts_alone`


def stand_in(*spoken: Any) -> str:
    """A word that stands for an answer, and in none of what is said around it."""
    word, said = SENTINEL, repr(spoken)
    while word in said:
        word += "R"
    return word


def rendered(tokenizer: Any, turns: Sequence[Mapping[str, Any]], variables: Variables, **form: Any) -> str:
    """The text that the template makes of these turns. Raises what the template raises."""
    return str(apply(tokenizer, turns, variables, **form, tokenize=False))


def apply(tokenizer: Any, turns: Sequence[Mapping[str, Any]], variables: Variables, **form: Any) -> Any:
    """``tokenizer.apply_chat_template`` of turns whose texts are in the form that the template shows: parts of text are
    joined where it takes none, and texts are parts where it shows nothing else, as templates for pictures.
    """
    if _shows_parts_alone(tokenizer, variables, form.get("template")):
        turns = [all_in_parts(turn) for turn in turns]
    elif any(map(in_parts, turns)) and not any(map(has_pictures, turns)) and not _takes_parts(tokenizer, variables):
        turns = [in_one_piece(dict(turn)) for turn in turns]
    return _within_bounds(tokenizer, list(turns), variables, **form)


def _within_bounds(
    tokenizer: Any, turns: list[Mapping[str, Any]], variables: Variables, template: str | None = None, **form: Any
) -> Any:
    """A rendering of a template of Jinja's, by default the tokenizer's. What one of another kind writes is its own
    business.
    """
    function = getattr(tokenizer.apply_chat_template, "__func__", None)
    if function is not PreTrainedTokenizerBase.apply_chat_template or not (template or tokenizer.chat_template):
        return tokenizer.apply_chat_template(turns, **variables, **form)
    template = template or tokenizer.get_chat_template(tools=variables.get("tools"))
    with bounded(template, turns, variables) as source:
        return tokenizer.apply_chat_template(turns, chat_template=source, **variables, **form)


def _takes_parts(tokenizer: Any, variables: Variables) -> bool:
    """Whether the template shows the text of a content in parts, and that alone."""
    return _shows(tokenizer, variables, None, [{"type": "text", "text": SENTINEL}], "user")


def _shows_parts_alone(tokenizer: Any, variables: Variables, template: str | None) -> bool:
    """Whether the template shows texts that are parts of a content, and none that is all of it."""
    source = str(template or getattr(tokenizer, "chat_template", None))
    if "type" not in source:  # it knows of no parts
        return False
    known = _parts_alone.get(source)  # once: another thread may forget it
    if known is None:
        if len(_parts_alone) >= _KEPT:
            _parts_alone.clear()
        whole, parts = (
            _shows(tokenizer, variables, template, content, "user", "assistant")
            for content in (SENTINEL, [{"type": "text", "text": SENTINEL}])
        )
        known = _parts_alone[source] = parts and not whole
    return known


def _shows(tokenizer: Any, variables: Variables, template: str | None, content: Any, *roles: str) -> bool:
    """Whether the text of this content, which is a word of ours, is shown once a turn, and as text."""
    turns: list[Mapping[str, Any]] = [{"role": role, "content": content} for role in roles]
    try:
        text = str(_within_bounds(tokenizer, turns, variables, template, tokenize=False))
    except Exception:  # a template raises what it likes
        return False
    return text.count(SENTINEL) == len(roles) and f"'{SENTINEL}'" not in text and f'"{SENTINEL}"' not in text


class Habits(NamedTuple):
    """What a template does to an assistant's content besides writing it down."""

    trims: bool  # the white space at its ends
    marks: tuple[str, ...]  # what it must hold to be written otherwise than it is


VERBATIM = Habits(False, ())
ANY = Habits(True, ("",))  # where they cannot be told


def habits(source: Any, rewritten: Callable[[str], bool]) -> Habits:
    """What a template does to contents, told from what it does to some that hold its own literals.

    Parameters
    ----------
    source : str or whatever else a tokenizer has as its ``chat_template``
    rewritten : callable
        Whether the template writes this content otherwise than it is.
    """
    marks, deadline = list[str](), time.thread_time() + _SECONDS
    for literal in _literals(tuple(source.values()) if isinstance(source, Mapping) else (source,)):
        if rewritten(f"b{literal}b") or rewritten(f"{literal}b"):
            marks.append(literal)
        if time.thread_time() > deadline:
            return ANY
    return Habits(any(map(rewritten, (" b", "b ", "\nb", "b\n"))), tuple(marks))


@lru_cache(_KEPT)
def _literals(sources: tuple[Any, ...]) -> tuple[str, ...]:
    """The text constants in the expressions of templates."""
    found: dict[str, None] = {}
    for one in sources:
        try:
            tokens = list(Environment().lexer.tokenize(one)) if isinstance(one, str) else []
        except TemplateError:  # the tokenizer says so when the template is used
            continue
        found |= {str(token.value): None for token in tokens if token.type == "string" and 0 < len(token.value) < 64}
    return tuple(literal for literal in found if not literal.isalnum())[:_MOST_LITERALS]

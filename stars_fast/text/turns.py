"""The turns of a chat: what they must have, and what they say."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

_SPEAKERS = ("user", "assistant", "system", "developer")  # what others return, such as tools, templates know to write
PICTURES = ("image", "image_url")  # types of parts; a part of the first may be bare, its picture being elsewhere
_WORDLESS = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")  # may stand without content


def check_turns(name: str, chat: Sequence[dict[str, Any]], pictures: bool = False) -> None:
    """Raise TypeError or ValueError, naming the turn, where one has no role in words or no content that can be read;
    ``pictures`` are where there is a processor.
    """
    for place, turn in enumerate(chat):
        where = f"{name}, turn {place}"
        if "role" not in turn:
            raise ValueError(
                f"{name} is no chat: a turn has the keys {list(turn)}, but no 'role' (of a data set's rows, give the "
                "column that holds the prompts)"
            )
        role, content = turn["role"], turn.get("content")
        if not isinstance(role, str):
            lists = ": a chat is a list of turns with one 'role' and one 'content' each, not a turn of lists"
            raise TypeError(f"{where}: role is {_form(role)}, not text{lists if isinstance(role, list) else ''}")
        if content is None:
            if all(turn.get(key) is None for key in _WORDLESS):
                raise ValueError(f"{where} ({role}): content is None, and there are no tool_calls")
        elif role not in _SPEAKERS:
            if not isinstance(content, str | list | dict):
                raise TypeError(f"{where} ({role}): content is {_form(content)}, not text, a list or a mapping")
        elif isinstance(content, list):
            _check_parts(f"{where} ({role})", content, pictures)
        elif not isinstance(content, str):
            raise TypeError(f"{where} ({role}): content is {_form(content)}, not text")
        for text in (role, *texts_of(turn)):
            _check_characters(where, text)


def _check_parts(where: str, parts: list[Any], pictures: bool) -> None:
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("type", "text"), str):
            raise TypeError(f"{where}: content is a list of {_form(part)}: give text, or parts {{'type': 'text', ...}}")
        kind = part.get("type", "text")
        if kind in PICTURES and pictures:
            continue
        if kind in PICTURES:
            raise ValueError(
                f"{where}: content has a part of type {kind!r}, and only prompts may have pictures, of an engine with "
                "processor="
            )
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"{where}: content has a part of type {kind!r}; only parts of text and images are read")


def _check_characters(where: str, text: str) -> None:
    if text.isascii():
        return
    try:
        for start in range(0, len(text), 1 << 20):
            text[start : start + (1 << 20)].encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: {error.object[error.start]!r} is half of a surrogate pair, which no tokenizer reads"
        ) from error


def _form(value: Any) -> str:
    return f"{value!r:.40}, a {type(value).__name__}"


def texts_of(turn: dict[str, Any]) -> list[str]:
    """The texts of a turn's content; of what a tool returned in a form of its own, its JSON."""
    content = turn.get("content")
    if in_parts(turn) or has_pictures(turn):
        return [part["text"] for part in turn["content"] if "text" in part]
    if isinstance(content, dict | list):
        return [json.dumps(content, ensure_ascii=False, default=str)]
    return [content] if isinstance(content, str) else []


def in_parts(turn: Mapping[str, Any]) -> bool:
    """Whether a turn's content is a list of parts of text."""
    content = turn.get("content")
    return isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)
        for part in content
    )


def has_pictures(turn: Mapping[str, Any]) -> bool:
    """Whether a turn's content is a list with parts that are pictures; a tool's is its own."""
    content = turn.get("content")
    return (
        isinstance(content, list)
        and turn.get("role") != "tool"
        and any(isinstance(part, dict) and part.get("type") in PICTURES for part in content)
    )


def said(source: Any) -> list[str]:
    """The texts of a prompt, but for answers: of earlier ones templates may leave out what was thought."""
    if isinstance(source, str):
        return [source]
    turns = [turn for turn in source if isinstance(turn, dict) and turn.get("role") != "assistant"]
    return [text for turn in turns for text in texts_of(turn)]


def in_one_piece(turn: dict[str, Any]) -> dict[str, Any]:
    """The turn with its parts of text joined, line by line; without content where that is None."""
    if in_parts(turn):
        return {**turn, "content": "\n".join(texts_of(turn))}
    return {key: value for key, value in turn.items() if value is not None}


def all_in_parts(turn: Mapping[str, Any]) -> Mapping[str, Any]:
    """The turn, its content a part of text where it is text."""
    content = turn.get("content")
    return {**turn, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else turn


def spoken(turn: dict[str, Any]) -> str:
    """What a turn says, for those who write it into a text of their own: its content, and its calls of tools."""
    calls = turn.get("tool_calls") or turn.get("function_call")
    said = "\n".join(texts_of(turn))
    return said if calls is None else f"{said}\n{json.dumps(calls, ensure_ascii=False)}".strip()

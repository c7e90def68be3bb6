"""Prompts under preferences: the same text, with what is preferred in front of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stars_fast.text.prompts import Messages, Prompt, is_chat, read_one, template_kwargs
from stars_fast.text.turns import in_one_piece


def read_personas(
    prompts: Sequence[Prompt],
    preferences: Sequence[Any],
    tokenizer: Any,
    bos_token_id: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[list[list[int]]]:
    """Ids of every prompt under each of the preferences.

    It is put before text; into the system message of a chat, before what that says; and before ids, but behind a BOS.

    Raises
    ------
    TypeError
        For a preference in words before a prompt of ids, or the other way round.
    """
    variables = template_kwargs(chat_template_kwargs)
    return [
        [_under(f"prompts[{i}]", prompt, preference, tokenizer, bos_token_id, variables) for preference in preferences]
        for i, prompt in enumerate(prompts)
    ]


def _under(
    name: str, prompt: Prompt, preference: Any, tokenizer: Any, bos_token_id: int | None, variables: dict[str, Any]
) -> list[int]:
    source = prompt.source
    if isinstance(source, str) and isinstance(preference, str):
        return read_one(name, preference + source, tokenizer, variables).ids
    if is_chat(source) and isinstance(preference, str):
        return read_one(name, _with_system(preference, source), tokenizer, variables).ids
    if isinstance(preference, str) or not isinstance(source, list) or is_chat(source):
        raise TypeError(
            f"{name} and the preference {preference!r:.80} differ in form: a preference in words goes with text and "
            "chats, ids with a prompt of ids"
        )
    start = int(prompt.ids[0] == bos_token_id)
    return [*prompt.ids[:start], *map(int, preference), *prompt.ids[start:]]


def _with_system(preference: str, chat: Any) -> Messages:
    """The chat with the preference in its system message: templates take one, and at the beginning."""
    first, rest = (chat[0], chat[1:]) if chat[0].get("role") == "system" else (None, chat)
    content = preference if first is None else f"{preference}\n\n{in_one_piece(first).get('content', '')}"
    return [{"role": "system", "content": content}, *rest]

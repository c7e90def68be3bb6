"""What stands before and after an answer in a reward model's input: computed once per prompt, never re-rendered."""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from stars_fast.text.prompts import Messages, ends_with_answer
from stars_fast.text.template import ANY, SENTINEL, Habits, Variables, habits, rendered, stand_in
from stars_fast.text.tokens import token_ids
from stars_fast.text.turns import in_one_piece


class ChatFrame(NamedTuple):
    """What a chat template writes around the assistant's answer."""

    before: str  # text in front of the answer
    own_start: bool  # the template writes the beginning-of-sequence token itself
    prefix: list[int]  # ids of what the assistant answers to
    tail: list[int]  # ids behind the answer
    after: str = ""  # text behind the answer
    # Where the template closes a thought in front of an answer that has none, as Qwen3's does:
    asked: str | None = None  # text in front of an answer that brings its thought along
    opening: str = ""  # what such an answer begins with, unless the policy's prompt ends with `opened`
    opened: str = ""
    start: str = ""  # the text of `prefix`


class Written(NamedTuple):
    """An answer as its template writes it."""

    front: str  # text before it
    answer: str  # its own text
    after: str  # text behind it
    as_it_is: bool  # that is the answer's own text, unchanged


def chat_frame(tokenizer: Any, messages: Messages, variables: Variables = MappingProxyType({})) -> ChatFrame:
    """The tokenizer's chat template around an answer to ``messages``, or around the rest of one that they end with.

    There is one beginning-of-sequence token: the template's, else the tokenizer's where it was configured to add one.

    Raises
    ------
    ValueError
        If the template does not reproduce the answer verbatim, once.
    """
    word = stand_in(messages, variables)
    before, *rest = rendered(tokenizer, answered(messages, word), variables).split(word)
    if len(rest) != 1:
        raise ValueError(
            f"the reward tokenizer's chat template contains the assistant's content {len(rest)} times: must be once, "
            "verbatim"
        )
    (after,) = rest
    if ends_with_answer(messages):
        return text_frame(tokenizer, before, after)
    asked = rendered(tokenizer, messages, variables, add_generation_prompt=True)
    if not before.startswith(asked):
        return text_frame(tokenizer, before, after)
    closed = before[len(asked) :]
    if not closed.strip():  # at most the space that an answer's first token brings along
        return text_frame(tokenizer, before, after, asked if closed else None)
    frame = text_frame(tokenizer, before, after)
    opening, opened = re.match(r"\s*(\W+\w+\W)", closed), re.search(r"(\W\w+\W)\s*$", asked)
    return frame._replace(
        asked=asked, opening=opening[1] if opening else closed.split()[0], opened=opened[1] if opened else ""
    )


def answered(messages: Messages, answer: str) -> Messages:
    """The chat with this answer, or with this rest of the answer that it ends with."""
    if not ends_with_answer(messages):
        return [*messages, {"role": "assistant", "content": answer}]
    last = in_one_piece(messages[-1])
    return [*messages[:-1], {**last, "content": last.get("content", "") + answer}]


def habits_of(tokenizer: Any, variables: Variables, content: Any = "a") -> Habits:
    """What the tokenizer's template does to answers to a user's turn of this content. Where that cannot be told, it
    may do anything to any.
    """
    asked: Messages = [{"role": "user", "content": content}]
    try:
        before, after = rendered(tokenizer, answered(asked, SENTINEL), variables).split(SENTINEL)
    except Exception:  # a template raises what it likes; of one with two places for an answer, frames say so
        return ANY

    def rewritten(answer: str) -> bool:
        try:
            return rendered(tokenizer, answered(asked, answer), variables) != before + answer + after
        except Exception:  # such an answer cannot be written at all
            return False

    return habits(tokenizer.chat_template, rewritten)


def write(
    tokenizer: Any,
    frame: ChatFrame,
    messages: Messages,
    answer: str,
    variables: Variables,
    habits: Habits,
    in_thought: bool = False,
) -> Written:
    """``answer`` as the template writes it, or would, where a thought in it is not closed yet.

    Parameters
    ----------
    in_thought : bool
        The prompt ends with the opening of a thought, and the answer is not finished.
    """
    as_it_is = Written(frame.before, answer, frame.after, True)
    opens = frame.asked is not None and (in_thought or answer.lstrip().startswith(frame.opening))
    thought = as_it_is._replace(front=frame.asked or frame.before)
    if not (habits.trims and answer != answer.strip()) and not any(mark in answer for mark in habits.marks):
        return thought if opens else as_it_is
    try:
        whole = rendered(tokenizer, answered(messages, answer), variables)
    except Exception:  # the template refuses such an answer: there is no other way to write it
        return thought if opens else as_it_is
    closed = whole not in (frame.before + one + frame.after for one in (answer, answer.strip()))
    if opens and (not closed or whole == thought.front + answer + frame.after):
        return thought
    if whole == frame.before + answer + frame.after:
        return as_it_is
    if whole.endswith(frame.after) and len(whole) >= len(frame.after):
        return Written("", whole[: len(whole) - len(frame.after)], frame.after, False)
    return Written("", whole, "", False)


def text_frame(tokenizer: Any, before: str, after: str, start: str | None = None) -> ChatFrame:
    """The frame of an answer between these texts; ``start`` is what stands for the first where ids are shared."""
    # A template that writes the token itself is what decides; the tokenizer would add another, or none.
    own = bool(tokenizer.bos_token) and before.startswith(tokenizer.bos_token)
    start = before if start is None else start
    prefix = encode_turn(tokenizer, start, own)
    return ChatFrame(before, own, prefix, _tail(tokenizer, before, after, own), after, start=start)


def _tail(tokenizer: Any, before: str, after: str, own_start: bool) -> list[int]:
    """Ids of ``after`` as they are behind an answer: alone, SentencePiece's would get a space in front."""
    answered = encode_turn(tokenizer, before + SENTINEL, own_start)
    whole = encode_turn(tokenizer, before + SENTINEL + after, own_start)
    return whole[len(answered) :] if whole[: len(answered)] == answered else encode(tokenizer, after)


def encode_turn(tokenizer: Any, text: str, own_start: bool) -> list[int]:
    """Ids of rendered text; ``own_start`` says that a beginning-of-sequence token is in it where one is wanted."""
    return encode(tokenizer, text) if own_start else encode_start(tokenizer, text)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of the text alone."""
    return token_ids(tokenizer, text, add_special_tokens=False) if text else []


def encode_start(tokenizer: Any, text: str) -> list[int]:
    """Ids of the text with the special tokens the tokenizer puts in front, without those it puts behind."""
    if tokenizer.bos_token and text.startswith(tokenizer.bos_token):
        return encode(tokenizer, text)
    body, probe = encode(tokenizer, text), text or "a"
    inner, whole = encode(tokenizer, probe), token_ids(tokenizer, probe)
    for lead in range(len(whole) - len(inner) + 1):
        if whole[lead : lead + len(inner)] == inner:
            return whole[:lead] + body
    return body


def marks(tokenizer: Any) -> set[int]:
    """Special tokens that mark a rendered chat: neither of them merely begins, ends or fills a row."""
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return special.union(tokenizer.all_special_ids) - {tokenizer.unk_token_id}


def rendered_mark(tokenizer: Any, ids: Sequence[int], marked: set[int]) -> str | None:
    """The first special token between the ends of ``ids``, or None: ids of plain text have such only at their ends."""
    edges = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    start, stop = 0, len(ids)
    while start < stop and ids[start] in edges:
        start += 1
    while stop > start and ids[stop - 1] in edges:
        stop -= 1
    found = next((token for token in ids[start:stop] if token in marked), None)
    return None if found is None else str(tokenizer.convert_ids_to_tokens(found))


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of leading tokens that two id lists share."""
    if a == b[: len(a)]:
        return len(a)
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))

"""What stands before and after an answer in a reward model's input: computed once per prompt, never re-rendered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from stars_fast.text.prompts import Messages, ends_with_answer

# Survives every chat template we know: no white space to strip, no characters that Jinja or a tokenizer treats.
SENTINEL = "STARSFASTANSWER"


class ChatFrame(NamedTuple):
    """What a chat template writes around the assistant's answer."""

    before: str  # text in front of the answer
    own_start: bool  # the template writes the beginning-of-sequence token itself
    prefix: list[int]  # ids of what the assistant answers to
    tail: list[int]  # ids behind the answer


def chat_frame(tokenizer: Any, messages: Messages) -> ChatFrame:
    """The tokenizer's chat template around an answer to ``messages``, or around the rest of one that they end with.

    There is one beginning-of-sequence token: the template's, else the tokenizer's where it was configured to add one.

    Raises
    ------
    ValueError
        If the template does not reproduce the answer verbatim.
    """
    begun = ends_with_answer(messages)
    turns = [*messages] if begun else [*messages, {"role": "assistant", "content": ""}]
    turns[-1] = {**turns[-1], "content": turns[-1]["content"] + SENTINEL}
    before, found, after = tokenizer.apply_chat_template(turns, tokenize=False).partition(SENTINEL)
    if not found:
        raise ValueError("the reward tokenizer's chat template does not contain the assistant's content verbatim")
    return text_frame(tokenizer, before, after, before if begun else _generation_prompt(tokenizer, messages, before))


def text_frame(tokenizer: Any, before: str, after: str, start: str | None = None) -> ChatFrame:
    """The frame of an answer between these texts; ``start`` is what stands for the first where ids are shared."""
    # A template that writes the token itself is what decides; the tokenizer would add another, or none.
    own = bool(tokenizer.bos_token) and before.startswith(tokenizer.bos_token)
    prefix = encode_turn(tokenizer, before if start is None else start, own)
    return ChatFrame(before, own, prefix, _tail(tokenizer, before, after, own))


def _generation_prompt(tokenizer: Any, messages: Messages, before: str) -> str:
    """``before`` without the space that an answer's first token brings along, where the template asks without it."""
    if not before[-1:].isspace():
        return before
    asked: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return asked if before.startswith(asked) and before[len(asked) :].isspace() else before


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
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def encode_start(tokenizer: Any, text: str) -> list[int]:
    """Ids of the text with the special tokens the tokenizer puts in front, without those it puts behind."""
    if tokenizer.bos_token and text.startswith(tokenizer.bos_token):
        return encode(tokenizer, text)
    body, probe = encode(tokenizer, text), text or "a"
    inner, whole = encode(tokenizer, probe), list(tokenizer(probe)["input_ids"])
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

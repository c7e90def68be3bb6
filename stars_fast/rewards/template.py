"""What stands before and after an answer in a reward model's input: computed once per prompt, never re-rendered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stars_fast.prompts import Messages

# Survives every chat template we know: no white space to strip, no characters that Jinja or a tokenizer treats.
_SENTINEL = "STARSFASTANSWER"


def chat_prefix_and_tail(tokenizer: Any, messages: Messages) -> tuple[list[int], list[int]]:
    """Token ids before and after the assistant's answer under the tokenizer's chat template.

    There is one beginning-of-sequence token: the template's, else the tokenizer's where it was configured to add one.

    Raises
    ------
    ValueError
        If the template does not reproduce the answer verbatim.
    """
    turns = [*messages, {"role": "assistant", "content": _SENTINEL}]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False)
    before, found, after = rendered.partition(_SENTINEL)
    if not found:
        raise ValueError("the reward tokenizer's chat template does not contain the assistant's content verbatim")
    # A template that writes the token itself is what decides; the tokenizer would add another, or none.
    own = bool(tokenizer.bos_token) and before.startswith(tokenizer.bos_token)
    prefix = encode(tokenizer, before) if own else encode_start(tokenizer, before)
    return prefix, encode(tokenizer, after)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of the text alone."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def encode_start(tokenizer: Any, text: str) -> list[int]:
    """Ids of the text with the special tokens the tokenizer puts in front, without those it puts behind."""
    body, probe = encode(tokenizer, text), text or "a"
    inner, whole = encode(tokenizer, probe), list(tokenizer(probe)["input_ids"])
    for lead in range(len(whole) - len(inner) + 1):
        if whole[lead : lead + len(inner)] == inner:
            return whole[:lead] + body
    return body


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of leading tokens that two id lists share."""
    if a == b[: len(a)]:
        return len(a)
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))

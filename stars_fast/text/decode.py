"""Text of tokens that go on from others. Decoded alone, they may lose a space, or half a character."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stars_fast.outputs import Cause
from stars_fast.text.tokens import text_of

CONTEXT_TOKENS = 8  # decoded in front of others, these read as they do behind the whole text
_UNSETTLED = 8  # characters at the end of a text that transformers' clean-up of spaces may still change


def continuation(
    tokenizer: Any, context: Sequence[int], tokens: Sequence[int], skip_special_tokens: bool
) -> str | None:
    """Text of ``tokens`` as it goes on from that of ``context``; None where the cut goes through a character.

    Of the context only the end is decoded: more of it where that end begins within a character.
    """
    count, before = CONTEXT_TOKENS, "\ufffd"
    while before.startswith("\ufffd") and count < 2 * max(len(context), CONTEXT_TOKENS):
        before = tokenizer.decode(list(context[-count:]), skip_special_tokens=skip_special_tokens)
        count *= 2
    whole = tokenizer.decode([*context[-count // 2 :], *tokens], skip_special_tokens=skip_special_tokens)
    return str(whole[len(before) :]) if whole.startswith(before) else None


@dataclass
class TextStream:
    """The text of a growing list of tokens, piece by piece. The pieces add up to the text of all tokens.

    Attributes
    ----------
    start : int
        The first token that is still decoded.
    told : int
        Characters of the text from there on that are in earlier pieces.
    """

    start: int = 0
    told: int = 0

    def piece(self, tokenizer: Any, tokens: Sequence[int], last: bool) -> tuple[str, Cause | None]:
        """What the text has grown by. What later tokens may still change waits for them, unless these are the last.

        Where it cannot be decoded, that is the cause; a later piece may bring what this one lacks.
        """
        end = len(tokens)
        while not last and end > self.start and _is_byte(tokenizer, tokens[end - 1]):
            end -= 1
        text, cause = text_of(tokenizer, tokens[self.start : end])
        if cause is not None:
            return "", cause
        ready = len(text)
        if not last:
            unsettled = _UNSETTLED if getattr(tokenizer, "clean_up_tokenization_spaces", False) else 0
            ready = max(self.told, len(text.rstrip("\ufffd")) - unsettled)
        piece, self.told = text[self.told : ready], ready
        self._forget(tokenizer, tokens[:end], text)
        return piece, None

    def _forget(self, tokenizer: Any, tokens: Sequence[int], text: str) -> None:
        """Decode only the end from now on, if that reads as it does in ``text`` and the rest has been told."""
        start = len(tokens) - CONTEXT_TOKENS
        if start > self.start:
            end, _ = text_of(tokenizer, tokens[start:])
            forgotten = len(text) - len(end)
            if end and text.endswith(end) and forgotten <= self.told:
                self.start, self.told = start, self.told - forgotten


def _is_byte(tokenizer: Any, token: int) -> bool:
    """Whether a token is one of the bytes that decoders join, and give up all together where one is missing."""
    try:
        return str(tokenizer.convert_ids_to_tokens(token)).startswith("<0x")
    except Exception:  # it knows no such id
        return False

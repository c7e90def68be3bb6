"""The pictures of a prompt as a scorer's model reads them: through a processor of its own, or as the policy does."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from stars_fast.methods.numbers import shown
from stars_fast.rewards.ids import POLICYS
from stars_fast.text.chat import encode, encode_turn
from stars_fast.text.media import Media
from stars_fast.text.pictures import chat_template
from stars_fast.text.tokenizers import check_beside, is_processor
from stars_fast.text.tokens import guarded
from stars_fast.tree.media import picture_ids, places
from stars_fast.tree.support import unwrapped

# What processors say of the text besides its ids, which not every model wants to know.
_OF_THE_TEXT = ("attention_mask", "token_type_ids", "mm_token_type_ids")

PICTURE = {"type": "image"}  # in a chat, where one stands


class Beginning(NamedTuple):
    """What a model reads in front of an answer.

    A picture is written as one mark and read as many ids. In a text that begins as this one, ``written``, the ids up to
    the last picture as the tokenizer gives them, stand for ``read``, those that the processor made of them.
    """

    ids: list[int]
    media: Media | None = None  # None: the ids are all there is
    written: Sequence[int] = ()
    read: Sequence[int] = ()

    def of(self, ids: list[int]) -> list[int]:
        """``ids`` of a text that begins so, as they are read.

        Raises
        ------
        ValueError
            Where the text is another one up to the last picture.
        """
        if not self.read:
            return ids
        if ids[: len(self.written)] != self.written:
            raise ValueError("the chat template writes the prompt's pictures elsewhere once there is this answer")
        return [*self.read, *ids[len(self.written) :]]


def tokenizer_of(processor: Any, given: Any, argument: str) -> Any:
    """``given``; where it is None, the processor's tokenizer, with the processor's chat template.

    Raises
    ------
    TypeError, ValueError
        For what is no processor, one beside "policy": it would not be asked, and one beside another vocabulary.
    """
    if processor is None:
        return given
    if isinstance(processor, type) or not is_processor(processor):
        raise TypeError(f"processor={shown(processor)} is a {type(processor).__name__}: give a transformers processor")
    if given is not None:
        if given == POLICYS:
            raise ValueError(f"{argument}={POLICYS!r} reads the policy's ids and pictures: leave processor= out")
        check_beside(argument, given, processor)
        return given
    tokenizer, template = processor.tokenizer, chat_template(processor)
    if template and template != tokenizer.chat_template:
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = template
    return tokenizer


def with_pictures(processor: Any, tokenizer: Any, text: str, own_start: bool, images: Sequence[Any]) -> Beginning:
    """What the processor makes of a rendered text and the pictures whose marks stand in it, in their order.

    ``own_start`` says that a beginning-of-sequence token is in the text where one is wanted.

    Raises
    ------
    ValueError
        For what the processor refuses, as more marks than pictures.
    """
    written, body = encode_turn(tokenizer, text, own_start), encode(tokenizer, text)
    start = tokenizer.decode(written[: len(written) - len(body)], skip_special_tokens=False)
    options = {"images": [list(images)], "return_tensors": "pt", "add_special_tokens": False}
    made = guarded(
        lambda: dict(processor(text=[start + text], **options)), what="the scorer's processor cannot read its pictures"
    )
    (place,) = places(made, [0])
    ids: list[int] = made["input_ids"][0, place].tolist()
    end = _common_end(written, ids, picture_ids(processor))
    return Beginning(ids, Media(made, 0, images), written[: len(written) - end], ids[: len(ids) - end])


def _common_end(a: Sequence[int], b: Sequence[int], marks: Collection[int]) -> int:
    """Number of last ids that two lists share, none of them a picture's."""
    end = 0
    while end < min(len(a), len(b)) and a[-1 - end] == b[-1 - end] and a[-1 - end] not in marks:
        end += 1
    return end


def readable(seen: Beginning, body: PreTrainedModel) -> Beginning:
    """``seen``, without what a model may do without and does not read.

    Raises
    ------
    ValueError
        For what else its forward pass does not name, and where a picture stands last: the last id may be read again,
        and alone.
    """
    media = seen.media
    assert media is not None
    if seen.ids[-1] in picture_ids(body.config):
        raise ValueError("a picture is the last of it, and an answer goes on from text: put text behind the picture")
    names = inspect.signature(unwrapped(body).forward).parameters
    unread = [key for key in media.inputs if key not in names]
    if needed := [key for key in unread if key not in _OF_THE_TEXT]:
        raise ValueError(
            f"{', '.join(needed)} of its pictures are nothing that a {type(body).__name__} reads: give the scorer its "
            "model's processor="
        )
    if not unread:
        return seen
    inputs = {key: value for key, value in media.inputs.items() if key in names}
    return seen._replace(media=replace(media, inputs=inputs))

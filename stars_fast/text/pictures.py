"""Chats with pictures: these are opened, and a processor reads both."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import Any
from urllib.parse import unquote

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from stars_fast.methods.numbers import shown
from stars_fast.names import with_extra
from stars_fast.text.template import Variables, rendered
from stars_fast.text.turns import PICTURES

_PLACES = ("image", "url", "path", "base64", "image_url")  # of a part, where its picture may be


def processed(
    processor: Any, chat: Sequence[Mapping[str, Any]], images: Sequence[Any], variables: Variables, **form: Any
) -> Mapping[str, Any]:
    """What ``processor.apply_chat_template`` makes of a chat whose pictures were taken out (:func:`opened`).

    Its template is rendered within bounds. A processor that renders chats in a way of its own does so, but is asked for
    text alone: told to read it, too, it would take variables that no template knows for its own, ``images`` to be
    fetched among them.
    """
    tokenizer, template = processor.tokenizer, chat_template(processor)
    own = getattr(processor.apply_chat_template, "__func__", None) is not ProcessorMixin.apply_chat_template
    if own or not isinstance(tokenizer, PreTrainedTokenizerBase) or template is None:
        text = processor.apply_chat_template(refilled(chat, images), tokenize=False, **form, **variables)
    else:
        text = rendered(tokenizer, chat, variables, template=template, **form)
    begun = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    encoding: Mapping[str, Any] = processor(
        text=text, images=[list(images)], return_tensors="pt", **({"add_special_tokens": False} if begun else {})
    )
    return encoding


def refilled(chat: Sequence[Mapping[str, Any]], images: Sequence[Any]) -> list[dict[str, Any]]:
    """The chat with pictures in the parts that :func:`opened` has left bare."""
    turns, ahead = list[dict[str, Any]](), iter(images)
    for turn in chat:
        parts = turn.get("content")
        if isinstance(parts, list):
            parts = [{**part, "image": next(ahead)} if part.get("type") == "image" else {**part} for part in parts]
        turns.append({**turn, "content": parts})
    return turns


def chat_template(processor: Any) -> str | None:
    """A processor's own, else its tokenizer's; None where neither is one text."""
    for owner in (processor, getattr(processor, "tokenizer", None)):
        template = getattr(owner, "chat_template", None)
        template = template.get("default") if isinstance(template, Mapping) else template
        if isinstance(template, str) and template:
            return template
    return None


def opened(name: str, chat: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[Any]]:
    """The chat with bare parts ``{"type": "image"}`` where pictures were, and these, in their order.

    Files and data URLs are opened as transformers opens them, in RGB and upright. Pictures that are objects of PIL's,
    arrays or tensors stay as they are. Nothing is fetched.

    Raises
    ------
    ValueError
        For a picture that is not there, not readable, too large (Pillow's limit against bombs) or elsewhere, by its
        turn.
    """
    turns, images = list[dict[str, Any]](), list[Any]()
    for place, turn in enumerate(chat):
        parts = turn.get("content")
        if isinstance(parts, list) and turn.get("role") != "tool":
            bare = []
            for part in parts:
                if part.get("type") in PICTURES:
                    images.append(_picture(f"{name}, turn {place} ({turn['role']})", part))
                    part = {"type": "image"}
                bare.append(part)
            turn = {**turn, "content": bare}
        turns.append(dict(turn))
    return turns, images


def place_of(part: Mapping[str, Any]) -> str | None:
    """The key under which a part has its picture; None of a bare one."""
    return next((key for key in _PLACES if part.get(key) is not None), None)


def is_url(source: str) -> bool:
    """Whether it is no path: a data URL, or one of another scheme."""
    return source[:5].lower() == "data:" or "://" in source[:16]


def decoded(source: str) -> bytes:
    """What base64, or a data URL in it, stands for. Raises ValueError, which quotes nothing, for anything else."""
    kind, _, data = source.rpartition(",")
    if source[:5].lower() == "data:" and not kind.endswith(";base64"):
        raise ValueError("it must be data:image/...;base64, and its data")
    return base64.b64decode("".join(data.split()), validate=True)


def _picture(where: str, part: Mapping[str, Any]) -> Any:
    place = place_of(part)
    source = None if place is None else part[place]
    if isinstance(source, Mapping):  # OpenAI's {"url": ...}
        source = source.get("url")
    if source is None:
        raise ValueError(
            f"{where}: a part of type {part['type']!r} has no picture: give one as 'image', 'url' or 'path'"
        )
    if isinstance(source, np.ndarray | torch.Tensor):
        if source.ndim not in (2, 3):
            raise ValueError(f"{where}: a picture of shape {tuple(source.shape)}: give height and width, with channels")
        return source
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ValueError(f"{where}: pictures need Pillow: {with_extra('pictures')} ({error})") from error
    if isinstance(source, Image.Image):
        _check_size(where, source, Image.MAX_IMAGE_PIXELS)
        return source
    if not isinstance(source, str | os.PathLike):
        raise ValueError(f"{where}: a picture is a {type(source).__name__}: give PIL's, an array, a path or a data URL")
    what, file = _file(where, os.fspath(source), place == "base64")
    with _said(where, what):
        image = Image.open(file)
    with image:
        _check_size(where, image, Image.MAX_IMAGE_PIXELS)
        with _said(where, what):
            return ImageOps.exif_transpose(image).convert("RGB")


@contextmanager
def _said(where: str, what: str) -> Iterator[None]:
    """Pillow's decoders raise what they like."""
    try:
        yield
    except MemoryError:
        raise
    except FileNotFoundError as error:
        raise ValueError(f"{where}: there is no picture {what}") from error
    except Exception as error:
        cause = " ".join(str(error).split())
        raise ValueError(f"{where}: the picture {what} cannot be read: {type(error).__name__}: {cause}") from error


def _check_size(where: str, image: Any, most: int | None) -> None:
    pixels = image.width * image.height
    if most is not None and pixels > most:
        raise ValueError(
            f"{where}: a picture of {image.width} x {image.height} pixels, more than {most} "
            "(PIL.Image.MAX_IMAGE_PIXELS): give a smaller one"
        )


def _file(where: str, source: str, encoded: bool) -> tuple[str, str | BytesIO]:
    """What error messages call a picture, and what Pillow opens."""
    if source[:7].lower() == "file://":
        return shown(source), unquote(source[7:])
    if encoded or source[:5].lower() == "data:":
        try:
            return "of a data URL", BytesIO(decoded(source))
        except ValueError as error:
            raise ValueError(f"{where}: the picture {shown(source)} is no base64: {error}") from error
    if is_url(source):
        raise ValueError(f"{where}: {shown(source)} is not fetched: give the picture, a path or a data URL")
    return shown(source), source

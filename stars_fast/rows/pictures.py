"""Pictures of a row: where they lie, and the chat that shows them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from stars_fast.text.pictures import is_url, place_of
from stars_fast.text.turns import PICTURES, has_pictures

Image = str | list[str]  # as a row has it: a path or a data URL, or several
COLUMNS = ("image", "images")  # either is read: data sets for TRL have the one or the other


def image_of(fields: Mapping[str, Any]) -> Image | None:
    """The pictures of a row; an empty list is none. Raises ValueError for what is no picture, and for two columns."""
    given = [name for name in COLUMNS if fields.get(name) is not None and fields[name] != []]
    if not given:
        return None
    if len(given) > 1:
        raise ValueError(f"has {' and '.join(given)}: give one of them")
    image: Any = fields[given[0]]
    if all(isinstance(source, str) and source for source in (image if isinstance(image, list) else [image])):
        return image
    raise ValueError(f"{given[0]}: give a path or a data URL, or a list of them")


def shows_pictures(prompt: Any) -> bool:
    """Whether it is a chat with pictures."""
    return isinstance(prompt, list) and any(isinstance(turn, dict) and has_pictures(turn) for turn in prompt)


def with_pictures(prompt: Any, image: Image | None, folder: str) -> Any:
    """A row's prompt with its pictures, those of relative paths in that folder.

    Text becomes a user's turn, behind its pictures. In messages, parts ``{"type": "image"}`` that name none take them
    in order; where there are no such parts, they stand before what the first user says.

    Raises
    ------
    ValueError
        For ids, and messages that have another number of places for pictures.
    """
    sources = [] if image is None else [image] if isinstance(image, str) else image
    pictures = [{"type": "image", "url" if is_url(source) else "path": source} for source in sources]
    if pictures and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    places = sum(map(_is_place, _parts(prompt)))
    if pictures and not places:
        prompt, places = _before_the_first_user(prompt, len(pictures)), len(pictures)
    if places != len(pictures):
        raise ValueError(f"messages have places for {places} pictures, and image has {len(pictures)}")
    if not shows_pictures(prompt):
        return prompt
    rest, chat = iter(pictures), list[Any]()
    for turn in prompt:
        if isinstance(content := turn.get("content"), list):
            parts = [next(rest) if _is_place(part) else part for part in content]
            turn = {**turn, "content": [_placed(part, folder) for part in parts]}
        chat.append(turn)
    return chat


def _before_the_first_user(prompt: Any, pictures: int) -> list[dict[str, Any]]:
    """The chat with places for them."""
    turns = [turn for turn in prompt if isinstance(turn, dict) and turn.get("role") == "user"]
    if not turns:
        raise ValueError("image goes with a prompt, or with messages of a user")
    said = turns[0].get("content")
    parts = said if isinstance(said, list) else [{"type": "text", "text": said}]
    shown = {**turns[0], "content": [*({"type": "image"} for _ in range(pictures)), *parts]}
    return [shown if turn is turns[0] else turn for turn in prompt]


def _parts(prompt: Any) -> Iterator[dict[str, Any]]:
    for turn in prompt if isinstance(prompt, list) else ():
        content = turn.get("content") if isinstance(turn, dict) else None
        if isinstance(content, list):
            yield from (part for part in content if isinstance(part, dict))


def _is_place(part: Any) -> bool:
    """Whether a part is a picture that is named elsewhere."""
    return isinstance(part, dict) and part.get("type") in PICTURES and place_of(part) is None


def _placed(part: Any, folder: str) -> Any:
    """A part; of one that names a file, with the file's path from here."""
    place = place_of(part) if isinstance(part, dict) and part.get("type") in PICTURES else None
    if place in (None, "base64"):
        return part
    source = part[place]
    named = source.get("url") if isinstance(source, dict) else source  # OpenAI's {"url": ...}
    if not isinstance(named, str) or is_url(named):
        return part
    path = os.path.join(folder, named)
    return {**part, place: {**source, "url": path} if isinstance(source, dict) else path}

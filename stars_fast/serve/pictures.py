"""Pictures of a chat: out of data URLs, or of one folder of the server's, and opened before the engine is asked."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from stars_fast.serve.errors import Refusal
from stars_fast.text.pictures import decoded

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_PICTURES = 16  # of a request: a processor may cut each into a dozen tiles
MOST_PIXELS = 1 << 25  # of a request's pictures together: 96 MiB once they are opened
MOST_HELD = 16 * MOST_PIXELS  # of open requests together: beyond it, no further ones are opened
MOST_BYTES = 20 << 20  # of a file, and of the pictures in a body
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")  # decoders of rarer ones have had more faults than uses here


def open_pictures(chat: list[dict[str, Any]], folder: Path | None) -> tuple[list[dict[str, Any]], int]:
    """The chat as the engine reads it, its parts of type ``image_url`` replaced by opened pictures; and their pixels.

    Parameters
    ----------
    chat : list of dict
        Messages of a request.
    folder : Path, optional
        Where files may lie that a request names.

    Raises
    ------
    Refusal
        For what is no picture, lies elsewhere or is too large, naming its place in the request and no path.
    """
    left, count, messages = MOST_PIXELS, 0, list[dict[str, Any]]()
    for place, message in enumerate(chat):
        parts = message["content"]
        if not isinstance(parts, str):
            parts = list(parts)
            for number, part in enumerate(parts):
                if part["type"] != "image_url":
                    continue
                name = f"messages[{place}].content[{number}].image_url.url"
                if (count := count + 1) > MOST_PICTURES:
                    raise Refusal(f"{name}: a request has at most {MOST_PICTURES} pictures", param=name)
                picture = _opened(name, _contents(name, part["image_url"]["url"], folder), left)
                left -= picture.width * picture.height
                parts[number] = {"type": "image", "image": picture}
        messages.append({**message, "content": parts})
    return messages, MOST_PIXELS - left


def _contents(name: str, url: str, folder: Path | None) -> bytes:
    """The file that a URL is of."""
    if url[:5].lower() == "data:":
        try:
            return decoded(url)
        except ValueError:
            raise Refusal(f"{name} is no data URL in base64, such as data:image/png;base64,...", param=name) from None
    if "://" in url and not url.startswith("file://"):
        raise Refusal(f"{name}: pictures are not fetched; give a data URL, data:image/png;base64,...", param=name)
    if folder is None:
        raise Refusal(f"{name} is no data URL, and no files are read here: give data:image/png;base64,...", param=name)
    return _file(name, url, folder)


def _file(name: str, url: str, folder: Path) -> bytes:
    """What lies outside the folder is answered as what is not there."""
    try:
        path = url
        if url.startswith("file://"):
            parts = urlsplit(url)
            path = unquote(parts.path) if parts.netloc in ("", "localhost") else ""
        file, within = (folder / path).resolve(), folder.resolve()
        if file.is_relative_to(within) and file.is_file():
            with file.open("rb") as opened:
                contents = opened.read(MOST_BYTES + 1)  # whatever its size was a moment ago
            if len(contents) > MOST_BYTES:
                raise Refusal(f"{name}: the file has more than {MOST_BYTES} bytes", param=name)
            return contents
    except (OSError, ValueError, RuntimeError):  # no right to look, a null in the path, links in a circle
        pass
    raise Refusal(f"{name}: there is no such picture in the server's folder", param=name)


def _opened(name: str, contents: bytes, most: int) -> Image:
    """A picture of at most so many pixels, upright, in RGB."""
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(contents), formats=_FORMATS) as picture:
            if picture.width * picture.height > most:
                raise Image.DecompressionBombError
            return ImageOps.exif_transpose(picture).convert("RGB")
    except Image.DecompressionBombError:
        raise Refusal(f"{name}: the pictures of a request have at most {MOST_PIXELS} pixels", param=name) from None
    except Exception:  # decoders raise many things for what is broken, and quote what they like
        raise Refusal(f"{name} is no picture that can be read: give {', '.join(_FORMATS)}", param=name) from None

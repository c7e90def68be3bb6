"""Rows in: JSON Lines with an id, which is all that a resumed run goes by."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import IO, Any

from stars_fast.rows.pictures import Image, image_of, shows_pictures, with_pictures

Id = str | int
_FORMS = ("prompt", "messages", "prompt_ids")
_LINE = "line "  # in front of its number: the id of a line that has none to be read
_LONGEST_LINE = 1 << 25  # bytes: a million tokens as JSON, several times over
_DEPTH = 64  # of messages; Python's own limit depends on how deep the caller is already


@dataclass(frozen=True)
class Row:
    """One row of the input."""

    id: Id
    prompt: Any  # text, chat messages or token ids; None where the row is bad
    seed: int
    error: str | None = None
    image: Image | None = None  # shown with the prompt
    file: str = ""  # where it was read; paths of pictures start in its folder
    line: int = 0

    @property
    def asked(self) -> Any:
        """The prompt with its pictures."""
        return with_pictures(self.prompt, self.image, os.path.dirname(self.file))

    @property
    def shows_pictures(self) -> bool:
        """Whether only a processor can read it."""
        return self.image is not None or shows_pictures(self.prompt)

    @property
    def place(self) -> str:
        """Where it stands, for messages."""
        return f"{self.file}, {_LINE}{self.line}" if self.file else f"{_LINE}{self.line}"


def lines_of(file: IO[bytes]) -> Iterator[bytes]:
    """The lines of a file. Of one that is too long, only so much that it is seen."""
    while line := file.readline(_LONGEST_LINE + 2):
        yield line
        while not line.endswith(b"\n") and (line := file.readline(_LONGEST_LINE)):
            pass


def read_rows(lines: Iterable[bytes | str], seed: int, file: str = "") -> list[Row]:
    """Rows of a JSON Lines file. What cannot be used becomes a row with an error.

    ``file`` is its path, if it has one: pictures lie relative to its folder.

    Raises
    ------
    ValueError
        For an id that comes twice, naming both lines: a resumed run could not tell the rows apart.
    """
    return list(each_row(lines, seed, {}, file=file))


def each_row(
    lines: Iterable[bytes | str], seed: int, seen: dict[Id, str], name: str = "", file: str = ""
) -> Iterator[Row]:
    """:func:`read_rows` one by one. Files read together have names, and share ``seen``: ids, and where they are.

    A row without an id is called by its line number, in a named file ``NAME:NUMBER``.
    """
    of_file = f" of {name}" if name else ""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{number}{of_file}"
        row = _read_row(place, f"{name}:{number}" if name else number, line, seed)
        row = replace(row, file=file, line=number)
        if row.id in seen:
            raise ValueError(f"lines {seen[row.id]} and {place} have the same id {row.id!r}: ids must differ")
        seen[row.id] = place
        yield row


def row_seed(seed: int, row_id: Id) -> int:
    """Seed of a row: depends on its id and nothing else, so neither order nor interruption changes a text."""
    digest = hashlib.blake2b(json.dumps([seed, row_id]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def stands_for_a_line(row_id: Id) -> bool:
    """Whether it is the id of a row that could not be read as far as its own."""
    return isinstance(row_id, str) and row_id.removeprefix(_LINE).isdigit() and row_id.startswith(_LINE)


def _read_row(place: str, own_id: Id, line: bytes | str, seed: int) -> Row:
    row_id: Id = f"{_LINE}{place}"  # a number may be another row's own id
    try:
        fields = _parse(line)
        row_id = _checked(fields, "id", own_id, str, int)
        own_seed = _checked(fields, "seed", row_seed(seed, row_id), int)
        prompt, image = _prompt(fields), image_of(fields)
        with_pictures(prompt, image, "")  # where that cannot be, it is told now
        return Row(row_id, prompt, own_seed, image=image)
    except ValueError as error:
        return Row(row_id, None, row_seed(seed, row_id), f"{_LINE}{place}: {error}")


def _parse(line: bytes | str) -> dict[str, Any]:
    if len(line.rstrip()) > _LONGEST_LINE:
        raise ValueError(f"longer than {_LONGEST_LINE:,} bytes")
    try:
        fields = json.loads(line)
        json.dumps(fields, ensure_ascii=False).encode()  # half a surrogate pair is JSON, but no text
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"a JSON {type(fields).__name__}, not an object with one of {', '.join(_FORMS)}")
    return fields


def _checked(fields: dict[str, Any], name: str, default: Any, *kinds: type) -> Any:
    value = fields.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, kinds):
        wanted = " or ".join({str: "text", int: "an integer"}[kind] for kind in kinds)
        raise ValueError(f"{name}={value!r}: must be {wanted}")
    return value


def _prompt(fields: dict[str, Any]) -> Any:
    given = [name for name in _FORMS if fields.get(name) is not None]
    if len(given) != 1:
        raise ValueError(f"has {' and '.join(given) or 'none'} of {', '.join(_FORMS)}: give exactly one")
    name, value = given[0], fields[given[0]]
    if name == "prompt" and not isinstance(value, str):
        raise ValueError(f"prompt is a {type(value).__name__}: give text, or use messages or prompt_ids")
    if name == "messages" and not _is_list(value, dict):
        raise ValueError('messages: give a list of {"role": ..., "content": ...}')
    if name == "prompt_ids" and not _is_list(value, int):
        raise ValueError("prompt_ids: give a list of integers")
    if _is_deeper(value, _DEPTH):
        raise ValueError(f"{name}: nested more than {_DEPTH} deep")
    try:
        json.dumps(value, allow_nan=False)  # it is written out again with the answer
    except ValueError as error:
        raise ValueError(f"{name}: holds NaN or a number beyond all bounds, which JSON has none for") from error
    return value


def _is_deeper(value: Any, most: int) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return bool(parts) and (most == 0 or any(_is_deeper(part, most - 1) for part in parts))


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and bool(value) and all(type(entry) is kind for entry in value)

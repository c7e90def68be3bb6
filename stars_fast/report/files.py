"""What the commands read and write: YAML of known names, records as lines of JSON, files that change in one step."""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import yaml

from stars_fast.names import near

if TYPE_CHECKING:
    from stars_fast.outputs import SegmentTrace


# POSIX has it; where it is missing, two runs at once are the user's to avoid.
_fcntl = import_module("fcntl") if find_spec("fcntl") else None
_YAML_BYTES = 1 << 18
_YAML_VALUES = 10_000
_YAML_DEPTH = 50


class _SettingsLoader(yaml.SafeLoader):
    """Safe YAML that is small when its aliases are written out: a few lines of them can stand for any size."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth, self._values = 0, 0
        self._sizes = dict[int, int]()  # of whole nodes, by identity

    def compose_node(self, parent: Any, index: Any) -> Any:
        alias, before = self.check_event(yaml.AliasEvent), self._values
        self._depth += 1
        if self._depth > _YAML_DEPTH:
            raise ValueError(f"is nested more than {_YAML_DEPTH} deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if alias and id(node) not in self._sizes:
            raise ValueError("has an alias to what it is part of")
        self._values += self._sizes[id(node)] if alias else 1
        if self._values > _YAML_VALUES:
            raise ValueError(f"has more than {_YAML_VALUES} values, aliases written out")
        self._sizes.setdefault(id(node), self._values - before)
        return node


def parse_yaml(text: str) -> Any:
    """The value that YAML stands for, without tags of Python's.

    Raises
    ------
    ValueError
        For what is too deep or too large for settings, or part of itself.
    yaml.YAMLError
        For text that is not YAML.
    """
    loader = _SettingsLoader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def read_bounded(path: Path, most: int) -> str:
    """The text of a file. Raises OSError where it cannot be read, ValueError where it is no text or too large."""
    with path.open("rb") as file:
        contents = file.read(most + 1)
    if len(contents) > most:
        raise ValueError(f"{path} is larger than {most:,} bytes")
    try:
        return contents.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error


def read_yaml(path: Path, known: Sequence[str] | None) -> dict[str, Any]:
    """The values in a YAML file, by name; an empty one has none. Where ``known`` is None, the caller checks the names.

    Raises
    ------
    OSError, ValueError
        For a file that cannot be read, is too large or is no such mapping, and for names that are not known.
    """
    text = read_bounded(path, _YAML_BYTES)
    try:
        values = parse_yaml(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}: write one `name: value` a line")
    if known is not None:
        check_known(map(str, values), str(path), known)
    return values


def check_known(names: Iterable[str], where: str, known: Sequence[str]) -> None:
    """Raise ValueError for names that are not known, with those that are."""
    unknown = sorted(set(names) - set(known))
    if unknown:
        named = ", ".join(f"{name!r}{near(name, known)}" for name in unknown)
        raise ValueError(f"{where}: unknown {named}; known are {', '.join(known)}")


def to_line(record: dict[str, Any]) -> str:
    """A record as a line of JSON. Half a surrogate pair, as an error may quote it, is written as JSON's own escape."""
    line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
    return line.encode("utf-8", "backslashreplace").decode("utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which takes the place of ``path`` in one step: a kill or an error leaves the old one."""
    # "x" makes a new file: it never writes through a link that somebody planted under that name.
    swap = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with swap.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if path.is_file() and not path.is_symlink():
            shutil.copymode(path, swap)
        swap.replace(path)
    except BaseException:
        swap.unlink(missing_ok=True)
        raise


def replace_file(path: Path, text: str) -> None:
    """Write a file in one step: a kill leaves the old one or the new one."""
    with replacing(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))  # of half a surrogate pair: JSON's own escape


@contextmanager
def sole_run(output: Path) -> Iterator[None]:
    """Keep a second run from writing to a file or folder at the same time; ends with the process, however that ends.

    Raises
    ------
    ValueError
        Where another run has it.
    OSError
        Where no file can be made beside a file, or in a folder.
    """
    if _fcntl is None:
        yield
        return
    lock = output / ".lock" if output.is_dir() else output.with_name(f".{output.name}.lock")
    while True:
        holder = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            _fcntl.flock(holder, _fcntl.LOCK_EX | _fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(holder)
            raise ValueError(f"another run is writing to {output}: wait for it, or name another output") from error
        except OSError:  # a file system without locks
            break
        if _is_at(holder, lock):
            break
        os.close(holder)  # whose it was has just ended, and taken it away
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)  # while it is held: who has opened it meanwhile sees that it is gone
        os.close(holder)


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.lstat())
    except FileNotFoundError:
        return False


def rounded(value: float) -> float | None:
    """Six digits, and None for what JSON has no number for."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def summary(segment: SegmentTrace) -> dict[str, Any]:
    """What a record says of a committed segment."""
    return {
        "tokens": len(segment.tokens),
        "reward": rounded(segment.reward),
        "threshold": rounded(segment.threshold),
        "attempts": segment.attempts,
        "accepted": segment.accepted,
    }

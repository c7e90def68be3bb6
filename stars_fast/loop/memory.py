"""Forward passes that do not fit, with the size of what did not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from stars_fast.tree.lack import is_lack_of_memory


class TooLarge(Exception):
    """A forward pass ran out of memory or slots."""

    def __init__(self, tokens: int, rows: int, cause: str) -> None:
        super().__init__(cause)
        self.tokens, self.rows, self.cause = tokens, rows, cause


class InUse(RuntimeError):
    """Memory was to be given back that somebody generates with."""


@contextmanager
def passing(tokens: int = 0, rows: int = 0) -> Iterator[None]:
    """A forward pass over so many tokens, or rows; where memory lacks, :class:`TooLarge` says how many they were."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_lack_of_memory(error):
            raise
        raise TooLarge(tokens, rows, f"{type(error).__name__}: {error}") from error

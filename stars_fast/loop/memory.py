"""Forward passes that do not fit: told from other failures, with the size of what did not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from stars_fast.tree.segment_tree import SlotsExhausted

# What torch's allocators for a CPU say: they raise a plain RuntimeError.
_CPU_REFUSALS = ("can't allocate memory", "not enough memory")


class TooLarge(Exception):
    """A forward pass ran out of memory or slots."""

    def __init__(self, tokens: int, rows: int, cause: str) -> None:
        super().__init__(cause)
        self.tokens, self.rows, self.cause = tokens, rows, cause


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether a smaller pass may succeed where this one failed."""
    if isinstance(error, (torch.OutOfMemoryError, SlotsExhausted, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _CPU_REFUSALS)


@contextmanager
def passing(tokens: int = 0, rows: int = 0) -> Iterator[None]:
    """A forward pass over so many tokens, or rows; where memory lacks, :class:`TooLarge` says how many they were."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_lack_of_memory(error):
            raise
        raise TooLarge(tokens, rows, f"{type(error).__name__}: {error}") from error

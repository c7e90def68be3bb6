"""Locks that are open in a forked child: whoever holds one in the parent is not there to open it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakSet

_all: WeakSet[Lock] = WeakSet()


class Lock:
    """``with lock.held():`` is for one thread at a time, which may enter it again."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        _all.add(self)

    @contextmanager
    def held(self) -> Iterator[None]:
        with self._lock:  # by the same one to its end, in a child that was forked in between, too
            yield

    def renew(self) -> None:
        self._lock = threading.RLock()


def _renew() -> None:
    for lock in list(_all):
        lock.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)

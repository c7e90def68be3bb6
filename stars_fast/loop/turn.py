"""Whose turn it is among threads that share something: one at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextvars import ContextVar

from stars_fast.notices import warn

# Seconds of one turn after which who waits for it is told why that may be for ever.
_LONG = 60.0
# Turns that are waiting for what runs here: asyncio takes it along to the tasks and threads that it starts.
_within: ContextVar[tuple[object, ...]] = ContextVar("stars_fast_turns", default=())


class Turn:
    """A lock whose waiters can be told of news instead, and in which short turns come before long ones.

    Whoever acquires releases in a ``finally`` that begins before: an interrupt may fall between any two steps, and a
    release by another thread than the one whose turn it is does nothing.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # entered by itself: an interrupt may fall within a condition's own entry
        self._changed = threading.Condition(self._lock)
        self._holder: int | None = None  # the thread whose turn it is
        self._holding: object = None  # which of its turns
        self._since = 0.0  # when that began, of time.monotonic()
        self._asking = 0  # threads that want a short turn
        self._told = False

    def acquire(self, *, short: bool, unless: Callable[[], bool] = lambda: False) -> bool:
        """Wait for a turn; returns False as soon as ``unless`` holds, which is asked whenever something has changed.

        Raises
        ------
        RuntimeError
            If it is this thread's turn already, or that of the thread that waits for this one's task.
        """
        with self._lock:
            self._asking += short
            try:
                while not unless():
                    if self._holder is None and (short or not self._asking):
                        self._take()
                        return True
                    if self.inside:
                        raise RuntimeError(
                            "this engine is already generating: a reward or hook of its own call cannot call it"
                        )
                    self._wait()
                return False
            finally:
                self._asking -= short
                self._changed.notify_all()  # those behind whoever wanted a short turn

    def _wait(self) -> None:
        """Until something has changed, or a turn has lasted long.

        A thread that a reward has started by itself, as executors do, cannot be told from anybody else who waits.
        """
        left = None if self._told or self._holder is None else max(self._since + _LONG - time.monotonic(), 0.0)
        if not self._changed.wait(left) and not self._told:
            self._told = True
            warn(
                f"this call waits for a step of another one that has lasted {_LONG:g} s. If a reward or hook of it "
                "has made this call, from a thread of its own, both wait for ever: give it an engine of its own"
            )

    def try_acquire(self) -> bool:
        """Take the turn if it is nobody's; never waits for one."""
        with self._lock:
            if self._holder is None:
                self._take()
                return True
            return False

    def _take(self) -> None:
        self._holding, self._since = object(), time.monotonic()
        _within.set((*_within.get(), self._holding))
        self._holder = threading.get_ident()  # last: what is no turn yet is nobody's to end

    def release(self, unless: Callable[[], bool] = lambda: False) -> bool:
        """Let others have their turn, and look whether there are news; not if ``unless`` holds. Returns whether."""
        if not self.mine:
            return True
        with self._lock:
            if unless():
                return False
            self._changed.notify_all()  # first: whoever is interrupted before its turn has ended ends it once more
            _within.set(tuple(one for one in _within.get() if one is not self._holding))
            self._holder = None
            return True

    @property
    def mine(self) -> bool:
        """Whether it is this thread's turn."""
        return self._holder == threading.get_ident()

    @property
    def inside(self) -> bool:
        """Whether it is this thread's turn, or whose turn it is waits for what runs here, such as an async reward."""
        return self.mine or (self._holder is not None and self._holding in _within.get())

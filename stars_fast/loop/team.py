"""The OpenMP workers that torch's operators wake: every thread that computes has some of its own."""

from __future__ import annotations

import ctypes
import os

_SOFT = 1  # omp_pause_soft: they come again with the next parallel region


def release_team() -> None:
    """Let go of this thread's workers, before another thread goes on computing in its place.

    Once there are more of them than cores, libgomp lets all of them sleep after each region, and waking them takes
    longer than most of a small model's operators (docs/findings/many-callers.md). Other runtimes are left alone.
    """
    pause = getattr(ctypes.CDLL(None), "omp_pause_resource_all", None)
    if pause is not None:
        pause(_SOFT)


if hasattr(os, "register_at_fork"):  # libgomp's workers stay with the parent, and a child that has some waits for them
    os.register_at_fork(before=release_team)

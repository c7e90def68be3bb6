"""Warnings that point at the user's own line, and tracebacks in the log."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from types import FrameType

import torch
import transformers

# What lies between the user's line and a warning: this package, and what it is called through or wrapped in.
_FILES = (__file__, torch.__file__, str(transformers.__file__))
_INSIDE = (*(os.path.join(os.path.dirname(file), "") for file in _FILES), contextlib.__file__)

_log = logging.getLogger("stars_fast")
_log.addHandler(logging.NullHandler())  # nothing on stderr for who has set up no log: warnings say what there is


def log(message: str, error: BaseException) -> None:
    """An exception that is not raised, with its traceback."""
    _log.error(message, exc_info=error)


def warn(message: str) -> None:
    """A UserWarning at the nearest line outside."""
    frame: FrameType | None = sys._getframe(1)
    level = 2
    while frame is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)

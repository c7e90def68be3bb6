"""Warnings that point at the user's own line."""

from __future__ import annotations

import os
import sys
import warnings
from types import FrameType

import torch
import transformers

# What lies between the user's line and a warning: this package, and what it is called through or wrapped in.
_FILES = (__file__, torch.__file__, str(transformers.__file__))
_INSIDE = tuple(os.path.join(os.path.dirname(file), "") for file in _FILES)


def warn(message: str) -> None:
    """A UserWarning at the nearest line outside."""
    frame: FrameType | None = sys._getframe(1)
    level = 2
    while frame is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)

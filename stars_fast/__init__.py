"""Exact, kernel-accelerated reward-guided generation for Hugging Face models."""

from stars_fast import _source_tree

_source_tree.install()

from stars_fast.calibrate import Calibration, calibrate  # noqa: E402
from stars_fast.config import StarsConfig  # noqa: E402
from stars_fast.engine import StarsEngine  # noqa: E402
from stars_fast.generate import StarsGenerateOutput, decoding, generate  # noqa: E402
from stars_fast.outputs import SegmentEvent, SegmentTrace, StarsOutput  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "SegmentEvent",
    "SegmentTrace",
    "StarsConfig",
    "StarsEngine",
    "StarsGenerateOutput",
    "StarsOutput",
    "calibrate",
    "decoding",
    "generate",
]

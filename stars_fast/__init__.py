"""Exact reward-guided generation for Hugging Face models, many candidates at a time."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from stars_fast import _source_tree

if TYPE_CHECKING:
    from stars_fast.async_engine import AsyncStarsEngine, QueueFull
    from stars_fast.calibration import Calibration, Satisficing, calibrate, fit, satisfice
    from stars_fast.config import StarsConfig
    from stars_fast.dropin import StarsGenerateOutput, decoding, generate
    from stars_fast.engine import StarsEngine
    from stars_fast.outputs import SegmentEvent, SegmentTrace, StarsOutput

_source_tree.install()

__version__ = "0.1.0"

__all__ = [
    "AsyncStarsEngine",
    "Calibration",
    "CandidateTrace",
    "Fit",
    "QueueFull",
    "Satisficing",
    "SegmentEvent",
    "SegmentTrace",
    "StarsConfig",
    "StarsEngine",
    "StarsGenerateOutput",
    "StarsOutput",
    "calibrate",
    "decoding",
    "fit",
    "generate",
    "satisfice",
]

# Public name -> its module. Imported on first use: torch and transformers take seconds, `stars-fast --help` none.
_HOMES = {
    "AsyncStarsEngine": "async_engine",
    "Calibration": "calibration",
    "CandidateTrace": "outputs",
    "Fit": "methods.fit",
    "QueueFull": "async_engine",
    "Satisficing": "calibration",
    "SegmentEvent": "outputs",
    "SegmentTrace": "outputs",
    "StarsConfig": "config",
    "StarsEngine": "engine",
    "StarsGenerateOutput": "dropin",
    "StarsOutput": "outputs",
    "calibrate": "calibration",
    "decoding": "dropin",
    "fit": "calibration",
    "generate": "dropin",
    "satisfice": "calibration",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    if not name.startswith("_"):
        try:
            return import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

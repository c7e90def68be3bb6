"""Makes ``stars_fast.kernels`` importable from a checkout that is not installed.

The Triton sources lie in ``triton_kernels/`` beside the package and become ``stars_fast.kernels`` when the package is
installed. Where the checkout itself is on ``sys.path`` (``python -m pytest`` in its root, say), nothing has moved them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).resolve().parent
SOURCES = PACKAGE.parent / "triton_kernels"
NAME = f"{__package__}.kernels"


class SourceTreeFinder(MetaPathFinder):
    """Finds ``stars_fast.kernels`` in ``../triton_kernels``; its submodules follow from its search path."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != NAME:
            return None
        return spec_from_file_location(fullname, SOURCES / "__init__.py", submodule_search_locations=[str(SOURCES)])


def install() -> None:
    """Serve ``stars_fast.kernels`` from the source tree; does nothing in an installed package, nor a second time."""
    installed = (PACKAGE / "kernels").is_dir()
    if installed or not SOURCES.is_dir() or any(isinstance(finder, SourceTreeFinder) for finder in sys.meta_path):
        return
    sys.meta_path.append(SourceTreeFinder())  # last: an editable install's own finder goes first

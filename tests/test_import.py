"""Importing the package is cheap, and its public names are what they seem."""

import subprocess
import sys


def python(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_command_line_starts_without_torch():
    python("import sys, stars_fast.cli; assert not {'torch', 'transformers'} & sys.modules.keys()")


def test_public_names_are_functions_and_classes_whatever_was_imported_before():
    python(
        "import stars_fast.generate, stars_fast.calibrate\n"
        "from stars_fast.calibrate import Calibration\n"
        "assert callable(stars_fast.generate) and callable(stars_fast.calibrate)\n"
        "assert stars_fast.Calibration is Calibration and stars_fast.rewards.Reward\n"
        "assert all(hasattr(stars_fast, name) for name in stars_fast.__all__)\n"
        "assert not hasattr(stars_fast, 'nonsense')\n"
    )

"""Importing the package is cheap, and its public names are what they seem."""

import subprocess
import sys


def python(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_command_line_starts_without_torch():
    python("import sys, stars_fast.cli; assert not {'torch', 'transformers'} & sys.modules.keys()")


def test_public_names_and_submodules_are_attributes_of_the_package():
    python(
        "import stars_fast\n"
        "assert callable(stars_fast.generate) and callable(stars_fast.calibrate)\n"
        "assert stars_fast.rewards.Reward and stars_fast.demo.load\n"
        "assert all(hasattr(stars_fast, name) for name in stars_fast.__all__)\n"
        "assert not hasattr(stars_fast, 'nonsense')\n"
    )

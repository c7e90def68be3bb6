"""The project's tests of what only a GPU shows."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu_parts.models import free
from benchmarks.gpu_parts.runner import Runner

ROOT = Path(__file__).resolve().parents[2]
_PROCESSES = 6  # of pytest-xdist: most of the time goes into compiling kernels
_OUTPUT = 30_000  # characters kept


def run_tests(runner: Runner) -> None:
    """pytest -m gpu: what only a GPU can show."""
    if importlib.util.find_spec("pytest") is None:
        runner.add("tests", status="not run: pytest is not installed", output="")
        return
    absent = [name for name in ("hypothesis", "scipy") if importlib.util.find_spec(name) is None]
    command = [sys.executable, "-m", "pytest", "tests", "-m", "gpu", "-p", "no:cacheprovider", "--tb=short", "-rfE"]
    command += ["--continue-on-collection-errors", "--durations=5", "--color=no"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(_PROCESSES)]
    free(runner)  # the tests have processes of their own on this GPU
    status, output = _run(command, max(runner.left(), 5.0))
    found = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped|error)", output[-400:])}
    runner.add("tests", status=status, **found, absent=absent, output=output[-_OUTPUT:])
    runner.say(output[-3000:])


def _run(command: list[str], seconds: float) -> tuple[str, str]:
    """The program's status and what it printed, also where it is stopped because the time is up."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )
    try:
        output, _ = process.communicate(timeout=seconds)
        return {0: "passed", 5: "no test collected"}.get(process.returncode, f"exit {process.returncode}"), output
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its workers too: they would go on using the GPU
        output, _ = process.communicate()
        return f"stopped after {seconds:.0f} s", output

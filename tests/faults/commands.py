"""The command in a process of its own, which may be killed; what takes seconds to import is there from the start."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_OURS = ("stars_fast", "stars_fast.cli.generate", "stars_fast.evaluation.runner")
_CONTEXT.set_forkserver_preload([*_OURS, "transformers.models.llama.modeling_llama"])


def start(arguments: list[str], stderr: Path, most_bytes: int | None = None) -> ForkServerProcess:
    """Run ``stars-fast`` with these arguments; no file of its becomes larger than ``most_bytes``."""
    process = _CONTEXT.Process(target=_run, args=(arguments, stderr, most_bytes))
    process.start()
    return process


def _run(arguments: list[str], stderr: Path, most_bytes: int | None) -> None:
    import torch

    from stars_fast.cli import app

    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background inherits ignored
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.set_num_threads(1)
    if most_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, resource.RLIM_INFINITY))
    app(arguments, prog_name="stars-fast")


def wait_until(true: Callable[[], bool], process: ForkServerProcess) -> None:
    """Look again and again, until it is so or the process is over."""
    deadline = time.monotonic() + 120
    while process.is_alive() and not true():
        assert time.monotonic() < deadline, "nothing happens"
        time.sleep(0.002)

"""Ray in a folder of its own, and nothing of it left behind."""

import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def ray_processes() -> Iterator[Callable[..., list[int]]]:
    """Has Ray keep its things in a folder, whose path is short enough for sockets. A function that gives the ids of the
    processes whose command line has a text in it, among those that were started with this folder, and by those.
    """
    folder = Path(tempfile.mkdtemp(prefix="r"))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HOME", "RAY_TMPDIR"):  # it writes a token into the home folder
            patch.setenv(name, str(folder))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield lambda title="": _processes(f"RAY_TMPDIR={folder}".encode(), title)
    end = time.monotonic() + 20
    while (left := _processes(f"RAY_TMPDIR={folder}".encode())) and time.monotonic() < end:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)
    shutil.rmtree(folder, ignore_errors=True)
    assert not left


@pytest.fixture(scope="session")
def cluster(ray_processes) -> Iterator[None]:
    """A cluster of two CPUs, for tests that start none."""
    ray = pytest.importorskip("ray")
    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=200 << 20, logging_level="ERROR")
    yield
    ray.shutdown()


def _processes(variable: bytes, title: str = "") -> list[int]:
    parents, ours = dict[int, int](), set[int]()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if variable in (entry / "environ").read_bytes().split(b"\0"):
                    ours.add(int(entry.name))
    while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= more  # a worker's title lies where its environment was
    return [pid for pid in ours if title in _title(pid)]


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""

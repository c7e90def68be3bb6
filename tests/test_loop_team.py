"""Whoever stops computing lets its OpenMP workers go, and gets them again."""

import os
import sys
import time
from pathlib import Path

import pytest
import torch

from stars_fast.loop.team import release_team


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.mark.skipif(sys.platform != "linux" or (os.cpu_count() or 1) < 2, reason="counts threads as Linux tells them")
def test_released_workers_are_gone_and_come_again():
    if "libgomp" not in Path("/proc/self/maps").read_text():
        pytest.skip("torch has another OpenMP here")
    torch.set_num_threads(2)
    x = torch.arange(1 << 20, dtype=torch.float32)
    want, with_team = x.exp().clamp(max=2.0), threads()
    release_team()
    deadline = time.monotonic() + 5
    while threads() >= with_team and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threads() < with_team
    assert torch.equal(x.exp().clamp(max=2.0), want) and threads() == with_team

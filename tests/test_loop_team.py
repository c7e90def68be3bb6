"""Whoever stops computing lets its OpenMP workers go, and gets them again."""

import os
import subprocess
import sys

import pytest

# In a process of its own: what other tests leave running would be counted, too.
PROGRAM = """
import os, signal, time, torch
from pathlib import Path
from stars_fast.loop.team import release_team

threads = lambda: len(os.listdir("/proc/self/task"))
torch.set_num_threads(2)
x = torch.arange(1 << 20, dtype=torch.float32)
want, with_team = x.exp(), threads()
if "libgomp" not in Path("/proc/self/maps").read_text():
    print("skip")
    raise SystemExit
release_team()
deadline = time.monotonic() + 5
while threads() >= with_team and time.monotonic() < deadline:
    time.sleep(0.01)
assert threads() < with_team, "the workers are still there"
assert torch.equal(x.exp(), want) and threads() == with_team
child = os.fork()
if not child:  # it has not got the workers that the parent's thread had
    signal.alarm(20)
    os._exit(not torch.equal(x.exp(), want))
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "the child waits for workers that are not there"
"""


@pytest.mark.skipif(sys.platform != "linux" or (os.cpu_count() or 1) < 2, reason="counts threads as Linux tells them")
def test_released_workers_are_gone_and_come_again_and_a_forked_child_has_its_own():
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    if "skip" in run.stdout:
        pytest.skip("torch has another OpenMP here")

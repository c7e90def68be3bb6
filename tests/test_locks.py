"""A lock that another thread held when the process was forked is open in the child."""

import os
import signal
import threading

import pytest

from stars_fast.locks import Lock


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("mine", [False, True])
def test_a_forked_child_finds_it_open(mine):
    lock, held, go_on = Lock(), threading.Event(), threading.Event()

    def hold():
        with lock.held():
            held.set()
            go_on.wait(20)

    def fork():
        child = os.fork()
        if not child:
            signal.alarm(10)  # ends a child that waits
            with lock.held():
                os._exit(0)
        return child

    if mine:  # what the forking thread holds itself it may enter again, and leave
        with lock.held():
            child = fork()
    else:
        thread = threading.Thread(target=hold)
        thread.start()
        assert held.wait(5)
        child = fork()
        go_on.set()
        thread.join(5)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

"""One thread at a time has its turn; whoever wants a short one comes before those who want long ones."""

import contextvars
import sys
import threading
from itertools import count

import pytest

from stars_fast.loop.turn import Turn


def test_a_short_turn_comes_before_the_next_long_one():
    turn, order, rounds = Turn(), [], count()
    asked, go_on = threading.Event(), threading.Event()

    def busy():
        while next(rounds) < 50:
            assert turn.acquire(short=False)
            order.append("long")
            asked.set()
            go_on.wait(5)
            turn.release()

    thread = threading.Thread(target=busy)
    thread.start()
    asked.wait(5)
    waiter = threading.Thread(target=lambda: turn.acquire(short=True) and (order.append("short"), turn.release()))
    waiter.start()
    while not turn._asking:
        waiter.join(0.001)
    go_on.set()
    waiter.join(5)
    thread.join(5)
    assert order[:2] == ["long", "short"] and order.count("long") == 50


def test_news_end_a_wait_for_a_turn():
    turn, news = Turn(), []
    assert turn.acquire(short=False)
    found = []
    thread = threading.Thread(target=lambda: found.append(turn.acquire(short=False, unless=lambda: bool(news))))
    thread.start()
    news.append("it is here")
    turn.release()
    thread.join(5)
    assert found == [False] and turn.try_acquire()


def test_whoever_has_the_turn_is_refused_another_and_nobody_else_can_end_it():
    turn = Turn()
    assert turn.acquire(short=True) and turn.mine
    with pytest.raises(RuntimeError, match="already generating"):
        turn.acquire(short=False)
    other = threading.Thread(target=turn.release)
    other.start()
    other.join(5)
    assert turn.mine and not turn.try_acquire()
    assert not turn.release(unless=lambda: True) and turn.mine
    assert turn.release() and not turn.mine


@pytest.mark.parametrize("line", range(1, 7))
def test_an_interrupt_within_the_end_of_a_turn_leaves_nobody_waiting(line):
    """Before any line of it: whoever was interrupted ends the turn once more in a finally.

    Python looks for signals after calls, so none comes between the body of a with and its end.
    """
    turn, met = Turn(), set()
    assert turn.acquire(short=False)
    waiter = threading.Thread(target=lambda: (turn.acquire(short=False), turn.release()), daemon=True)
    waiter.start()
    while not turn._changed._waiters:
        waiter.join(0.001)

    def trace(frame, event, argument):
        if event == "line" and frame.f_code is Turn.release.__code__ and frame.f_lineno not in met:
            met.add(frame.f_lineno)
            if len(met) == line:
                raise KeyboardInterrupt
        return trace

    try:
        sys.settrace(trace)
        try:
            turn.release()
        finally:
            sys.settrace(None)
            turn.release()
    except KeyboardInterrupt:
        pass
    waiter.join(5)
    assert not waiter.is_alive() and not turn.mine
    assert turn._lock.acquire(timeout=5)


def test_who_waits_long_for_a_step_is_told_once_why_that_may_be_for_ever(monkeypatch):
    monkeypatch.setattr("stars_fast.loop.turn._LONG", 0.05)
    turn = Turn()
    assert turn.acquire(short=False)
    waiters = [threading.Thread(target=lambda: (turn.acquire(short=True), turn.release())) for _ in range(2)]
    with pytest.warns(UserWarning, match="lasted 0.05 s.*both wait for ever: give it an engine of its own") as told:
        for waiter in waiters:
            waiter.start()
        for _ in range(500):
            waiters[0].join(0.01)
            if told and turn._asking == 2:
                break
        waiters[1].join(0.1)
    assert len(told) == 1 and turn.release()
    for waiter in waiters:
        waiter.join(5)
        assert not waiter.is_alive()


def test_what_the_turn_waits_for_is_refused_it_wherever_it_runs():
    """An async reward runs on another thread, in the context of the one that asks it."""
    turn, found = Turn(), []

    def ask():
        try:
            found.append(turn.acquire(short=True) and turn.release())
        except RuntimeError as error:
            found.append(str(error))

    assert turn.acquire(short=False) and turn.inside
    within = contextvars.copy_context()
    for context in (within, contextvars.Context()):
        thread = threading.Thread(target=context.run, args=(ask,), daemon=True)
        thread.start()
        thread.join(0.2)
    assert len(found) == 1 and "already generating" in found[0]
    assert turn.release() and not turn.inside
    thread.join(5)
    within.run(ask)  # of a turn that is over
    assert found[1:] == [True, True]

"""One core for all callers: who comes, goes, fails or is interrupted changes nobody else's text, and leaves nothing."""

import functools
import gc
import itertools
import threading
from contextlib import nullcontext, suppress

import pytest
import torch
from conftest import sum_reward, tiny_policy, tiny_reward

from stars_fast import StarsConfig, StarsEngine
from stars_fast.inputs.arguments import Arguments
from stars_fast.inputs.job import Job
from stars_fast.loop.core import Size
from stars_fast.loop.trunks import Trunks
from stars_fast.policy.policy import Policy
from stars_fast.rewards import Reward

VOCAB = 32
CONFIG = StarsConfig(segment_length=4, max_attempts=5, target_reward=1.5, beta=0.6, max_new_tokens=14, ignore_eos=True)
PROMPTS = [[5, 6, 7], [8], [9, 10, 11]]
OTHERS = [[14, 15], [3] * 9]
LONG = [[7] * 200]  # more than the pools of calls with short prompts have room for

pytestmark = pytest.mark.filterwarnings("ignore:method=.* itself")


class Sums(Reward):
    def score(self, completions):
        return sum_reward([completion.tokens for completion in completions])


def make_engine(reward=None, **limits):
    return StarsEngine(tiny_policy(VOCAB, hidden=32), reward or Sums(), **limits)


def alone(prompts, seed, **settings):
    return make_engine().generate(prompts, CONFIG, seed=seed, **settings).completions


def assert_nothing_left(engine):
    core = engine.core
    assert core.loop is None and core.open_calls == 0 and not core._caller_of
    trees = [engine.policy.tree, *(model.tree for model in engine.reward.tree_models)]
    assert all(tree.live_slots == tree.nodes == 0 for tree in trees)
    assert engine.policy.model.config._attn_implementation == "sdpa"


def text(events, index=0):
    return [token for event in events if event.index == index for token in event.segment.tokens]


# Joining and leaving


def test_calls_join_in_the_midst_of_others_and_leave_before_them():
    engine = make_engine(tiny_reward(VOCAB, hidden=32))
    longer = CONFIG.replace(max_new_tokens=50)
    first = make_engine(tiny_reward(VOCAB, hidden=32)).generate(PROMPTS, longer, seed=1).completions
    second = make_engine(tiny_reward(VOCAB, hidden=32)).generate(OTHERS, CONFIG, seed=2).completions
    stream = engine.stream(PROMPTS, longer, seed=1)
    events = [next(stream)]
    rows = []
    engine.core.loop.on_heartbeat = lambda beat: rows.append(beat.requests)
    assert engine.generate(OTHERS, CONFIG, seed=2).completions == second
    assert max(rows) == len(PROMPTS) + len(OTHERS), "they were drawn side by side"
    assert engine.core.loop is not None and engine.core.open_calls == 1
    events += stream
    assert [text(events, i) for i in range(3)] == first
    assert_nothing_left(engine)


def test_interleaved_streams_tell_what_each_tells_alone():
    engine = make_engine()
    settings = [dict(), dict(max_attempts=2, temperature=0.7), dict(method="best_of_n"), dict(method="particle_filter")]
    streams = [engine.stream([[5, 6, i]], CONFIG, seed=i, **each) for i, each in enumerate(settings)]
    told = [[] for _ in streams]
    for events in itertools.zip_longest(*streams):
        for place, event in enumerate(events):
            told[place] += [event] if event else []
    for i, each in enumerate(settings):
        assert [text(told[i])] == alone([[5, 6, i]], i, **each)
    assert_nothing_left(engine)


def test_a_stream_that_is_forgotten_frees_its_slots_while_others_go_on():
    engine = make_engine(tiny_reward(VOCAB, hidden=32))
    kept, lost = engine.stream(PROMPTS, CONFIG, seed=1), engine.stream(OTHERS, CONFIG, seed=2)
    events = [next(kept)]
    next(lost)
    del lost
    gc.collect()
    assert engine.core.open_calls == 1
    events += kept
    expected = make_engine(tiny_reward(VOCAB, hidden=32)).generate(PROMPTS, CONFIG, seed=1).completions
    assert [text(events, i) for i in range(3)] == expected
    assert_nothing_left(engine)


def test_a_call_that_needs_larger_pools_waits_until_the_others_are_through(small_pools):
    engine = make_engine()
    small = engine.stream([[5]], CONFIG, seed=1)
    events = [next(small)]
    found, thread = [], threading.Thread(target=lambda: found.append(engine.generate(LONG, CONFIG, seed=2)))
    thread.start()
    while thread.is_alive() and not engine.core._later:
        thread.join(0.01)
    events += small
    thread.join(30)
    assert [text(events)] == alone([[5]], 1)
    assert found[0].completions == alone(LONG, 2)
    assert_nothing_left(engine)


def test_calls_behind_one_that_waits_for_larger_pools_keep_their_order(small_pools):
    """Else whoever needs much would wait for ever."""
    engine = make_engine()
    first = engine.stream([[5]], CONFIG, seed=1)
    events = [next(first)]
    second, third = engine.stream(LONG, CONFIG, seed=2), engine.stream([[6]], CONFIG, seed=3)
    told = {}
    threads = [
        threading.Thread(target=lambda name=name, stream=stream: told.update({name: text(list(stream))}))
        for name, stream in (("second", second), ("third", third))
    ]
    threads[0].start()
    while threads[0].is_alive() and not engine.core._later:
        threads[0].join(0.01)
    threads[1].start()
    # Whoever waits takes steps for all: the first call may have ended by now, and nobody wait behind another.
    while threads[1].is_alive() and len(engine.core._later) < 2:
        threads[1].join(0.01)
    events += first
    for thread in threads:
        thread.join(30)
    assert [text(events)] == alone([[5]], 1)
    assert [told["second"]] == alone(LONG, 2) and [told["third"]] == alone([[6]], 3)
    assert_nothing_left(engine)


# Whose fault it is


@pytest.mark.filterwarnings("ignore:no request succeeded")
def test_a_reward_that_calls_its_own_engine_is_told_so():
    engine = make_engine(lambda completions: engine.generate([[1]], CONFIG) and sum_reward(completions))
    out = engine.generate([[5]], CONFIG, seed=1)
    assert "already generating" in out.errors[0]
    assert_nothing_left(engine)


HOOKS = [
    ("commit", "stars"),
    ("discard", "stars"),
    ("close", "stars"),
    ("commit", "best_of_n"),
    ("discard", "particle_filter"),
    ("close", "particle_filter"),
    ("fork", "particle_filter"),
]


@pytest.mark.filterwarnings("ignore:1 of 3 requests failed")
@pytest.mark.parametrize("hook, method", HOOKS)
def test_a_reward_whose_hook_raises_for_one_prompt_costs_that_one_alone(hook, method):
    class Raising(Sums):
        bad = PROMPTS[1]

        def told(self, one):
            response = getattr(one, "response", one)
            if response.prompt.source == self.bad:
                raise ArithmeticError("the books do not balance")
            return super().fork(one) if hook == "fork" else None

    Raising.told.__name__ = hook
    setattr(Raising, hook, Raising.told)
    engine, config = make_engine(Raising()), CONFIG.replace(base_reward=0.0)  # no empty answers
    expected = make_engine().generate(PROMPTS, config, seed=1, method=method)
    out = engine.generate(PROMPTS, config, seed=1, method=method)
    assert f"the reward's {hook} raised ArithmeticError: the books do not balance" in out.errors[1]
    whole = out.finish_reasons[1] != "error"  # it had ended by then
    assert out.completions[1] == expected.completions[1][: len(out.completions[1])]
    assert not whole or out.completions[1] == expected.completions[1]
    for row in (0, 2):
        assert (out.completions[row], out.errors[row]) == (expected.completions[row], None)
    assert_nothing_left(engine)
    engine.reward.bad = None
    assert engine.generate(PROMPTS, config, seed=1, method=method).completions == expected.completions
    assert_nothing_left(engine)


def lasting(policy, least):
    """A forward pass of proposals that fails for good once so many have been made."""
    propose, calls = policy.propose, itertools.count()

    def failing(leaves):
        return propose(leaves) if next(calls) < least else 1 / 0

    return failing


@pytest.mark.filterwarnings("ignore:a heartbeat broke off")
def test_what_breaks_for_all_leaves_whole_what_had_ended_and_a_later_call_works(monkeypatch):
    engine = make_engine()
    expected = [alone(PROMPTS, 1), alone(OTHERS, 2)]
    streams = [engine.stream(PROMPTS, CONFIG, seed=1), engine.stream(OTHERS, CONFIG, seed=2)]
    events = [[next(stream)] for stream in streams]
    with monkeypatch.context() as patch:
        patch.setattr(engine.policy, "propose", lasting(engine.policy, 3))
        with pytest.warns(UserWarning, match=r"requests failed|no request succeeded"):
            for told, stream in zip(events, streams, strict=True):
                told += stream
    ends = [event for told in events for event in told if event.finish_reason is not None]
    assert len(ends) == len(PROMPTS) + len(OTHERS)
    assert {event.finish_reason for event in ends} == {"length", "error"}
    assert all("ZeroDivisionError" in event.error for event in ends if event.finish_reason == "error")
    for told, texts in zip(events, expected, strict=True):
        for event in told:
            if event.finish_reason == "length":
                assert text(told, event.index) == texts[event.index]
    assert engine.generate(PROMPTS, CONFIG, seed=1).completions == alone(PROMPTS, 1)
    assert_nothing_left(engine)


@pytest.mark.filterwarnings("ignore:a heartbeat broke off")
@pytest.mark.parametrize("settings", [dict(), dict(target_reward=None)], ids=["explicit", "calibrated"])
def test_what_breaks_for_all_is_raised_where_errors_are_and_reaches_who_has_only_pilots(monkeypatch, settings):
    engine = make_engine()
    monkeypatch.setattr(engine.policy, "propose", lambda leaves: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.generate(PROMPTS, CONFIG, seed=1, on_error="raise", **settings)
    with pytest.warns(UserWarning, match="no request succeeded.*what all requests share failed: ZeroDivisionError"):
        out = engine.generate(PROMPTS, CONFIG, seed=1, **settings)
    assert out.finish_reasons == ["error"] * 3 and out.completions == [[]] * 3
    assert_nothing_left(engine)


def test_a_step_that_fails_once_is_taken_again(monkeypatch, caplog):
    engine, propose, calls = make_engine(), Policy.propose, itertools.count(1)

    def once(self, leaves):
        return propose(self, leaves) if next(calls) != 2 else 1 / 0

    monkeypatch.setattr(Policy, "propose", once)
    with pytest.warns(UserWarning, match="broke off, and is taken again.*ZeroDivisionError"):
        out = engine.generate(PROMPTS, CONFIG, seed=1)
    assert out.errors == [None] * 3 and "in once" in caplog.text  # with its traceback
    monkeypatch.undo()
    assert out.completions == alone(PROMPTS, 1)
    assert_nothing_left(engine)


@pytest.mark.filterwarnings("ignore:a heartbeat broke off")
def test_what_others_commit_before_a_heartbeat_breaks_off_is_progress(monkeypatch):
    engine, append, calls = make_engine(), Trunks.append, itertools.count(1)

    def third(*args):
        if (call := next(calls)) in (3, 6, 9, 12):  # the last request's commit, heartbeat after heartbeat
            raise ZeroDivisionError(call)
        return append(*args)

    monkeypatch.setattr(Trunks, "append", third)
    out = engine.generate(PROMPTS, CONFIG, seed=1, target_reward=-1e6, segment_length=1)
    assert out.errors == [None] * 3 and next(calls) > 12
    assert_nothing_left(engine)


@pytest.mark.filterwarnings("ignore:a heartbeat broke off")
@pytest.mark.parametrize("times", [2, 3])
def test_two_failures_in_a_row_are_taken_again_and_a_third_is_not(monkeypatch, times):
    engine, propose, calls = make_engine(), Policy.propose, itertools.count(1)

    def failing(self, leaves):
        return 1 / 0 if 2 <= next(calls) < 2 + times else propose(self, leaves)

    monkeypatch.setattr(Policy, "propose", failing)
    run = functools.partial(engine.generate, PROMPTS, CONFIG, seed=1, target_reward=-1e6, on_error="raise")
    with nullcontext() if times == 2 else pytest.raises(ZeroDivisionError):
        assert run().errors == [None] * 3


@pytest.mark.filterwarnings("ignore:a heartbeat broke off", "ignore:no request succeeded")
@pytest.mark.parametrize("error", [ZeroDivisionError, torch.OutOfMemoryError])
def test_what_fails_at_every_commit_ends_the_call_though_heartbeats_between_succeed(monkeypatch, error):
    engine, seen = make_engine(), itertools.count()

    def grow(*args):
        raise error("planted")

    def bounded(heartbeat):
        if next(seen) > 400:
            raise KeyboardInterrupt("it goes on for ever")

    monkeypatch.setattr(Trunks, "append", grow)
    engine.on_heartbeat = bounded
    out = engine.generate(PROMPTS, CONFIG, seed=1, target_reward=1e6, alpha=1.0, candidates=1)  # five heartbeats each
    assert out.finish_reasons == ["error"] * 3 and all("planted" in cause for cause in out.errors)
    assert_nothing_left(engine)


@pytest.mark.parametrize("bug", [AssertionError, TypeError, KeyError, AttributeError, IndexError])
def test_a_bug_is_raised_to_all_and_not_taken_again(monkeypatch, bug):
    """It is no answer's error: whoever reads rows alone would take it for the models'."""
    engine, propose, calls = make_engine(), Policy.propose, itertools.count(1)

    def once(self, leaves):
        if next(calls) == 2:
            raise bug("planted")
        return propose(self, leaves)

    other = Job(engine.prepare(Arguments(OTHERS, CONFIG, seed=2)), None)
    engine.core.submit(other)
    monkeypatch.setattr(Policy, "propose", once)
    with pytest.raises(bug, match="planted"):
        engine.generate(PROMPTS, CONFIG, seed=1)
    assert other.over and isinstance(other.error, bug) and next(calls) == 3
    assert engine.generate(PROMPTS, CONFIG, seed=1).completions == alone(PROMPTS, 1)
    assert_nothing_left(engine)


class Interrupted(Sums):
    """A Ctrl-C comes while one thread scores, once."""

    def __init__(self):
        self.victim = None

    def score(self, completions):
        if self.victim == threading.get_ident():
            self.victim = None
            raise KeyboardInterrupt
        return super().score(completions)


@pytest.mark.parametrize("method", ["stars", "best_of_n", "particle_filter", "args"])
def test_an_interrupt_in_one_thread_leaves_the_others_text_right(method):
    """Whose thread it is decides nothing: it is in the midst of everybody's work."""
    engine, settings = make_engine(Interrupted()), dict(num_return_sequences=2, method=method)
    other = Job(engine.prepare(Arguments(PROMPTS, CONFIG, settings, seed=1)), None)
    engine.core.submit(other)
    engine.core.step()
    engine.reward.victim = threading.get_ident()
    with pytest.raises(KeyboardInterrupt):
        engine.generate(OTHERS, CONFIG, seed=2, method=method)
    assert engine.core.open_calls == 1
    while not other.over:
        engine.core.step()
    assert engine.output(other).completions == alone(PROMPTS, 1, **settings)
    assert_nothing_left(engine)


class Breaking(Sums):
    """A Ctrl-C comes within the n-th call of one of its hooks."""

    def __init__(self, hook, when):
        self.calls, self.when = itertools.count(1), when
        setattr(self, hook, self.interrupt)

    def interrupt(self, *args):
        if next(self.calls) == self.when:
            raise KeyboardInterrupt


@pytest.mark.parametrize("method", ["stars", "best_of_n", "particle_filter", "args"])
@pytest.mark.parametrize("hook", ["commit", "close"])
def test_an_interrupt_between_two_commits_changes_no_text(method, hook):
    """Some requests have moved or ended by then, and others have not."""
    texts, settings = [alone(PROMPTS, 1, method=method), alone(OTHERS, 2, method=method)], dict(method=method)
    interrupts = 0
    for when in range(1, 26, 3):
        engine = make_engine(Breaking(hook, when))
        jobs = []
        for prompts, seed in ((PROMPTS, 1), (OTHERS, 2)):
            jobs.append(Job(engine.prepare(Arguments(prompts, CONFIG, settings, seed=seed)), None))
            engine.core.submit(jobs[-1])
        for _ in range(400):
            try:
                if not engine.core.step():
                    break
            except KeyboardInterrupt:
                interrupts += 1
        assert all(job.over and job.error is None for job in jobs)
        assert [engine.output(job).completions for job in jobs] == texts
        assert_nothing_left(engine)
    assert interrupts > 1


def test_who_is_over_before_its_turn_comes_leaves_nothing():
    engine = make_engine()
    job = Job(engine.prepare(Arguments(PROMPTS, CONFIG, seed=1)), None)
    job.end(RuntimeError("closed meanwhile, by another thread"))
    engine.core.submit(job)
    assert job.stats.policy_tokens == 0
    assert_nothing_left(engine)


class Leaving(Sums):
    """Callers leave within a step, once."""

    def score(self, completions):
        vars(self).pop("leave", int)()
        return super().score(completions)


@pytest.mark.filterwarnings("ignore:a session could not be ended")
def test_who_leaves_behind_one_that_cannot_be_withdrawn_has_left(small_pools, monkeypatch):
    engine = make_engine(Leaving())
    core, jobs = engine.core, [Job(engine.prepare(Arguments(ids, CONFIG, seed=1)), None) for ids in ([[8]], LONG)]
    for job in jobs:
        core.submit(job)
    assert len(core._later) == 1

    def leave():
        monkeypatch.setattr(core.loop, "withdraw", lambda *_: 1 / 0)
        for job in jobs:
            core.abort(job)

    engine.reward.leave = leave
    core.step()
    assert all(job.over for job in jobs) and jobs[1].stats.policy_tokens == 0
    assert_nothing_left(engine)


@pytest.mark.parametrize("when", [6, 7])  # after those of the five empty answers
def test_an_interrupt_while_somebody_is_withdrawn_leaves_the_engine_to_others(when):
    engine = make_engine(Breaking("close", when))
    stay = Job(engine.prepare(Arguments(PROMPTS, CONFIG, seed=1)), None)
    leave = Job(engine.prepare(Arguments(OTHERS, CONFIG, seed=2)), None)
    engine.core.submit(stay)
    engine.core.submit(leave)
    engine.core.step()
    with suppress(KeyboardInterrupt):
        engine.core.abort(leave)
    thread = threading.Thread(target=lambda: [engine.core.wait(leave), engine.core.abort(leave)], daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive() and leave.over
    while not stay.over:
        with suppress(KeyboardInterrupt):
            engine.core.step()
    assert engine.output(stay).completions == alone(PROMPTS, 1)
    assert_nothing_left(engine)


@pytest.mark.parametrize("settings", [dict(), dict(target_reward=None)], ids=["explicit", "calibrated"])
def test_an_interrupt_while_somebody_is_told_loses_nobodys_segment(settings):
    texts = [alone(PROMPTS, 1, **settings), alone(OTHERS, 2, **settings)]
    for when in range(1, 14, 3):
        engine, calls = make_engine(), itertools.count(1)

        def notify(calls=calls, when=when):
            if next(calls) == when:
                raise KeyboardInterrupt

        jobs = []
        for prompts, seed in ((PROMPTS, 1), (OTHERS, 2)):
            call = engine.prepare(Arguments(prompts, CONFIG, settings, seed=seed))
            jobs.append(Job(call, None, notify=notify))
            engine.core.submit(jobs[-1])
        with pytest.raises(KeyboardInterrupt):
            while engine.core.step():
                pass
        while engine.core.step():
            pass
        for job, expected in zip(jobs, texts, strict=True):
            assert [text(job.events, i) for i in range(len(expected))] == expected
            assert sum(event.finish_reason is not None for event in job.events) == len(expected)
        assert_nothing_left(engine)


@pytest.mark.parametrize("when", range(1, 9, 2))
def test_an_interrupt_within_a_forward_pass_costs_only_the_call_it_hits(monkeypatch, when):
    engine = make_engine(tiny_reward(VOCAB, hidden=32))
    stream = engine.stream(PROMPTS, CONFIG, seed=1)
    events = [next(stream)]
    forward, calls = engine.policy.forward, itertools.count(1)

    def interrupted(*args, **kwargs):
        output = forward(*args, **kwargs)
        if next(calls) == when:
            raise KeyboardInterrupt
        return output

    monkeypatch.setattr(engine.policy, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(OTHERS, CONFIG, seed=2)
    events += stream
    expected = make_engine(tiny_reward(VOCAB, hidden=32)).generate(PROMPTS, CONFIG, seed=1).completions
    assert [text(events, i) for i in range(3)] == expected
    assert_nothing_left(engine)


# Opening and closing


def test_a_closed_engine_refuses_and_ends_what_is_under_way():
    engine = make_engine()
    stream = engine.stream(PROMPTS, CONFIG, seed=1)
    next(stream)
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        list(stream)
    assert_nothing_left(engine)
    with pytest.raises(RuntimeError, match="this engine is closed: make a new one"):
        engine.generate(PROMPTS, CONFIG, seed=1)
    engine.close()


def test_a_session_opens_only_where_nobody_generates_and_refuses_what_is_too_large():
    engine = make_engine()
    size = Size(length=40, slots=60, holders=4, rows=4, segment_length=4, max_new_tokens=20)
    stream = engine.stream(PROMPTS, CONFIG, seed=1)
    next(stream)
    with pytest.raises(RuntimeError, match="is generating"):
        engine.core.hold(size)
    stream.close()
    engine.core.hold(size)
    assert engine.generate(PROMPTS, CONFIG, seed=1).completions == alone(PROMPTS, 1)
    assert engine.core.loop is not None, "held open"
    with pytest.raises(ValueError, match=r"has up to 214 tokens with its answer.*this session takes max_model_len=40"):
        engine.generate(LONG, CONFIG, seed=1)
    engine.core.let_go()
    assert engine.generate(LONG, CONFIG, seed=1).completions == alone(LONG, 1)
    assert_nothing_left(engine)


def test_a_forked_child_finds_an_engine_of_its_own(monkeypatch):
    engine = make_engine()
    stream = engine.stream(PROMPTS, CONFIG, seed=1)
    next(stream)
    engine.core._process -= 1  # as a child sees it
    assert engine.generate(OTHERS, CONFIG, seed=2).completions == alone(OTHERS, 2)
    assert torch.is_grad_enabled()
    assert_nothing_left(engine)


def test_a_session_that_is_idle_holds_no_prompt():
    """But for what it keeps on purpose, because others may begin alike."""
    engine = make_engine(tiny_reward(VOCAB, hidden=32))
    engine.core.hold(Size(length=40, slots=60, holders=4, rows=4, segment_length=4, max_new_tokens=20))
    engine.generate(PROMPTS, CONFIG, seed=1)
    assert engine.policy.tree.live_slots == 0
    engine.core.let_go()
    assert_nothing_left(engine)

"""Many callers share one core: everybody's text is what it is alone, and nobody's end costs anybody anything."""

import asyncio
import gc
import random
import threading
import time
from contextlib import suppress

import pytest
from conftest import sum_reward, tiny_policy, tiny_reward

from stars_fast import AsyncStarsEngine, QueueFull, StarsConfig, StarsEngine
from stars_fast.async_engine import usage_at, was_refused
from stars_fast.methods import RSD, BestOfN, BlockwiseBestOfN, PersonaJudge

VOCAB = 32
BASE = dict(segment_length=4, max_attempts=6, max_new_tokens=12, target_reward=1.5, base_reward=0.0, beta=0.6)
SYSTEM = [(3 * i + i * i) % (VOCAB - 1) for i in range(40)]
KINDS = [
    {},
    dict(segment_length=7, temperature=0.7, top_k=9),
    dict(method="cards", max_new_tokens=10, top_p=0.9),
    dict(method=BlockwiseBestOfN(n=3), num_return_sequences=2, target_reward=None, base_reward=None),
    dict(target_reward=None, base_reward=None, max_new_tokens=8),  # calibrated by pilots of its own
    dict(method="vanilla", repetition_penalty=1.3, target_reward=None, base_reward=None),
    dict(finished_threshold="ramp", ignore_eos=True),
    dict(method=BestOfN(n=3), eos_token_id=[3, 7], target_reward=None, base_reward=None),
]
OTHERS = [
    dict(method="treebon", target_reward=None, base_reward=None),
    dict(method="args", target_reward=None, base_reward=None),
    dict(method="rejection_sampling", max_attempts=4),
    dict(method=PersonaJudge(draft_prompt=[4, 5], judge_prompt=[6]), target_reward=None, base_reward=None),
]


def config(kind) -> StarsConfig:
    return StarsConfig(**{**BASE, **kind})


def jobs(kinds, count):
    return [
        (SYSTEM * (i % 3 == 0) + [i % 29, (7 * i) % 31], config(kinds[i % len(kinds)]), 50 + i) for i in range(count)
    ]


@pytest.fixture(scope="module")
def engine():
    return StarsEngine(tiny_policy(VOCAB, hidden=32), tiny_reward(VOCAB, hidden=32))


def alone(engine, wanted):
    return [engine.generate([prompt], settings, seed=[seed]).completions for prompt, settings, seed in wanted]


async def answer(shared, prompt, settings, seed, **options):
    rows = {}
    async for event in shared.generate(prompt, settings, seed=seed, **options):
        rows.setdefault(event.index, []).extend(event.segment.tokens if event.segment else [])
        assert event.error is None, event.error
    return [rows[row] for row in sorted(rows)]


def served(engine, wanted, callers, neighbours=(), **options):
    """What each of the wanted gets, so many of them at a time, arriving at random moments."""

    async def run():
        shared, gate, rng = AsyncStarsEngine(engine, **options), asyncio.Semaphore(callers), random.Random(0)

        async def one(job):
            async with gate:
                await asyncio.sleep(rng.random() / 50)
                return await answer(shared, *job)

        async def disturb(job):
            async for _ in shared.generate(job[0], job[1], seed=job[2]):
                break  # and that was all it wanted

        try:
            got = await asyncio.gather(*map(one, wanted), *map(disturb, neighbours))
        finally:
            shared.close()
        return got[: len(wanted)]

    return asyncio.run(run())


def nothing_held(engine) -> bool:
    trees = [engine.policy.tree, *(model.tree for model in engine.reward.tree_models)]
    return all(tree.free_slots == tree.capacity - 1 for tree in trees)


@pytest.mark.parametrize("callers", [1, 4, 16, 32])
def test_everybody_gets_the_text_it_has_alone(engine, callers):
    wanted = jobs(KINDS, 32)
    want, got = alone(engine, wanted), served(engine, wanted, callers)
    assert sum(a != b for a, b in zip(want, got, strict=True)) <= 1  # rounding may flip one in a hundred
    assert nothing_held(engine)


def test_all_kinds_of_methods_share_a_session(engine):
    wanted = jobs([*OTHERS, dict(method=RSD(draft=engine.policy.model, threshold=0.1, delimiter=None, longest=4))], 10)
    wanted = [(p, c.replace(target_reward=None, base_reward=None) if c.method == "rsd" else c, s) for p, c, s in wanted]
    assert served(engine, wanted, 10) == alone(engine, wanted)
    assert nothing_held(engine)


def test_segments_have_their_candidates_for_whoever_asks(engine):
    async def run():
        async with AsyncStarsEngine(engine) as shared:

            async def segments(trace):
                return [e.segment async for e in shared.generate([1, 2], config({}), seed=0, trace=trace)]

            return await asyncio.gather(segments(True), segments(False))

    with_them, without = asyncio.run(run())
    assert all(one.verdict for segment in with_them for one in segment.candidates)
    assert [one[:1] + one[3:5] for one in with_them] == [one[:1] + one[3:5] for one in without]  # the rest is rounded
    assert not any(one.candidates for one in without)


def test_neighbours_that_leave_and_preemption_change_no_text():
    small = StarsEngine(tiny_policy(VOCAB, hidden=32), tiny_reward(VOCAB, hidden=32), kv_cache_tokens=120)
    long = [dict(kind, max_new_tokens=40, ignore_eos=True) for kind in KINDS[:2]]  # they outgrow what they start with
    wanted, leaving = [([i, 2], config(long[i % 2]), i) for i in range(14)], jobs(KINDS[:3], 6)
    want = alone(small, wanted)
    seen = []
    small.on_heartbeat = lambda beat: seen.append(
        sum(request.terms.stats.preemptions for request in small.core.loop.admitted)
    )
    got = served(small, wanted, 14, leaving, max_model_len=80, max_segment_length=16)
    assert got == want
    assert max(seen) > 0
    assert nothing_held(small)


def test_a_storm_leaves_only_kept_prefixes(engine):
    rng = random.Random(1)

    async def storm():
        shared = AsyncStarsEngine(engine, max_waiting=400)

        async def one(i):
            prompt, settings, seed = jobs(KINDS, 300)[i]
            await asyncio.sleep(rng.random())
            options = dict(priority=rng.randrange(3), timeout=rng.choice([None, None, 0.01, 0.2]))
            with suppress(TimeoutError):
                left = rng.choice([1, 2, 99])
                async for _ in shared.generate(prompt, settings, f"r{i}", seed=seed, **options):
                    left -= 1
                    if not left:
                        break
                    if rng.random() < 0.1:
                        await shared.abort(f"r{rng.randrange(300)}")

        await asyncio.gather(*map(one, range(300)))
        await shared.drain()
        while engine.core.open_calls:  # who left is withdrawn after the heartbeat that is under way
            await asyncio.sleep(0.01)
        core, loop, caches = engine.core, engine.core.loop, engine.reward.caches
        with core._turn():  # the thread of the engine has put everything away
            held = len(core._callers), len(core._caller_of), len(loop.strategies), len(core._later), len(shared._jobs)
            kept = [*engine.reward._contexts], *(cache._prefixes or cache._responses or cache._runs for cache in caches)
            for tree in (engine.policy, *engine.reward.tree_models):
                tree.prefixes.clear()
            free = nothing_held(engine)
        shared.close()
        return held, kept, free, shared.metrics()["open_requests"]

    held, kept, free, open_requests = asyncio.run(storm())
    assert held == (0, 0, 0, 0, 0) and not any(kept) and free and open_requests == 0
    assert nothing_held(engine)


def test_a_system_prompt_is_read_once_while_anybody_uses_it_and_afterwards(engine):
    one_candidate = config(dict(candidates=1))

    async def run():
        shared = AsyncStarsEngine(engine)
        counted = []
        for seed in range(3):
            await answer(shared, [*SYSTEM, seed], one_candidate, seed)
            counted.append(shared.metrics()["reward_tokens"])
        shared.close()
        return counted

    first, second, third = asyncio.run(run())
    outs = [engine.generate([[*SYSTEM, seed]], one_candidate, seed=[seed]) for seed in range(3)]
    assert first == outs[0].stats["reward_tokens"]
    assert third - second == outs[2].stats["reward_tokens"] - len(SYSTEM)


def test_a_timeout_and_an_abort_end_their_request_alone(engine):
    endless = config(dict(max_new_tokens=200, ignore_eos=True, target_reward=99.0))

    async def run():
        shared = AsyncStarsEngine(engine)
        with pytest.raises(TimeoutError):
            await answer(shared, [1, 2], endless, 0, timeout=0.05)
        events = []
        async for event in shared.generate([1, 2], endless, "mine", seed=0):
            events.append(event)
            await shared.abort("mine")
        text = await answer(shared, [1, 2], config({}), 0)
        shared.close()
        return events, text

    events, text = asyncio.run(run())
    assert [event.finish_reason for event in events][-1] == "abort" and len(events) < 50
    assert text == alone(engine, [([1, 2], config({}), 0)])[0]


def test_lower_priority_numbers_are_let_in_first():
    engine = StarsEngine(tiny_policy(VOCAB), sum_reward, max_rows=1)
    ended = []

    async def run():
        shared = AsyncStarsEngine(engine)

        async def one(priority):
            await answer(shared, [1, 2], config(dict(max_new_tokens=24, ignore_eos=True)), 0, priority=priority)
            ended.append(priority)

        first = asyncio.create_task(one(9))
        await asyncio.sleep(0.02)  # it runs by now
        await asyncio.gather(first, *(one(priority) for priority in (5, 3, 4)))
        shared.close()

    asyncio.run(run())
    assert [priority for priority in ended if priority != 9] == [3, 4, 5]


def test_what_is_refused_leaves_no_reservation(engine):
    async def run():
        shared = AsyncStarsEngine(engine, max_model_len=40, max_segment_length=8, max_waiting=2)
        for prompt, kind, error, named in [
            ([99], {}, ValueError, "99"),
            ([1] * 60, {}, ValueError, "max_model_len"),
            ([1], dict(segment_length=9, max_new_tokens=9), ValueError, "max_segment_length"),
            ("text", {}, ValueError, "tokenizer"),
        ]:
            with pytest.raises(error, match=named):
                await answer(shared, prompt, config(kind), 0)
        shared.reserve(2)
        with pytest.raises(QueueFull, match="max_waiting=2"):
            await answer(shared, [1], config({}), 0)
        shared.release()
        await answer(shared, [1], config({}), 0)
        shared.reserve()
        got = await answer(shared, [1], config({}), 0, reserved=True)
        metrics = shared.metrics()
        shared.close()
        with pytest.raises(RuntimeError, match="closed"):
            await answer(shared, [1], config({}), 0)
        return got, metrics

    got, metrics = asyncio.run(run())
    assert got == alone(engine, [([1], config({}), 0)])[0]
    assert metrics["open_requests"] == 1 and metrics["running"] == metrics["waiting"] == 0


@pytest.mark.parametrize("closing", ["asyncio.run", "loop.close"])
def test_a_reader_that_breaks_off_as_its_event_loop_ends_leaves_nothing_open(engine, closing):
    shared = AsyncStarsEngine(engine, max_waiting=1)

    async def break_off():
        async for _ in shared.generate([1, 2], config(dict(max_new_tokens=200, ignore_eos=True)), "mine", seed=0):
            break

    for _ in range(2):  # the second has the first's name and its place
        if closing == "asyncio.run":
            asyncio.run(break_off())
        else:
            loop = asyncio.new_event_loop()
            loop.run_until_complete(break_off())
            loop.close()
        gc.collect()
    until = time.monotonic() + 10
    while (metrics := shared.metrics())["running"] and time.monotonic() < until:
        time.sleep(0.01)
    shared.close()
    assert metrics["open_requests"] == metrics["running"] == 0
    assert metrics["committed_tokens"] < 2 * 200 and nothing_held(engine), "neither was drawn to its end"


def test_a_session_as_a_context_lets_requests_end_and_ends_them_where_something_was_raised(engine):
    async def leave(error):
        try:
            async with AsyncStarsEngine(engine) as shared:
                task = asyncio.create_task(answer(shared, [1, 2], config({}), 0))
                await asyncio.sleep(0.01)
                if error is not None:
                    raise error
        except ArithmeticError:
            pass
        return (await asyncio.gather(task, return_exceptions=True))[0]

    assert asyncio.run(leave(None)) == alone(engine, [([1, 2], config({}), 0)])[0]
    assert isinstance(asyncio.run(leave(ArithmeticError())), RuntimeError)
    assert nothing_held(engine) and engine.core.loop is None


def test_draining_ends_what_is_open_and_takes_no_more(engine):
    async def run():
        shared = AsyncStarsEngine(engine)
        task = asyncio.create_task(answer(shared, [1, 2], config({}), 0))
        while not shared.metrics()["open_requests"]:
            await asyncio.sleep(0)
        await shared.drain()
        with pytest.raises(RuntimeError, match="draining"):
            await answer(shared, [1, 2], config({}), 0)
        shared.close()
        return await task

    assert asyncio.run(run()) == alone(engine, [([1, 2], config({}), 0)])[0]


def test_a_reward_that_raises_costs_those_it_raises_for_alone():
    from stars_fast.rewards import CallableReward

    class Fragile(CallableReward):
        broken = None

        def commit(self, completion):
            if completion.response.prompt.source == self.broken:
                raise RuntimeError("commit is broken")

    def picky(prompts, completions):
        values = zip(prompts, sum_reward(completions), strict=True)
        return [ValueError("not this one") if prompt == [13] else value for prompt, value in values]

    reward = Fragile(picky)
    engine = StarsEngine(tiny_policy(VOCAB), reward)

    async def run():
        shared = AsyncStarsEngine(engine)
        good, bad = await asyncio.gather(
            answer(shared, [1, 2], config({}), 0), answer(shared, [13], config({}), 0), return_exceptions=True
        )
        reward.broken = [1]
        all_of_them = await asyncio.gather(
            *(answer(shared, [i], config({}), 0) for i in range(3)), return_exceptions=True
        )
        reward.broken = None
        afterwards = await answer(shared, [1, 2], config({}), 0)
        shared.close()
        return good, bad, all_of_them, afterwards

    good, bad, all_of_them, afterwards = asyncio.run(run())
    assert good == afterwards == alone(engine, [([1, 2], config({}), 0)])[0]
    assert isinstance(bad, AssertionError)
    assert [isinstance(one, AssertionError) and "commit is broken" in str(one) for one in all_of_them] == [0, 1, 0]


def test_calls_of_the_engine_itself_are_served_beside_a_session(engine):
    wanted = jobs(KINDS, 4)
    want = alone(engine, wanted)

    async def run():
        shared = AsyncStarsEngine(engine)
        calls = [asyncio.to_thread(engine.generate, [p], c, seed=[s]) for p, c, s in wanted]
        together = await asyncio.gather(*(answer(shared, *job) for job in wanted), *calls)
        shared.close()
        return together

    got = asyncio.run(run())
    assert got[:4] == want and [out.completions for out in got[4:]] == want


def test_a_call_beside_a_busy_session_is_let_in(engine):
    endless = config(dict(max_new_tokens=200, ignore_eos=True, target_reward=99.0))
    beats = []

    async def run():
        shared = AsyncStarsEngine(engine)
        busy = [asyncio.create_task(answer(shared, [i], endless, i)) for i in range(2)]
        while shared.metrics()["running"] < 2:
            await asyncio.sleep(0.01)
        engine.on_heartbeat = beats.append
        out = await asyncio.wait_for(asyncio.to_thread(engine.generate, [[1, 2]], config({}), seed=[0]), 30)
        engine.on_heartbeat = None
        open_still = not any(task.done() for task in busy)
        shared.close()
        await asyncio.gather(*busy, return_exceptions=True)
        return out, open_still

    out, open_still = asyncio.run(run())
    assert open_still and out.completions == alone(engine, [([1, 2], config({}), 0)])[0]
    segments, attempts = len(out.segments[0]), sum(segment.attempts for segment in out.segments[0])
    assert len(beats) <= segments + attempts + 4  # it waited for two or so, and was there in the others


def test_an_abort_and_a_death_reach_who_is_still_being_read(engine, monkeypatch):
    prepare = type(engine).prepare
    monkeypatch.setattr(type(engine), "prepare", lambda *args: time.sleep(0.2) or prepare(*args))

    async def run():
        shared = AsyncStarsEngine(engine)
        events = []

        async def take(name):
            async for event in shared.generate([1, 2], config({}), name, seed=0):
                events.append(event.finish_reason)

        task = asyncio.create_task(take("mine"))
        await asyncio.sleep(0.05)
        await shared.abort("mine")
        await task
        late = asyncio.create_task(take("late"))
        await asyncio.sleep(0.05)
        shared.close()
        with pytest.raises(RuntimeError, match="closed"):
            await asyncio.wait_for(late, 10)
        return events

    assert asyncio.run(run()) == ["abort"]
    assert nothing_held(engine)


def test_metrics_add_up(engine):
    endless = config(dict(max_new_tokens=200, ignore_eos=True, target_reward=99.0))

    async def run():
        shared = AsyncStarsEngine(engine)
        await asyncio.gather(*(answer(shared, [i], config({}), i) for i in range(4)))
        async for _ in shared.generate([1], endless, seed=0):
            break
        while engine.core.open_calls:
            await asyncio.sleep(0.01)
        metrics = shared.metrics()
        shared.close()
        return metrics

    metrics = asyncio.run(run())
    assert metrics["policy_tokens"] == metrics["committed_tokens"] + metrics["discarded_tokens"] > 0
    assert sum(metrics["rows"].values()) == sum(metrics["requests"].values()) == metrics["heartbeats"]
    assert metrics["open_requests"] == metrics["running"] == metrics["waiting"] == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_ends_the_thread_reaches_callers_as_an_error():
    """A panic in their event loop would end that, and with it the server."""

    class Panic(BaseException):
        pass

    def reward(completions):
        raise Panic("in Rust")

    shared = AsyncStarsEngine(StarsEngine(tiny_policy(VOCAB), reward))
    with pytest.raises(RuntimeError, match="the engine's thread has died: Panic"):
        asyncio.run(answer(shared, [3], config({}), 1))
    assert isinstance(shared.dead, Panic)
    with pytest.raises(RuntimeError, match="the engine's thread has died"):
        asyncio.run(answer(shared, [3], config({}), 1))
    shared.close()


def test_each_caller_is_told_of_the_end_by_an_error_of_its_own(engine):
    """What a request has cost is on its error."""

    async def run():
        shared = AsyncStarsEngine(engine)
        endless = config(dict(max_new_tokens=200, ignore_eos=True, target_reward=99.0))
        open_ = [asyncio.create_task(answer(shared, [1] * length, endless, 0)) for length in (3, 5)]
        while shared.metrics()["running"] < 2:
            await asyncio.sleep(0.01)
        shared.close()
        return await asyncio.gather(*open_, return_exceptions=True)

    first, second = asyncio.run(run())
    assert str(first) == str(second) == "this engine was closed"
    assert [usage_at(error)["prompt_tokens"] for error in (first, second)] == [3, 5]


def test_whoever_is_refused_can_tell_before_the_engines_thread_has_come_so_far(engine, monkeypatch):
    def refuse(job):
        error = ValueError("no room")
        job.end(error)
        time.sleep(0.3)
        raise error

    async def run():
        async with AsyncStarsEngine(engine) as shared:
            monkeypatch.setattr(engine.core, "submit", refuse)
            with pytest.raises(ValueError, match="no room") as refused:
                await answer(shared, [1, 2], config({}), 0)
            return was_refused(refused.value)

    assert asyncio.run(run())


def test_draining_waits_for_requests_and_not_for_whoever_has_left_off_reading(engine):
    async def run():
        async with AsyncStarsEngine(engine) as shared:
            events = shared.generate([1, 2], config({}), seed=0)
            first = await anext(events)
        return [first, *[event async for event in events]]

    read = asyncio.run(asyncio.wait_for(run(), 20))
    assert read[-1].finish_reason in ("stop", "length")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("how", ["closed", "dead"])
def test_a_request_that_comes_in_as_the_thread_ends_ends_with_it(monkeypatch, how):
    """It is put in behind the last look at whether the thread lives; nor may it take away what the thread waits for."""
    asked, go_on = threading.Event(), threading.Event()

    def reward(completions):
        asked.set()
        assert go_on.wait(20)
        if how == "dead":
            raise SystemExit
        return sum_reward(completions)

    shared = AsyncStarsEngine(StarsEngine(tiny_policy(VOCAB), reward))
    closing = threading.Thread(target=shared.close, daemon=True)

    async def run():
        first = asyncio.create_task(answer(shared, [3], config({}), 1))
        assert await asyncio.to_thread(asked.wait, 20)
        monkeypatch.setattr(shared, "_check_alive", end_behind_the_look)
        second = asyncio.create_task(answer(shared, [4], config({}), 1))
        await asyncio.wait([second], timeout=20)
        go_on.set()
        return await asyncio.wait_for(asyncio.gather(first, second, return_exceptions=True), 20)

    def end_behind_the_look():
        if len(shared._jobs) < 2:  # when it is called
            return
        if how == "dead":
            go_on.set()
            shared._thread.join(20)
        else:
            closing.start()
            while shared._inbox.empty():  # until the thread's end is in it
                time.sleep(0.001)

    errors = asyncio.run(run())
    assert all(isinstance(error, RuntimeError) and how in str(error).replace("died", "dead") for error in errors)
    if how == "dead":
        closing.start()
    closing.join(20)
    assert not closing.is_alive() and not shared._thread.is_alive()


@pytest.mark.parametrize("what", ["generate", "close", "the engine's generate", "the engine's close"])
@pytest.mark.filterwarnings("ignore:no request succeeded")
def test_an_async_reward_cannot_wait_for_its_own_engine(what):
    async def reward(completions):
        if what == "generate":
            await answer(shared, [4], config({}), 1)
        elif what == "close":
            shared.close()
        elif what == "the engine's close":
            engine.close()
        else:
            engine.generate([[4]], config({}))
        return sum_reward(completions)

    engine = StarsEngine(tiny_policy(VOCAB), reward)
    shared = AsyncStarsEngine(engine)
    with pytest.raises((AssertionError, RuntimeError), match=r"generating|closed"):
        asyncio.run(asyncio.wait_for(answer(shared, [3], config({}), 1), 20))
    closing = threading.Thread(target=shared.close, daemon=True)
    closing.start()
    closing.join(20)
    assert not closing.is_alive() and not shared._thread.is_alive()

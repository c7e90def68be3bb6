"""What travels to other processes, by pickle, copy or fork, and what stays and says so."""

import asyncio
import copy
import functools
import multiprocessing
import os
import pickle
import signal
import threading
from collections import Counter
from dataclasses import fields, is_dataclass

import datasets
import pytest
import torch
from conftest import sum_reward, tiny_policy, tiny_reward, tiny_tokenizer, word_reward
from datasets.fingerprint import Hasher

import stars_fast
from stars_fast import AsyncStarsEngine, QueueFull, StarsConfig, StarsEngine, methods, rewards
from stars_fast._C import SlotsExhausted
from stars_fast.calibration import Calibration
from stars_fast.loop.pilot import Pilot
from stars_fast.outputs import SegmentEvent, SegmentTrace, StarsOutput, Stats

CONFIG = StarsConfig(segment_length=2, max_new_tokens=6, max_attempts=4, target_reward=0.5, ignore_eos=True)
PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


@pytest.fixture(scope="module")
def engine(policy32):
    return StarsEngine(policy32, tiny_reward(32), tokenizer=tiny_tokenizer(32))


# What stays


def staying(engine):
    judge = rewards.JudgeReward(tiny_policy(32), engine.tokenizer, yes="w4", no="w5")
    return [engine, engine.core, engine.policy, engine.reward, judge]


def test_what_holds_trees_says_how_to_have_it_elsewhere(engine):
    opened = AsyncStarsEngine(StarsEngine(engine.policy.model, sum_reward))
    try:
        for one in [*staying(engine), opened, rewards.WeightedSum([(1.0, engine.reward)])]:
            name = type(one).__name__.replace("WeightedSum", "ClassifierReward")
            for copied in (copy.copy, copy.deepcopy, pickle.dumps, lambda one: pickle.dumps({"in": [one]}, 2)):
                if copied is copy.copy and isinstance(one, rewards.WeightedSum):
                    continue  # the copy shares its parts
                with pytest.raises(TypeError, match=rf"^a {name} cannot be .* build the engine from paths inside each"):
                    copied(one)
    finally:
        opened.close()


def test_scorers_without_trees_travel(engine):
    rules = rewards.RuleReward({"w5": 1.0})
    plain = [rules, rewards.CallableReward(word_reward, engine.tokenizer), rewards.WeightedSum([(2.0, rules)])]
    for reward in plain:
        want = StarsEngine(engine.policy.model, reward, tokenizer=engine.tokenizer).generate(["w5"], CONFIG, seed=0)
        for twin in (copy.deepcopy(reward), pickle.loads(pickle.dumps(reward))):
            other = StarsEngine(engine.policy.model, twin, tokenizer=engine.tokenizer)
            assert other.generate(["w5"], CONFIG, seed=0).completions == want.completions
    probe = pickle.loads(pickle.dumps(rewards.HiddenStateProbe(torch.nn.Linear(32, 1))))
    assert StarsEngine(engine.policy.model, probe).generate([[5]], CONFIG, seed=0).errors == [None]


def test_a_model_with_an_engine_of_the_drop_in_travels_without_it():
    policy = tiny_policy(32)
    settings = {"reward_model": tiny_reward(32), "stars_config": CONFIG, "pad_token_id": 0}
    stars_fast.generate(policy, torch.tensor([[1, 2]]), **settings)
    twin = pickle.loads(pickle.dumps(policy))
    assert twin(torch.tensor([[1, 2]])).logits.equal(policy(torch.tensor([[1, 2]])).logits)


def closure(engine):
    return lambda batch: {"out": engine.generate(batch["prompt"], CONFIG, seed=0).texts}


def test_mapping_a_data_set_with_a_closure_over_an_engine(engine):
    datasets.disable_progress_bars()
    table = datasets.Dataset.from_dict({"prompt": ["w1 w2", "w3"]})
    assert len(table.map(closure(engine), batched=True, new_fingerprint="mine")["out"]) == 2
    with pytest.raises(TypeError, match="a StarsEngine cannot be pickled"):
        Hasher.hash(closure(engine))
    with pytest.raises(TypeError, match="a StarsEngine cannot be pickled"):
        table.map(closure(engine), batched=True, num_proc=2, new_fingerprint="ours")


@functools.cache
def made_from(folder):
    policy = tiny_policy(32).from_pretrained(folder)
    return StarsEngine(policy, word_reward, tokenizer=tiny_tokenizer(32))


class Completes:
    """Travels as a path."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, batch):
        return {"out": made_from(self.folder).generate(batch["prompt"], CONFIG, seed=[1] * len(batch["prompt"])).texts}


def test_an_engine_that_is_made_from_paths_maps_a_data_set_with_a_stable_fingerprint(tmp_path):
    tiny_policy(32).save_pretrained(tmp_path)
    before = Hasher.hash(Completes(str(tmp_path)))
    table = datasets.Dataset.from_dict({"prompt": ["w1 w2", "w3"]})
    one = table.map(Completes(str(tmp_path)), batched=True)
    assert Hasher.hash(Completes(str(tmp_path))) == before  # though the engine has been made
    again = table.map(Completes(str(tmp_path)), batched=True)
    assert again._fingerprint == one._fingerprint != table._fingerprint
    made_from.cache_clear()
    two = table.map(Completes(str(tmp_path)), batched=True, num_proc=2, load_from_cache_file=False)
    assert two["out"][:] == one["out"][:]


# What travels


def travelling(engine):
    trace = SegmentTrace([1, 2], 0.5, 0.25, 3, True, -1.5, {"a": 1.0})
    configs = [
        CONFIG.replace(method=method)
        for name, kind in methods.METHODS.items()
        for method in (name, kind(longest=9) if name in ("cards", "rsd") else kind())
    ]
    return [
        *configs,
        CONFIG.replace(target_reward=[1.0, 2.0], eos_token_id=[1], stop_strings=["a"], method=methods.BestOfN(n=3)),
        methods.PersonaJudge(draft_prompt=[1, 2]),
        trace,
        SegmentEvent(1, 0, 1, trace, "text", "stop"),
        SegmentEvent(0, 0, 0, None, None, "error", "why"),
        Stats(policy_tokens=3, rows=Counter({2: 1})),
        engine.generate(["w1 w2"], CONFIG, seed=0),
        stars_fast.StarsGenerateOutput(sequences=torch.tensor([[1]]), rewards=torch.tensor([0.5]), stats={"a": 1}),
        stars_fast.calibrate(engine, ["w1"], config=CONFIG.replace(target_reward=None), seed=0),
        Pilot([[(2, 0.5)]]),
    ]


def same(one, other):
    if isinstance(one, torch.Tensor):
        return one.equal(other)
    if isinstance(one, (Stats, StarsOutput, Calibration)) or (is_dataclass(one) and not isinstance(one, dict)):
        return type(one) is type(other) and all(same(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or (one != one and other != other)


def test_settings_outputs_and_events_are_equal_after_a_copy_or_pickle(engine):
    for one in travelling(engine):
        assert same(copy.deepcopy(one), one) and same(copy.copy(one), one)
        for protocol in PROTOCOLS:
            assert same(pickle.loads(pickle.dumps(one, protocol)), one), (type(one).__name__, protocol)


def test_settings_outputs_and_events_come_back_equal_from_a_fresh_process(engine):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        things = travelling(engine)
        back = pool.map(copy.deepcopy, things)
    assert all(map(same, back, things))


def test_exceptions_of_ours_survive_pickling():
    for error in (QueueFull("3 requests"), SlotsExhausted("none")):
        twin = pickle.loads(pickle.dumps(error))
        assert type(twin) is type(error) and str(twin) == str(error) and vars(twin) == vars(error)


# What a forked child finds


def in_child(work):
    """What ``work`` returns, or the error it raises, in a fork of this process."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(30)
        try:
            said = work()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writer, pickle.dumps(said))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    assert said, "the child did not end by itself"
    return pickle.loads(said)


def texts(engine):
    return engine.generate(["w1 w2", "w3"], CONFIG, seed=0).completions


def test_a_forked_child_ends_the_stream_that_was_open_and_begins_anew(engine):
    want = texts(engine)
    stream = engine.stream(["w1 w2", "w3"], CONFIG, seed=0)
    first = next(stream)

    def work():
        try:
            list(stream)
        except RuntimeError as error:
            return str(error), texts(engine)

    said, found = in_child(work)
    assert "was forked: call the engine anew" in said and found == want
    events = [first, *stream]  # the parent's goes on
    rows = [[t for e in events if e.index == row for t in e.segment.tokens] for row in range(2)]
    assert rows == want


async def answer(opened):
    return [token async for event in opened.generate("w1 w2", CONFIG, seed=7) for token in event.segment.tokens]


def test_a_session_stays_in_its_process_and_a_forked_child_opens_its_own(engine):
    opened = AsyncStarsEngine(engine)
    try:
        want = asyncio.run(answer(opened))
        said = in_child(lambda: asyncio.run(answer(opened)))
        assert said.startswith("RuntimeError: this AsyncStarsEngine stayed") and "AsyncStarsEngine(engine)" in said
        assert in_child(lambda: asyncio.run(opened.drain())) == said

        def work():
            opened.close()  # of the parent's, nothing is there to be closed
            mine = AsyncStarsEngine(engine)
            found = asyncio.run(answer(mine)), texts(engine)
            mine.close()
            return found

        assert in_child(work) == (want, texts(engine))
        assert asyncio.run(answer(opened)) == want
    finally:
        opened.close()


def test_a_child_that_is_forked_while_a_session_answers_is_not_held_up_by_it(engine):
    opened, want = AsyncStarsEngine(engine), texts(engine)
    long = CONFIG.replace(max_new_tokens=200, max_attempts=1)

    async def busy():
        async for _ in opened.generate("w1", long, seed=1):
            pass

    answering = threading.Thread(target=lambda: asyncio.run(busy()))
    try:
        answering.start()
        assert [in_child(lambda: texts(engine)) for _ in range(3)] == [want] * 3
    finally:
        answering.join()
        opened.close()

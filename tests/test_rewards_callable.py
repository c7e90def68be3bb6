"""A function as the reward: called with what it takes, sync or async, and what it does wrong is told."""

import asyncio
import copy
import os
import threading
from contextlib import suppress

import pytest
import torch
from conftest import sum_reward

from stars_fast import StarsConfig, StarsEngine
from stars_fast.rewards import CallableReward, Completion, Response, RewardPrompt

CONFIG = StarsConfig(segment_length=4, max_attempts=5, target_reward=1.5, beta=0.6, max_new_tokens=14)
PROMPTS = [[5, 6, 7], [8]]


# What it is called with


def expect_same_text(policy, reward, **kwargs):
    plain = StarsEngine(policy, sum_reward).generate(PROMPTS, CONFIG, seed=0)
    out = StarsEngine(policy, reward).generate(PROMPTS, CONFIG, seed=0, **kwargs)
    assert out.completions == plain.completions


def of(completions):
    return sum_reward(completions)


SIGNATURES = {
    "completions": lambda completions: of(completions),
    "prompts, completions": lambda prompts, completions: of(completions),
    "completion_ids": lambda completion_ids: of(completion_ids),
    "prompts, **kwargs": lambda prompts, **kwargs: of(kwargs["completions"]),
    "positional only": lambda prompts, completions, /: of(completions),
    "keyword only": lambda *, completion_ids, prompts: of(completion_ids),
    "defaults": lambda completions, trainer_state=None, log_extra=None: of(completions),
    "a column": lambda completions, bonus: [r + b for r, b in zip(of(completions), bonus, strict=True)],
}


@pytest.mark.parametrize("signature", SIGNATURES)
def test_a_function_is_called_with_what_it_takes(policy32, signature):
    expect_same_text(policy32, SIGNATURES[signature], columns={"bonus": [0.0, 0.0], "unused": ["a", "b"]})


def recorded(signature, policy, **arguments):
    """Every call of a reward with these parameters, by keyword, and the output."""
    calls = []

    def note(values):
        calls.append(values)
        return sum_reward(values["completion_ids" if "completion_ids" in values else "completions"])

    scope = {"note": note}
    exec(f"def reward({signature}):\n    return note(locals())", scope)
    columns = {"answer": ["x", "y"], "other": [1, 2]}
    out = StarsEngine(policy, scope["reward"], **arguments).generate(PROMPTS, CONFIG, seed=0, columns=columns)
    assert calls and out.errors == [None] * 2
    return calls, out


@pytest.mark.parametrize(
    ("signature", "names"),
    [
        ("completions", {"completions"}),
        ("prompts, completions", {"prompts", "completions"}),
        ("completion_ids", {"completion_ids"}),
        ("prompts, completions, completion_ids", {"prompts", "completions", "completion_ids"}),
        ("completions, answer", {"completions", "answer"}),
        ("*, completions, other=None", {"completions", "other"}),
    ],
)
def test_a_function_gets_only_the_keywords_it_can_take(policy32, signature, names):
    calls, _ = recorded(signature, policy32)
    assert all(call.keys() == names and len(set(map(len, call.values()))) == 1 for call in calls)


def test_a_function_of_any_keywords_gets_them_all(policy32):
    calls, _ = recorded("completions, **others", policy32)
    for call in calls:
        assert call["others"].keys() == {"prompts", "completion_ids", "answer", "other"}
        assert {len(values) for values in call["others"].values()} == {len(call["completions"])}


def test_without_a_tokenizer_a_function_gets_ids(policy32):
    calls, out = recorded("prompts, completions, completion_ids", policy32)
    assert all(call["completions"] == call["completion_ids"] for call in calls)
    assert all(prompt in PROMPTS for call in calls for prompt in call["prompts"])
    seen = [completion for call in calls for completion in call["completions"]]
    assert all(isinstance(token, int) for completion in seen for token in completion)
    assert all(completion in seen for completion in out.completions)


def test_with_a_tokenizer_a_function_gets_texts(policy32, tokenizer32):
    calls, out = recorded("prompts, completions, completion_ids", policy32, tokenizer=tokenizer32)
    assert {prompt for call in calls for prompt in call["prompts"]} == set(tokenizer32.batch_decode(PROMPTS))
    for call in calls:
        assert call["completions"] == tokenizer32.batch_decode(call["completion_ids"], skip_special_tokens=True)
    assert set(out.texts) <= {completion for call in calls for completion in call["completions"]}


def test_an_object_that_can_be_called_is_a_function(policy32):
    class Scorer:
        def __call__(self, completions):
            return sum_reward(completions)

    expect_same_text(policy32, Scorer())


def test_columns_reach_the_completions_of_their_prompt(policy32):
    seen = set()

    def reward(prompts, completions, answer):
        seen.update((tuple(prompt), value) for prompt, value in zip(prompts, answer, strict=True))
        return sum_reward(completions)

    expect_same_text(policy32, reward, columns={"answer": ["x", "y"]})
    assert seen == {((5, 6, 7), "x"), ((8,), "y")}


def test_callers_with_different_columns_are_asked_apart_and_nobody_of_them_one_by_one():
    calls = []

    def reward(completions, bonus=None, **columns):
        calls.append((len(completions), sorted(columns.keys() - {"prompts", "completion_ids"})))
        return [float(len(c)) + (bonus[i] if bonus else 0.0) for i, c in enumerate(completions)]

    columns = [{"bonus": 0.5}, {"other": "x"}, {}, {"bonus": 0.25}, {"other": "y"}]
    prompts = [RewardPrompt(i, [1], [1], columns=own) for i, own in enumerate(columns)]
    completions = [Completion(Response(prompt), [2] * (i + 1)) for i, prompt in enumerate(prompts)]
    assert CallableReward(reward).score(completions) == [1.5, 2.0, 3.0, 4.25, 5.0]
    assert calls == [(2, []), (2, ["other"]), (1, [])]
    calls.clear()
    picky = CallableReward(lambda completions, bonus=None: reward(completions, bonus))
    assert picky.score(completions) == [1.5, 2.0, 3.0, 4.25, 5.0]
    assert [count for count, _ in calls] == [2, 3], "columns that it does not take make no difference"


def test_a_prompt_that_joins_without_a_column_that_is_needed_is_refused():
    scorer = CallableReward(lambda completions, answer: 0)
    scorer.begin([], 8, 8, None)
    scorer.open([RewardPrompt(0, [1], [1], columns={"answer": 1})], 8)
    with pytest.raises(ValueError, match=r"'answer'.*columns="):
        scorer.open([RewardPrompt(0, [1], [1], columns={"answer": 1}), RewardPrompt(1, [1], [1])], 8)
    scorer.end()


@pytest.mark.parametrize(
    "reward",
    [lambda completions, answer: 0, lambda completions, answer, /: 0, lambda completions, *, answer, extra=1: 0],
    ids=["by name or place", "by place", "by name"],
)
def test_a_function_that_needs_what_nobody_gives_is_refused_before_work_starts(policy32, reward):
    engine = StarsEngine(policy32, reward)
    with pytest.raises(ValueError, match=r"'answer'.*columns="):
        engine.generate(PROMPTS, CONFIG, seed=0, columns={"other": [1, 2]})


@pytest.mark.parametrize("reward", [lambda texts: 0, lambda prompt, completion: 0, lambda p, c: 0], ids=["1", "2", "3"])
def test_a_function_with_names_of_its_own_is_told_which_it_is_called_with(policy32, reward):
    engine = StarsEngine(policy32, reward)
    with pytest.raises(ValueError, match="and none of prompts, completions and completion_ids: it is called by these"):
        engine.generate(PROMPTS, CONFIG, seed=0)


def test_optional_parameters_by_place_keep_their_places(policy32):
    def reward(prompts, bonus=0.5, completions=(), /):
        assert bonus == 0.5
        return sum_reward(completions)

    expect_same_text(policy32, reward)


def test_chats_arrive_as_message_lists(policy32, tokenizer32):
    chats = [[{"role": "user", "content": "w5 w6"}], [{"role": "user", "content": "w7"}]]
    calls = []

    def reward(prompts, completions, completion_ids):
        calls.append((prompts, completions, completion_ids))
        return sum_reward(completion_ids)

    StarsEngine(policy32, reward, tokenizer=tokenizer32).generate(chats, CONFIG, seed=0)
    for prompts, completions, ids in calls:
        assert all(prompt in chats for prompt in prompts)
        for completion, tokens in zip(completions, ids, strict=True):
            text = tokenizer32.decode(tokens, skip_special_tokens=True)
            assert completion == [{"role": "assistant", "content": text}]


def test_a_function_sees_an_answer_that_the_prompt_begins_as_from_trl(policy32, tokenizer32):
    seen = []

    def reward(prompts, completions):
        seen.extend(zip(prompts, completions, strict=True))
        return [0.0] * len(prompts)

    chat = [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7"}]
    tokenizer32 = copy.deepcopy(tokenizer32)
    tokenizer32.chat_template = "{% for m in messages %}w1 {{ m['content'] }} w2 {% endfor %}"
    out = StarsEngine(policy32, reward, tokenizer=tokenizer32).generate([chat], CONFIG, seed=0, max_new_tokens=2)
    assert out.sequences[0, :6].tolist() == [1, 5, 6, 2, 1, 7]
    assert all(prompt == chat[:1] for prompt, _ in seen)
    contents = [completion[0]["content"] for _, completion in seen]
    assert "w7" in contents and all(content.startswith("w7") for content in contents)  # the empty answer among them


def test_a_function_may_reject_for_good_and_fail_for_some(policy32):
    def reward(prompts, completions):
        if [8] in prompts:
            raise KeyError("eight")
        return [-float("inf") if 9 in c else r for c, r in zip(completions, sum_reward(completions), strict=True)]

    out = StarsEngine(policy32, reward).generate(PROMPTS, CONFIG, seed=0, num_return_sequences=4)
    assert out.errors[:4] == [None] * 4
    assert all("KeyError" in error and "eight" in error for error in out.errors[4:])
    accepted = [segment for row in out.segments for segment in row if segment.accepted]
    assert all(9 not in segment.tokens for segment in accepted)


# Async functions


def test_an_async_function_is_awaited_with_and_without_a_running_loop(policy32):
    """One event loop for a whole call of the engine, so that what is bound to a loop stays good; then it is gone."""
    loops, threads = [], []

    async def reward(completions):
        await asyncio.sleep(0)
        if asyncio.get_running_loop() not in loops:
            loops.append(asyncio.get_running_loop())
            threads.append(threading.current_thread())
        assert not torch.is_grad_enabled()
        return sum_reward(completions)

    expect_same_text(policy32, reward)
    assert len(loops) == 1

    async def notebook():
        expect_same_text(policy32, reward)

    asyncio.run(notebook())
    assert len(loops) == 2
    assert all(loop.is_closed() for loop in loops) and not any(thread.is_alive() for thread in threads)


def test_an_async_function_can_be_scored_outside_a_call_of_the_engine():
    async def reward(completions):
        await asyncio.sleep(0)
        return sum_reward(completions)

    scorer = CallableReward(reward)
    for _ in range(2):
        assert scorer.score([Completion(Response(RewardPrompt(0, [1], [1])), [2, 3])]) == sum_reward([[2, 3]])
    assert not [thread for thread in threading.enumerate() if thread.name == "stars-fast-reward"]


def test_a_task_left_behind_by_an_async_function_ends_with_the_call(policy32):
    cancelled = []

    async def forever():
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    async def reward(completions):
        if not cancelled:
            tasks.append(asyncio.ensure_future(forever()))
            await asyncio.sleep(0)
        return sum_reward(completions)

    tasks = []
    expect_same_text(policy32, reward)
    assert tasks and len(cancelled) == len(tasks)


@pytest.mark.parametrize("how", ["exits", "stops its loop", "exits in a task of its own"])
def test_an_async_function_that_ends_its_loop_fails_and_does_not_hang(policy32, how):
    """The next one is asked in a loop that runs."""

    tasks = []

    async def quit():
        raise SystemExit(3)

    async def reward(prompts, completions):
        await asyncio.sleep(0)
        if [8] in prompts:
            if how == "exits":
                raise SystemExit(3)
            if how == "stops its loop":
                asyncio.get_running_loop().stop()
            else:
                tasks.append(asyncio.ensure_future(quit()))
            await asyncio.sleep(0.1)
        return sum_reward(completions)

    out = StarsEngine(policy32, reward).generate(PROMPTS, CONFIG, seed=0)
    assert all(isinstance(task.exception(), SystemExit) for task in tasks)  # looked at, so that asyncio does not log it
    plain = StarsEngine(policy32, sum_reward).generate(PROMPTS, CONFIG, seed=0)
    assert out.errors[0] is None and out.completions[0] == plain.completions[0]
    assert "raised RuntimeError: it " in out.errors[1] and ("SystemExit" in out.errors[1]) == ("exits" in how)
    assert not [thread for thread in threading.enumerate() if thread.name == "stars-fast-reward"]


def test_a_task_that_does_not_let_itself_be_cancelled_is_left_behind_with_a_warning(policy32, monkeypatch):
    enough = threading.Event()

    async def stubborn():
        while not enough.is_set():
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(0.01)

    async def reward(completions):
        if not tasks:
            tasks.append(asyncio.ensure_future(stubborn()))
        return sum_reward(completions)

    tasks = []
    monkeypatch.setattr("stars_fast.rewards.callable._PATIENCE", 0.1)
    threading.Timer(20, enough.set).start()  # so that a wait without end shows as a missing warning
    with pytest.warns(UserWarning, match="did not end within 0.1 s"):
        expect_same_text(policy32, reward)
    enough.set()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_has_a_loop_of_its_own():
    async def reward(completions):
        await asyncio.sleep(0)
        return sum_reward(completions)

    scorer, completions = CallableReward(reward), [Completion(Response(RewardPrompt(0, [1], [1])), [2, 3])]
    scorer.begin([], 8, 8, None)
    expected = scorer.score(completions)
    child = os.fork()
    if not child:
        found = []
        thread = threading.Thread(target=lambda: found.append(scorer.score(completions)), daemon=True)
        thread.start()
        thread.join(20)
        os._exit(int(found != [expected]))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert scorer.score(completions) == expected, "the parent's loop still runs"
    scorer.end()

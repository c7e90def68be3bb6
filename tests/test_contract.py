"""What a reward function, and transformers' own generate, are promised."""

import asyncio

import pytest
import torch
from conftest import refused, sum_reward, tiny_policy

import stars_fast
from stars_fast import StarsConfig, StarsEngine

VOCAB, EOS = 32, 31
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15]]
CONFIG = StarsConfig(segment_length=4, max_attempts=5, target_reward=1.5, beta=0.6, max_new_tokens=14)


@pytest.fixture(scope="module")
def engine(policy32, reward32):
    return StarsEngine(policy32, reward32)


# Reward functions


def recorded(signature, policy, **engine_arguments):
    """Run a reward with the given keyword names; return the calls it saw and the output."""
    calls = []

    def note(values):
        calls.append(values)
        return [0.0] * len(values["completions" if "completions" in values else "completion_ids"])

    scope = {"note": note}
    exec(f"def reward({signature}):\n    return note(locals())", scope)
    out = StarsEngine(policy, scope["reward"], **engine_arguments).generate(
        PROMPTS, CONFIG, seed=0, columns={"answer": ["a", "b", "c", "d"], "other": [1, 2, 3, 4]}
    )
    assert calls and out.errors == [None] * 4
    return calls, out


@pytest.mark.parametrize(
    "signature, names",
    [
        ("completions", {"completions"}),
        ("prompts, completions", {"prompts", "completions"}),
        ("completion_ids", {"completion_ids"}),
        ("prompts, completions, completion_ids", {"prompts", "completions", "completion_ids"}),
        ("completions, answer", {"completions", "answer"}),
        ("*, completions, other=None", {"completions", "other"}),
    ],
)
def test_a_callable_gets_only_the_keywords_it_can_take(policy32, signature, names):
    calls, _ = recorded(signature, policy32)
    assert all(set(call) == names for call in calls)
    assert all(len({len(values) for values in call.values()}) == 1 for call in calls)


def test_a_callable_with_var_keywords_gets_everything(policy32):
    calls, _ = recorded("completions, **kwargs", policy32)
    for call in calls:
        assert {"prompts", "completion_ids", "answer", "other"} <= set(call["kwargs"])
        assert {len(values) for name, values in call["kwargs"].items() if name in ("prompts", "answer", "other")} == {
            len(call["completions"])
        }


def test_columns_and_prompts_stay_with_their_request(policy32):
    calls, _ = recorded("prompts, completions, answer, other", policy32)
    rows = [row for call in calls for row in zip(call["prompts"], call["answer"], call["other"], strict=True)]
    assert {(tuple(prompt), answer, other) for prompt, answer, other in rows} == {
        (tuple(prompt), answer, other) for prompt, answer, other in zip(PROMPTS, "abcd", (1, 2, 3, 4), strict=True)
    }


def test_without_a_tokenizer_a_callable_gets_id_lists(policy32):
    calls, out = recorded("prompts, completions, completion_ids", policy32)
    seen = [tuple(c) for call in calls for c in call["completions"]]
    assert all(isinstance(token, int) for completion in seen for token in completion)
    assert {tuple(c) for c in out.completions} <= set(seen)
    assert all(call["completions"] == call["completion_ids"] for call in calls)


def test_with_a_tokenizer_a_callable_gets_strings(policy32, tokenizer32):
    calls, out = recorded("prompts, completions, completion_ids", policy32, tokenizer=tokenizer32)
    assert {p for call in calls for p in call["prompts"]} == set(tokenizer32.batch_decode(PROMPTS))
    for call in calls:
        decoded = [tokenizer32.decode(ids, skip_special_tokens=True) for ids in call["completion_ids"]]
        assert call["completions"] == decoded
    assert set(out.texts) <= {c for call in calls for c in call["completions"]}


def test_for_a_chat_a_callable_gets_messages_as_from_trl(policy32, tokenizer32):
    calls, chat = [], [{"role": "user", "content": "w5 w6"}]

    def reward(prompts, completions, completion_ids):
        calls.append((prompts, completions, completion_ids))
        return sum_reward(completion_ids)

    StarsEngine(policy32, reward, tokenizer=tokenizer32).generate([chat], CONFIG, seed=0)
    for prompts, completions, completion_ids in calls:
        assert prompts == [chat] * len(prompts)
        texts = tokenizer32.batch_decode(completion_ids, skip_special_tokens=True)
        assert completions == [[{"role": "assistant", "content": text}] for text in texts]


async def later(prompts, completions, **_):
    await asyncio.sleep(0)
    return sum_reward(completions)


def test_an_async_callable_is_awaited(policy32):
    expected = StarsEngine(policy32, sum_reward).generate(PROMPTS, CONFIG, seed=0)
    assert StarsEngine(policy32, later).generate(PROMPTS, CONFIG, seed=0).completions == expected.completions


def test_an_async_callable_works_inside_a_running_event_loop(policy32):
    async def notebook():
        return StarsEngine(policy32, later).generate(PROMPTS, CONFIG, seed=0)

    expected = StarsEngine(policy32, sum_reward).generate(PROMPTS, CONFIG, seed=0)
    assert asyncio.run(notebook()).completions == expected.completions


def test_an_object_with_call_is_a_callable(policy32):
    class Scorer:
        def __call__(self, completions):
            return sum_reward(completions)

    expected = StarsEngine(policy32, sum_reward).generate(PROMPTS, CONFIG, seed=0)
    assert StarsEngine(policy32, Scorer()).generate(PROMPTS, CONFIG, seed=0).completions == expected.completions


def test_reward_prompts_are_what_the_callable_sees_as_prompts(policy32):
    seen = []

    def reward(prompts, completions):
        seen.extend(map(tuple, prompts))
        return [0.0] * len(completions)

    other = [[1], [2, 2], [3], [4, 4, 4]]
    StarsEngine(policy32, reward).generate(PROMPTS, CONFIG, seed=0, reward_prompts=other)
    assert set(seen) == set(map(tuple, other))


@torch.no_grad()
def test_reward_prompts_are_what_the_classifier_reads(engine, reward32):
    other = [[1], [2, 2], [3], [4, 4, 4]]
    out = engine.generate(PROMPTS, CONFIG, seed=0, reward_prompts=other)
    for row, (ids, completion) in enumerate(zip(other, out.completions, strict=True)):
        assert out.rewards[row] == pytest.approx(reward32(torch.tensor([ids + completion])).logits.item(), abs=1e-4)
        assert out.sequences[row, : len(PROMPTS[row])].tolist() == PROMPTS[row]


# The drop-in


def padded_inputs():
    ids, mask = torch.zeros(4, 5, dtype=torch.long), torch.zeros(4, 5, dtype=torch.long)
    for row, prompt in enumerate(PROMPTS):
        ids[row, 5 - len(prompt) :], mask[row, 5 - len(prompt) :] = torch.tensor(prompt), 1
    return {"input_ids": ids, "attention_mask": mask}


def test_the_drop_in_returns_prompt_and_text_as_generate_does(policy32, reward32):
    inputs = padded_inputs()
    out = stars_fast.generate(
        policy32, **inputs, reward_model=reward32, stars_config=CONFIG, max_new_tokens=9, num_return_sequences=2
    )
    assert isinstance(out, torch.Tensor) and out.shape[0] == 8 and out.shape[1] <= 14
    assert torch.equal(out[:, :5], inputs["input_ids"].repeat_interleave(2, 0))


def test_the_drop_in_returns_rewards_and_stats_when_asked(policy32, reward32):
    out = stars_fast.generate(
        policy32, **padded_inputs(), reward_model=reward32, stars_config=CONFIG, return_dict_in_generate=True, top_k=0
    )
    assert out.sequences.shape[0] == 4 and len(out.rewards) == 4
    assert out.stats["committed_tokens"] > 0
    for row, prompt in enumerate(PROMPTS):
        completion = out.sequences[row, 5:].tolist()
        completion = completion[: completion.index(EOS) + 1] if EOS in completion else completion
        with torch.no_grad():
            fresh = reward32(torch.tensor([prompt + completion])).logits.item()
        assert float(out.rewards[row]) == pytest.approx(fresh, abs=1e-4)


def test_the_drop_in_and_the_callback_give_the_same_text(policy32, reward32):
    inputs = padded_inputs()
    torch.manual_seed(3)
    facade = stars_fast.generate(policy32, **inputs, reward_model=reward32, stars_config=CONFIG, max_new_tokens=9)
    torch.manual_seed(3)
    callback = policy32.generate(
        **inputs, do_sample=True, max_new_tokens=9, custom_generate=stars_fast.decoding(reward32, CONFIG)
    )
    assert torch.equal(facade, callback)


@pytest.mark.parametrize(
    "argument, value",
    [
        ("do_sample", False),
        ("num_beams", 2),
        ("assistant_model", "a model"),
        ("prompt_lookup_num_tokens", 3),
    ],
)
def test_the_drop_in_refuses_what_is_not_sampling(policy32, argument, value):
    value = tiny_policy(VOCAB) if argument == "assistant_model" else value
    with refused(argument):
        stars_fast.generate(
            policy32,
            input_ids=torch.tensor([[5, 6]]),
            reward_model=sum_reward,
            stars_config=CONFIG,
            **{argument: value},
        )


@pytest.mark.parametrize("argument, value", [("do_sample", False), ("num_beams", 2)])
def test_the_callback_refuses_what_is_not_sampling(policy32, argument, value):
    options = {"do_sample": True, "max_new_tokens": 8, argument: value}
    with refused(argument):
        policy32.generate(torch.tensor([[5, 6]]), custom_generate=stars_fast.decoding(sum_reward, CONFIG), **options)

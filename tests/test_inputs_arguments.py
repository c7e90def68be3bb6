"""A mistake in a call gets an error that names the argument, the value, the index and the limit, before any work."""

import math

import pytest
import torch
from conftest import refused, sum_reward, tiny_policy, tiny_reward
from tiny_tokenizers import byte_bpe

from stars_fast import StarsConfig, StarsEngine
from stars_fast.rewards import ClassifierReward, JudgeReward, WeightedSum

VOCAB = 32
PROMPTS = [[5, 6, 7], [8], [9, 10, 11], [14, 15]]
SEEDS = [1, 2, 3, 4]
CONFIG = StarsConfig(segment_length=4, max_attempts=5, target_reward=1.5, beta=0.6, max_new_tokens=14, ignore_eos=True)


@pytest.fixture(scope="module")
def engine(idle):
    return idle


def test_a_policy_on_several_processes_needs_a_seed(engine, monkeypatch):
    monkeypatch.setattr(engine.policy, "sharded", True)
    with pytest.raises(ValueError, match=r"seed is None.* sharded over processes"):
        engine.generate(PROMPTS, CONFIG)


# Configuration


def test_an_override_out_of_range_is_named_with_its_limit(engine):
    with refused("segment_length", "0", "1"):
        engine.generate(PROMPTS, CONFIG, segment_length=0)


def test_a_target_per_prompt_must_have_one_value_per_prompt(engine):
    with refused("target_reward", "3", "4"):
        engine.generate(PROMPTS, CONFIG, target_reward=[1.0, 2.0, 3.0])
    with refused(r"target_reward\[1\]", "nan"):
        engine.generate(PROMPTS, CONFIG, target_reward=[1.0, math.nan, 3.0, 4.0])
    for value in (["a", "b"], torch.zeros(2, 2)):
        with refused(r"target_reward\[0\]", "number"):
            engine.generate(PROMPTS, CONFIG, target_reward=value)
    with refused("target_reward", "sequence"):
        engine.generate(PROMPTS, CONFIG, target_reward={"a": 1.0})


def test_the_config_must_be_a_config(engine):
    with refused("config"):
        engine.generate(PROMPTS, {"beta": 0.5})


# Prompts


@pytest.mark.parametrize("prompts", [[], torch.zeros(0, 3, dtype=torch.long)], ids=["list", "tensor"])
def test_no_prompts_at_all_give_an_empty_output(engine, prompts):
    out = engine.generate(prompts, CONFIG)
    assert out.sequences.shape == (0, 0)
    assert out.completions == out.rewards == out.finish_reasons == out.errors == out.segments == []
    assert list(engine.stream(prompts, CONFIG)) == []


@pytest.mark.parametrize("token", [32, 1000, -1])
def test_ids_outside_the_vocabulary_are_named(engine, token):
    with refused(r"prompts\[1\]", str(token).strip("-"), "32"):
        engine.generate([[5], [6, token], [7]], CONFIG)
    with refused(r"prompts\[1\]", str(token).strip("-"), "32"):
        engine.generate(torch.tensor([[5, 5], [6, token]]), CONFIG)


def test_a_prompt_longer_than_the_models_positions_is_named(policy32):
    policy = tiny_policy(VOCAB, positions=20)
    engine = StarsEngine(policy, sum_reward)
    with refused(r"prompts\[1\]", "7", "14", "20"):
        engine.generate([[5], [6] * 7, [7]], CONFIG)
    out = engine.generate([[5], [6] * 6], CONFIG)  # the last that fits
    assert [len(c) for c in out.completions] == [14, 14]


def test_a_prompt_longer_than_the_reward_models_positions_is_named(policy32):
    engine = StarsEngine(policy32, tiny_reward(VOCAB, positions=20))
    with refused("reward", r"(reward_)?prompts\[1\]", "20"):
        engine.generate([[5], [6] * 7, [7]], CONFIG)


def test_a_prompt_that_cannot_fit_the_slots_is_named(policy32):
    engine = StarsEngine(policy32, sum_reward, kv_cache_tokens=40)
    with refused(r"prompts\[1\]", "kv_cache_tokens", "40"):
        engine.generate([[5], [6] * 30, [7]], CONFIG)
    assert engine.generate([[5]], CONFIG).errors == [None]


@pytest.mark.parametrize("name", ["max_rows", "kv_cache_tokens"])
@pytest.mark.parametrize("value", [0, -1, 2.5])
def test_limits_of_the_engine_must_be_positive_integers(policy32, name, value):
    with refused(name, str(value).strip("-")):
        StarsEngine(policy32, sum_reward, **{name: value})


# What goes with the prompts


def test_seeds_must_be_integers_one_per_prompt(engine):
    with refused("seed", "3", "4"):
        engine.generate(PROMPTS, CONFIG, seed=[1, 2, 3])
    with refused("seed"):
        engine.generate(PROMPTS, CONFIG, seed="lucky")
    with refused(r"seed\[2\]"):
        engine.generate(PROMPTS, CONFIG, seed=[1, 2, 2.5, 3])
    with refused(r"seed\[0\]"):
        engine.generate(PROMPTS, CONFIG, seed=torch.ones(4))


def test_columns_and_reward_prompts_must_have_one_entry_per_prompt(engine):
    with refused("columns", ".?answer.?", "3", "4"):
        engine.generate(PROMPTS, CONFIG, columns={"answer": [1, 2, 3]})
    for values in ((n for n in range(4)), {0: 1, 1: 2, 2: 3, 3: 4}, "four", torch.tensor(4)):
        with refused("columns", ".?answer.?", type(values).__name__):
            engine.generate(PROMPTS, CONFIG, columns={"answer": values})
    with refused("columns", "list", "mapping"):
        engine.generate(PROMPTS, CONFIG, columns=["a", "b"])
    with refused("reward_prompts", "3", "4"):
        engine.generate(PROMPTS, CONFIG, reward_prompts=[[1], [2], [3]])


def test_reward_prompts_are_checked_like_prompts(policy32, reward32):
    engine = StarsEngine(policy32, reward32)
    with refused(r"reward_prompts\[1\]", "99", "32"):
        engine.generate(PROMPTS, CONFIG, reward_prompts=[[1], [99], [3], [4]])
    with refused(r"reward_prompts\[2\]", "empty"):
        engine.generate(PROMPTS, CONFIG, reward_prompts=[[1], [9], [], [4]])


def test_columns_cannot_shadow_what_the_reward_is_called_with(engine):
    with refused("columns", ".?completions.?"):
        engine.generate(PROMPTS, CONFIG, columns={"completions": [1, 2, 3, 4]})


def test_on_error_takes_two_values(engine):
    with refused("on_error", ".?ignore.?", ".?return.?", ".?raise.?"):
        engine.generate(PROMPTS, CONFIG, on_error="ignore")


def test_stream_refuses_when_called_not_when_read(engine):
    with refused(r"prompts\[1\]", "empty"):
        engine.stream([[5], []], CONFIG)


def needs_an_answer(completions, answer):
    return sum_reward(completions)


@pytest.mark.parametrize(
    "reward, parts",
    [
        (ClassifierReward(tiny_reward(VOCAB, positions=20)), (r"prompts\[1\]", "20")),
        (WeightedSum([(1.0, ClassifierReward(tiny_reward(VOCAB, positions=20)))]), (r"prompts\[1\]", "20")),
        (needs_an_answer, ("the reward function", ".?answer.?")),
    ],
    ids=["classifier", "weighted sum", "function"],
)
def test_stream_refuses_what_the_reward_cannot_score_when_called(policy32, reward, parts):
    with refused(*parts):
        StarsEngine(policy32, reward).stream([[5], [6] * 7], CONFIG)


def test_a_call_that_is_refused_leaves_a_running_one_alone(policy32, tokenizer32):
    """Though it is of another engine, by whose tokenizer the same scorer would render otherwise."""
    scorer = JudgeReward(tiny_policy(VOCAB), tokenizer32, yes="w4", no="w5", template="w1 {answer} w2")
    other = StarsEngine(policy32, scorer, tokenizer=byte_bpe(300))
    alone = StarsEngine(policy32, scorer, tokenizer=tokenizer32).generate(["w5 w6"], CONFIG, seed=3)
    events = StarsEngine(policy32, scorer, tokenizer=tokenizer32).stream(["w5 w6"], CONFIG, seed=3)
    tokens = list(next(events).segment.tokens)
    other.stream([[1, 2]], CONFIG)
    assert tokens + [token for event in events for token in event.segment.tokens] == alone.completions[0]

"""A mistake gets an error that names the argument, the value, the index and the limit, and costs no other request."""

import math
import warnings

import pytest
import torch
from conftest import sum_reward, tiny_config, tiny_policy, tiny_reward
from test_rewards import byte_bpe
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from stars_fast import StarsConfig, StarsEngine
from stars_fast.rewards import ClassifierReward, JudgeReward, Reward, WeightedSum

VOCAB = 32
PROMPTS = [[5, 6, 7], [8], [9, 10, 11], [14, 15]]
SEEDS = [1, 2, 3, 4]
CONFIG = StarsConfig(segment_length=4, max_attempts=5, target_reward=1.5, beta=0.6, max_new_tokens=14, ignore_eos=True)
REFUSED = (ValueError, TypeError, NotImplementedError)
BAD = 2  # the request that fails


def refused(*parts):
    """The call is refused before any work, with a message that has every one of ``parts`` as a word of its own."""
    words = "".join(rf"(?=[\s\S]*(?<![\w.]){part}(?![\w]))" for part in parts)
    return pytest.raises(REFUSED, match=words)


@pytest.fixture(scope="module")
def engine(policy32):
    def unreachable(completions):
        raise AssertionError("work started before the input was checked")

    return StarsEngine(policy32, unreachable)


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
    for value in (["a", "b"], torch.zeros(2, 2), {"a": 1.0}):
        with refused(r"target_reward\[0\]", "number"):
            engine.generate(PROMPTS, CONFIG, target_reward=value)


def test_the_config_must_be_a_config(engine):
    with refused("config"):
        engine.generate(PROMPTS, {"beta": 0.5})


# Prompts


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


# Models


def test_a_reward_of_text_needs_a_tokenizer(policy32):
    class OfText(Reward):
        def score(self, completions):
            return [float(len(completion.text)) for completion in completions]

    out = StarsEngine(policy32, OfText()).generate(PROMPTS, CONFIG)
    assert all("no text without a tokenizer: pass tokenizer=" in error for error in out.errors)


def test_an_unreachable_family_is_refused_by_name():
    policy = BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=1, n_head=2))
    with refused("(?i:bloom\\w*)"):
        StarsEngine(policy, sum_reward)


def test_a_stateful_model_is_refused_by_name():
    mamba = MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4))
    with refused("(?i:mamba\\w*)"):
        StarsEngine(mamba, sum_reward)


def test_linear_attention_is_refused_by_name():
    config = Qwen3NextConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        linear_num_key_heads=1,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    )
    with refused("(?i:qwen3_?next\\w*)"):
        StarsEngine(Qwen3NextForCausalLM(config), sum_reward)


@pytest.mark.parametrize("role", ["policy", "reward"])
def test_dynamic_rotary_scaling_is_refused(policy32, role):
    config = tiny_config(VOCAB, num_labels=1)
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with refused(role, ".?dynamic.?"):
        if role == "policy":
            StarsEngine(LlamaForCausalLM(config), sum_reward)
        else:
            StarsEngine(policy32, LlamaForSequenceClassification(config))


# Failing callables: the bad request alone ends


def fails_after_one_segment(failure):
    """A reward over (prompts, completions) that fails for request BAD once its text is longer than a segment."""

    def reward(prompts, completions):
        rewards = sum_reward(completions)
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            if prompt == PROMPTS[BAD] and len(completion) > CONFIG.segment_length:
                if failure == "raises":
                    raise RuntimeError("the judge is out")
                if failure == "wrong count":
                    return [*rewards, 0.0]
                rewards[row] = failure
        return rewards

    return reward


FAILURES = [
    ("raises", "the judge is out"),
    ("wrong count", "[24].*[13]|[13].*[24]"),
    (math.nan, "(?i:nan)"),
    (math.inf, "inf"),
    (None, "None"),
    ("a string", "a string"),
]


@pytest.mark.parametrize("candidates", [1, 3])
@pytest.mark.parametrize("failure, cause", FAILURES, ids=[str(failure) for failure, _ in FAILURES])
def test_a_failing_reward_ends_that_request_alone(policy32, failure, cause, candidates):
    good = StarsEngine(policy32, sum_reward).generate(PROMPTS, CONFIG, seed=SEEDS)
    engine = StarsEngine(policy32, fails_after_one_segment(failure))
    out = engine.generate(PROMPTS, CONFIG, seed=SEEDS, candidates=candidates)
    assert out.finish_reasons[BAD] == "error"
    with pytest.raises(AssertionError, match=cause):
        raise AssertionError(out.errors[BAD])
    assert out.completions[BAD] == good.completions[BAD][: CONFIG.segment_length]
    assert math.isnan(out.rewards[BAD])
    assert len(out.logprobs[BAD]) == len(out.sampling_logprobs[BAD]) == len(out.completions[BAD])
    assert [s.tokens for s in out.segments[BAD]] == [out.completions[BAD]]
    for row in set(range(4)) - {BAD}:
        assert out.errors[row] is None
        assert out.completions[row] == good.completions[row]
        assert out.rewards[row] == good.rewards[row]
        assert out.finish_reasons[row] == "length"


def test_a_reward_that_fails_from_the_start_leaves_an_empty_completion(policy32):
    def reward(prompts, completions):
        if PROMPTS[BAD] in prompts:
            raise RuntimeError("no such prompt")
        return sum_reward(completions)

    good = StarsEngine(policy32, sum_reward).generate(PROMPTS, CONFIG, seed=SEEDS)
    out = StarsEngine(policy32, reward).generate(PROMPTS, CONFIG, seed=SEEDS)
    assert out.completions[BAD] == [] and out.segments[BAD] == []
    assert "no such prompt" in out.errors[BAD]
    assert out.sequences[BAD, :3].tolist() == PROMPTS[BAD]
    assert out.completions == [*good.completions[:BAD], [], *good.completions[BAD + 1 :]]


def test_a_reward_that_always_fails_ends_every_request(policy32):
    def reward(completions):
        raise RuntimeError("the judge is out")

    engine = StarsEngine(policy32, reward)
    with pytest.warns(UserWarning, match=r"no request succeeded.*the judge is out.*output\.errors.*on_error='raise'"):
        out = engine.generate(PROMPTS, CONFIG, seed=SEEDS)
    assert out.finish_reasons == ["error"] * 4
    assert all("the judge is out" in error for error in out.errors)


def test_one_that_succeeds_is_no_reason_to_warn(policy32):
    engine = StarsEngine(policy32, fails_after_one_segment("raises"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "error" in engine.generate(PROMPTS, CONFIG, seed=SEEDS).finish_reasons


def test_a_reward_that_fails_once_is_retried(policy32):
    calls = []

    def reward(completions):
        calls.append(len(completions))
        if len(calls) == 3:
            raise TimeoutError("try again")
        return sum_reward(completions)

    good = StarsEngine(policy32, sum_reward).generate(PROMPTS, CONFIG, seed=SEEDS)
    with pytest.warns(UserWarning, match=r"try again.*one by one"):
        out = StarsEngine(policy32, reward).generate(PROMPTS, CONFIG, seed=SEEDS)
    assert out.errors == [None] * 4
    assert out.completions == good.completions


def test_an_async_reward_that_raises_ends_that_request_alone(policy32):
    failing = fails_after_one_segment("raises")

    async def reward(prompts, completions):
        return failing(prompts, completions)

    out = StarsEngine(policy32, reward).generate(PROMPTS, CONFIG, seed=SEEDS)
    assert out.finish_reasons == ["length", "length", "error", "length"]
    assert "the judge is out" in out.errors[BAD]


def test_one_failing_sample_leaves_the_other_samples_of_its_prompt(policy32):
    good = StarsEngine(policy32, sum_reward).generate(PROMPTS, CONFIG, seed=SEEDS, num_return_sequences=3)
    doomed = good.completions[3 * BAD + 1][: CONFIG.segment_length]

    def reward(completions):
        return [
            math.nan if completion[: len(doomed)] == doomed and len(completion) > len(doomed) else value
            for completion, value in zip(completions, sum_reward(completions), strict=True)
        ]

    out = StarsEngine(policy32, reward).generate(PROMPTS, CONFIG, seed=SEEDS, num_return_sequences=3)
    failed = [row for row, completion in enumerate(good.completions) if completion[: len(doomed)] == doomed]
    assert [row for row, error in enumerate(out.errors) if error] == failed
    for row in set(range(12)) - set(failed):
        assert out.completions[row] == good.completions[row]


@pytest.mark.parametrize("failure, cause", FAILURES[:3], ids=[str(failure) for failure, _ in FAILURES[:3]])
def test_on_error_raise_raises_the_cause(policy32, failure, cause):
    engine = StarsEngine(policy32, fails_after_one_segment(failure))
    with pytest.raises(Exception, match=cause):
        engine.generate(PROMPTS, CONFIG, seed=SEEDS, on_error="raise")
    assert StarsEngine(policy32, sum_reward).generate(PROMPTS, CONFIG, seed=SEEDS).errors == [None] * 4


def test_an_engine_is_whole_again_after_an_error(policy32):
    broken, failing = [True], fails_after_one_segment("raises")

    def reward(prompts, completions):
        return failing(prompts, completions) if broken else sum_reward(completions)

    engine = StarsEngine(policy32, reward, kv_cache_tokens=120)
    for _ in range(20):  # would run out of slots if a failed request kept any
        with pytest.raises(RuntimeError, match="the judge is out"):
            engine.generate(PROMPTS, CONFIG, seed=SEEDS, on_error="raise")
        assert engine.generate(PROMPTS, CONFIG, seed=SEEDS).finish_reasons[BAD] == "error"
    broken.clear()
    good = StarsEngine(policy32, sum_reward).generate(PROMPTS, CONFIG, seed=SEEDS)
    assert engine.generate(PROMPTS, CONFIG, seed=SEEDS).completions == good.completions


def test_the_stream_tells_which_request_failed_and_goes_on(policy32):
    engine = StarsEngine(policy32, fails_after_one_segment("raises"))
    last = {event.index: event for event in engine.stream(PROMPTS, CONFIG, seed=SEEDS)}
    assert last[BAD].finish_reason == "error" and "the judge is out" in last[BAD].error
    assert [last[row].finish_reason for row in (0, 1, 3)] == ["length"] * 3


def test_minus_infinity_is_a_hard_rejection(policy32):
    def no_even_ends(completions):
        return [-math.inf if completion and completion[-1] % 2 == 0 else 5.0 for completion in completions]

    out = StarsEngine(policy32, no_even_ends).generate(PROMPTS * 4, CONFIG, seed=0, max_attempts=20)
    assert out.errors == [None] * 16
    segments = [segment for row in out.segments for segment in row]
    assert all(s.tokens[-1] % 2 == 1 for s in segments if s.accepted)
    assert sum(s.attempts > 1 for s in segments) > 10


def test_all_candidates_at_minus_infinity_fall_back_to_the_first(policy32):
    def never(completions):
        return [-math.inf if completion else 0.0 for completion in completions]

    out = StarsEngine(policy32, never).generate(PROMPTS, CONFIG, seed=SEEDS, candidates=2)
    unguided = StarsEngine(policy32, sum_reward).generate(PROMPTS, CONFIG, seed=SEEDS, target_reward=-1e6)
    assert out.errors == [None] * 4
    assert out.completions == unguided.completions
    assert out.rewards == [-math.inf] * 4
    assert not any(s.accepted for row in out.segments for s in row)


def test_an_empty_answer_at_minus_infinity_is_an_error_that_says_so(policy32):
    """r(x) = -inf leaves the ramp without a start."""

    def nothing_said(completions):
        return [0.0 if completion else -math.inf for completion in completions]

    out = StarsEngine(policy32, nothing_said).generate(PROMPTS, CONFIG, seed=SEEDS)
    assert out.finish_reasons == ["error"] * 4
    assert all("-inf" in error and "empty answer" in error for error in out.errors)


def test_a_bad_score_past_the_winner_is_never_looked_at(policy32):
    """One at a time, a candidate after the accepted one is never drawn; side by side it must not cost the request."""

    def rarely_nan(completions):
        return [
            math.nan if sum(completion) % 13 == 0 and completion else value
            for completion, value in zip(completions, sum_reward(completions), strict=True)
        ]

    engine = StarsEngine(policy32, rarely_nan)
    settings = {"seed": 5, "num_return_sequences": 16, "target_reward": 0.5}
    one, eight = (engine.generate(PROMPTS, CONFIG, candidates=m, **settings) for m in (1, 8))
    assert 0 < one.finish_reasons.count("error") < 64
    assert eight.finish_reasons == one.finish_reasons
    assert eight.completions == one.completions


@pytest.mark.parametrize("role", ["policy", "reward"])
def test_a_model_that_is_another_than_the_engine_was_made_for_is_refused_by_name(role):
    models = dict(policy=tiny_policy(32, hidden=32), reward=tiny_reward(32, hidden=32))
    engine = StarsEngine(**models)
    models[role].bfloat16()
    with pytest.raises(RuntimeError, match=f"the {role} was float32 on cpu, over 32 ids .* and is bfloat16"):
        engine.generate([[5, 6]], target_reward=0.0, max_new_tokens=4)
    models[role].float()
    assert engine.generate([[5, 6]], target_reward=0.0, max_new_tokens=4).errors == [None]
    models["policy"].resize_token_embeddings(16)
    with pytest.raises(RuntimeError, match="over 16 ids"):
        engine.generate([[5, 6]], target_reward=0.0, max_new_tokens=4)

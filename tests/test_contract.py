"""What the public interface promises: every parameter of ``generate`` and ``stream``, every field that comes back."""

import asyncio
import dataclasses
import inspect

import numpy as np
import pytest
import torch
from conftest import sum_reward, tiny_policy, tiny_reward
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import stars_fast
from stars_fast import StarsConfig, StarsEngine

VOCAB, EOS = 32, 31
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15]]
CONFIG = StarsConfig(segment_length=4, max_attempts=5, target_reward=1.5, beta=0.6, max_new_tokens=14)
EVERYTHING_PASSES = {"target_reward": -1e6}


def word_reward(completions):
    return sum_reward([[int(word[1:]) for word in completion.split()] for completion in completions])


@pytest.fixture(scope="module")
def engine(policy32, reward32):
    return StarsEngine(policy32, reward32)


@pytest.fixture(scope="module")
def text_engine(policy32, tokenizer32):
    return StarsEngine(policy32, word_reward, tokenizer=tokenizer32)


@pytest.fixture(scope="module")
def out(engine):
    return engine.generate(PROMPTS, CONFIG, seed=3, num_return_sequences=3)


# Signatures


def test_generate_and_stream_take_the_promised_keywords():
    promised = ["attention_mask", "reward_prompts", "columns", "seed", "on_error", "streamer", "progress"]
    parameters = inspect.signature(StarsEngine.generate).parameters
    assert list(parameters)[1:3] == ["prompts", "config"]
    for name in promised:
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY, name
    assert parameters["on_error"].default == "return"
    constructor = inspect.signature(StarsEngine).parameters
    for name in ("tokenizer", "reward_tokenizer", "reward_tail", "max_rows", "kv_cache_tokens"):
        assert constructor[name].kind is inspect.Parameter.KEYWORD_ONLY, name
    assert constructor["reward_tail"].default == "auto"


# StarsOutput


def test_there_is_one_row_per_prompt_and_sample(out):
    assert out.sequences.shape[0] == 12 and out.sequences.dtype == torch.int64
    for name in ("completions", "rewards", "finish_reasons", "errors", "logprobs", "sampling_logprobs", "segments"):
        assert len(getattr(out, name)) == 12, name
    assert out.errors == [None] * 12
    assert all(isinstance(reward, float) for reward in out.rewards)


def test_sequences_are_prompt_and_completion_padded_on_the_right(out):
    whole = [PROMPTS[row // 3] + completion for row, completion in enumerate(out.completions)]
    assert out.sequences.shape[1] == max(map(len, whole))
    for ids, expected in zip(out.sequences.tolist(), whole, strict=True):
        assert ids[: len(expected)] == expected
        assert len(set(ids[len(expected) :])) <= 1


def test_completions_end_with_eos_or_at_the_limit_and_say_which(out):
    assert set(out.finish_reasons) == {"stop", "length"}
    for completion, reason in zip(out.completions, out.finish_reasons, strict=True):
        assert EOS not in completion[:-1]
        assert (completion[-1] == EOS) == (reason == "stop")
        assert len(completion) == CONFIG.max_new_tokens or reason == "stop"


def test_segments_concatenate_to_the_completion(out):
    for completion, segments in zip(out.completions, out.segments, strict=True):
        assert [token for segment in segments for token in segment.tokens] == completion
        assert all(len(segment.tokens) == CONFIG.segment_length for segment in segments[:-1])


def test_segments_report_attempts_and_acceptance(out):
    segments = [segment for row in out.segments for segment in row]
    assert {s.accepted for s in segments} == {True, False}
    assert all(1 <= s.attempts <= CONFIG.max_attempts for s in segments)
    assert all(s.attempts == CONFIG.max_attempts for s in segments if not s.accepted)
    assert all(s.reward > s.threshold - 20 * CONFIG.beta for s in segments if s.accepted)


@torch.no_grad()
def test_rewards_are_those_of_a_fresh_full_forward_pass(out, reward32):
    for row, segments in enumerate(out.segments):
        ids = list(PROMPTS[row // 3])
        for segment in segments:
            ids += segment.tokens
            assert segment.reward == pytest.approx(reward32(torch.tensor([ids])).logits.item(), abs=1e-4)
        assert out.rewards[row] == pytest.approx(segments[-1].reward, abs=1e-6)


@torch.no_grad()
def fresh_logits(policy, prompt, completion):
    ids = torch.tensor([prompt + completion])
    return policy(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()


def picked(logits, completion):
    return logits.log_softmax(-1)[torch.arange(len(completion)), torch.tensor(completion)]


def test_logprobs_are_those_of_a_fresh_forward_pass(out, policy32):
    for row, completion in enumerate(out.completions):
        expected = picked(fresh_logits(policy32, PROMPTS[row // 3], completion), completion)
        torch.testing.assert_close(torch.tensor(out.logprobs[row]), expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(torch.tensor(out.sampling_logprobs[row]), expected, atol=1e-4, rtol=0)
        sums = [segment.logprob for segment in out.segments[row]]
        ends = torch.tensor([len(segment.tokens) for segment in out.segments[row]]).cumsum(0)
        assert sums == pytest.approx([part.sum().item() for part in expected.tensor_split(ends[:-1])], abs=1e-3)


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"repetition_penalty": 1.5},
        {"temperature": 1.4, "top_k": 12, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2},
    ],
    ids=str,
)
def test_sampling_logprobs_are_those_after_transformers_processors(engine, policy32, sampling):
    made = {
        "repetition_penalty": RepetitionPenaltyLogitsProcessor,
        "temperature": TemperatureLogitsWarper,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
    }
    processors = LogitsProcessorList([make(sampling[name]) for name, make in made.items() if name in sampling])
    out = engine.generate(PROMPTS, CONFIG, seed=1, **sampling)
    for prompt, completion, raw, processed in zip(
        PROMPTS, out.completions, out.logprobs, out.sampling_logprobs, strict=True
    ):
        logits = fresh_logits(policy32, prompt, completion)
        torch.testing.assert_close(torch.tensor(raw), picked(logits, completion), atol=1e-4, rtol=0)
        rows = [
            processors(torch.tensor([prompt + completion[:t]]), logits[t : t + 1].clone())[0]
            for t in range(len(completion))
        ]
        torch.testing.assert_close(torch.tensor(processed), picked(torch.stack(rows), completion), atol=1e-4, rtol=0)


def test_rewards_are_pooled_by_length_even_when_pad_is_eos(policy32):
    reward = tiny_reward(VOCAB, hidden=32, pad_token_id=EOS)
    out = StarsEngine(policy32, reward).generate(PROMPTS * 8, CONFIG, seed=0)
    assert "stop" in out.finish_reasons
    for prompt, completion, value in zip(PROMPTS * 8, out.completions, out.rewards, strict=True):
        with torch.no_grad():
            hidden = reward.model(torch.tensor([prompt + completion]), use_cache=False).last_hidden_state
        assert value == pytest.approx(reward.score(hidden[0, -1]).item(), abs=1e-4)


def test_texts_are_the_decoded_completions_or_none(out, text_engine, tokenizer32):
    assert out.texts is None
    texts = text_engine.generate(PROMPTS, CONFIG, seed=0)
    assert texts.texts == tokenizer32.batch_decode(texts.completions, skip_special_tokens=True)


def test_stats_add_up(out):
    stats = out.stats
    assert stats["committed_tokens"] == sum(map(len, out.completions))
    assert stats["policy_tokens"] == stats["committed_tokens"] + stats["discarded_tokens"]
    assert stats["reward_tokens"] > stats["policy_tokens"] / 2
    assert stats["heartbeats"] >= max(map(len, out.segments))
    assert stats["seconds"] > 0


def test_one_at_a_time_discards_exactly_the_attempts_that_were_looked_at(engine):
    out = engine.generate(PROMPTS, CONFIG, seed=2, candidates=1, ignore_eos=True)
    wasted = sum((s.attempts - 1) * len(s.tokens) for row in out.segments for s in row)
    assert wasted > 0
    assert out.stats["discarded_tokens"] == wasted


# Prompts


ARRAYS = [torch.tensor, np.array]


@pytest.mark.parametrize("array", ARRAYS)
def test_tensors_and_arrays_mean_what_lists_mean(engine, array):
    ids, mask = [[5, 6], [8, 0]], [[1, 1], [1, 0]]
    expected = engine.generate([[5, 6], [8]], CONFIG, seed=[3, 4], target_reward=[0.5, 1.0], eos_token_id=[7, 9])
    out = engine.generate(
        array(ids),
        CONFIG,
        attention_mask=mask,
        seed=array([3, 4]),
        target_reward=array([0.5, 1.0]),
        eos_token_id=array([7, 9]),
    )
    assert out.completions == expected.completions
    assert (
        engine.generate([[5]], CONFIG, seed=array(3)).completions == engine.generate([[5]], CONFIG, seed=3).completions
    )
    assert StarsConfig(target_reward=array(1.0)) == StarsConfig(target_reward=1.0)


def test_samples_of_one_prompt_are_adjacent(engine):
    together = engine.generate(PROMPTS, CONFIG, seed=[7, 8, 9, 10], num_return_sequences=3)
    for i, prompt in enumerate(PROMPTS):
        alone = engine.generate([prompt], CONFIG, seed=[7 + i], num_return_sequences=3)
        assert together.completions[3 * i : 3 * i + 3] == alone.completions
    assert len({tuple(c) for c in together.completions[:3]}) == 3


# Seeds


def test_no_seed_means_torchs_global_generator(engine):
    torch.manual_seed(11)
    first, second = (engine.generate(PROMPTS, CONFIG).completions for _ in range(2))
    torch.manual_seed(11)
    assert engine.generate(PROMPTS, CONFIG).completions == first
    assert first != second


def test_a_seed_leaves_torchs_global_generator_alone(engine):
    state = torch.get_rng_state()
    engine.generate(PROMPTS, CONFIG, seed=5)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_integer_seed_keys_each_request_by_its_index(engine):
    same = [PROMPTS[0]] * 6
    out = engine.generate(same, CONFIG, seed=5)
    assert len({tuple(c) for c in out.completions}) == 6
    assert engine.generate(same[:2], CONFIG, seed=5).completions == out.completions[:2]
    assert engine.generate(same, CONFIG, seed=6).completions != out.completions


def test_a_list_of_seeds_keys_each_request_by_its_own(engine):
    out = engine.generate([PROMPTS[0]] * 3, CONFIG, seed=[5, 6, 5], num_return_sequences=2)
    assert out.completions[0:2] == out.completions[4:6]
    assert out.completions[0:2] != out.completions[2:4]
    assert engine.generate([PROMPTS[0]], CONFIG, seed=5, num_return_sequences=2).completions == out.completions[:2]


def test_large_and_negative_seeds_are_seeds(engine):
    texts = {str(engine.generate(PROMPTS, CONFIG, seed=seed).completions) for seed in (0, 1, 2**32, 2**63 - 1, -1)}
    assert len(texts) == 5


# Configuration: who wins


def test_a_keyword_wins_over_the_config(engine):
    out = engine.generate(PROMPTS, CONFIG, seed=1, max_new_tokens=3, segment_length=2)
    assert max(map(len, out.completions)) == 3
    assert {len(row[0].tokens) for row in out.segments} <= {1, 2}


def test_an_unknown_keyword_is_named(engine):
    with pytest.raises(TypeError, match="segment_lenght"):
        engine.generate(PROMPTS, CONFIG, segment_lenght=2)


def test_max_new_tokens_is_never_exceeded(engine):
    for segment_length in (1, 3, 5, 50):
        out = engine.generate(PROMPTS, CONFIG, seed=1, segment_length=segment_length, max_new_tokens=7)
        assert max(map(len, out.completions)) == 7


def test_a_segment_longer_than_the_answer_needs_no_more_room_than_the_answer(policy32):
    engine = StarsEngine(policy32, sum_reward, kv_cache_tokens=40)
    long, exact = (engine.generate(PROMPTS, CONFIG, seed=1, segment_length=n).completions for n in (10**9, 14))
    assert long == exact


def test_a_calibrated_target_depends_on_the_prompt_alone(engine):
    config = dataclasses.replace(CONFIG, target_reward=None)
    together = engine.generate(PROMPTS, config, seed=[1, 2, 3, 4])
    assert together.errors == [None] * 4
    for i, prompt in enumerate(PROMPTS):
        alone = engine.generate([prompt], config, seed=[1 + i])
        assert alone.completions == [together.completions[i]]
        expected = [segment.threshold for segment in together.segments[i]]
        assert [segment.threshold for segment in alone.segments[0]] == pytest.approx(expected, rel=1e-5)


def test_calibrate_returns_a_config_a_report_and_saves_it(engine, tmp_path):
    calibration = stars_fast.calibrate(engine, PROMPTS, acceptance=0.3)
    assert isinstance(calibration.config, StarsConfig)
    assert calibration.report()
    calibration.save_pretrained(tmp_path)
    assert any(tmp_path.iterdir())
    out = engine.generate(PROMPTS, calibration.config, seed=0, max_new_tokens=8)
    assert out.errors == [None] * 4


# Stream


@pytest.mark.parametrize("candidates", [1, 4])
def test_the_stream_yields_each_committed_segment_once(engine, candidates):
    options = {"seed": 3, "num_return_sequences": 2, "candidates": candidates}
    out = engine.generate(PROMPTS, CONFIG, **options)
    tokens, segments, reasons = [[] for _ in range(8)], [[] for _ in range(8)], {}
    for event in engine.stream(PROMPTS, CONFIG, **options):
        assert event.index not in reasons, "an event after the last one"
        assert (event.prompt_index, event.sample_index) == divmod(event.index, 2)
        tokens[event.index] += event.segment.tokens
        segments[event.index].append(event.segment)
        if event.finish_reason is not None:
            reasons[event.index] = event.finish_reason
    assert tokens == out.completions
    assert segments == out.segments
    assert [reasons[row] for row in range(8)] == out.finish_reasons


def test_the_stream_carries_text(text_engine):
    out = text_engine.generate(PROMPTS, CONFIG, seed=3)
    texts = [""] * 4
    for event in text_engine.stream(PROMPTS, CONFIG, seed=3):
        texts[event.index] += event.text
    assert texts == out.texts


def test_the_stream_does_not_wait_for_the_end(policy32):
    calls = []

    def reward(completions):
        calls.append(len(completions))
        return sum_reward(completions)

    stream = StarsEngine(policy32, reward).stream([PROMPTS[0]], CONFIG, seed=3, ignore_eos=True, **EVERYTHING_PASSES)
    assert len(next(stream).segment.tokens) == CONFIG.segment_length
    seen = len(calls)
    assert len(list(stream)) == 3  # 14 tokens: 4 + 4 + 4 + 2
    assert len(calls) > seen


def test_an_abandoned_stream_leaves_the_engine_usable(engine):
    expected = engine.generate(PROMPTS, CONFIG, seed=3).completions
    stream = engine.stream(PROMPTS, CONFIG, seed=8)
    next(stream)
    stream.close()
    assert engine.generate(PROMPTS, CONFIG, seed=3).completions == expected


class Collector:
    """A streamer."""

    def __init__(self):
        self.ids, self.ended = [], 0

    def put(self, value):
        self.ids += value.flatten().tolist()

    def end(self):
        self.ended += 1


def test_a_transformers_streamer_gets_the_tokens_and_the_end(engine):
    collector = Collector()
    out = engine.generate([PROMPTS[0]], CONFIG, seed=3, streamer=collector)
    assert collector.ids[-len(out.completions[0]) :] == out.completions[0]
    assert collector.ended == 1


def test_whoever_reads_a_streamer_is_told_of_the_end_of_a_call_that_fails(policy32):
    def broken(completions):
        raise ArithmeticError

    collector = Collector()
    with pytest.raises(RuntimeError, match="ArithmeticError"):
        StarsEngine(policy32, broken).generate([PROMPTS[0]], CONFIG, streamer=collector, on_error="raise")
    assert collector.ended == 1


# Callable rewards


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


# The host models stay themselves


@torch.no_grad()
def test_ordinary_use_of_the_models_is_untouched(reward32):
    policy, ids = tiny_policy(VOCAB, hidden=32), torch.tensor([[5, 6, 7]])
    logits, text = policy(ids).logits, policy.generate(ids, do_sample=False, max_new_tokens=8)
    engine = StarsEngine(policy, reward32)
    for _ in range(2):
        torch.testing.assert_close(policy(ids).logits, logits)
        assert torch.equal(policy.generate(ids, do_sample=False, max_new_tokens=8), text)
        engine.generate(PROMPTS, CONFIG, seed=0)
    assert not policy.training

"""Every field that comes back: sequences, completions, segments, rewards, log-probabilities, statistics."""

import copy
import pickle

import pytest
import torch
from conftest import tiny_reward
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from stars_fast import StarsConfig, StarsEngine
from stars_fast.outputs import Cause

VOCAB, EOS = 32, 31
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15]]
CONFIG = StarsConfig(segment_length=4, max_attempts=5, target_reward=1.5, beta=0.6, max_new_tokens=14)


@pytest.fixture(scope="module")
def engine(policy32, reward32):
    return StarsEngine(policy32, reward32)


@pytest.fixture(scope="module")
def out(engine):
    return engine.generate(PROMPTS, CONFIG, seed=3, num_return_sequences=3)


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


def test_texts_are_the_decoded_completions_or_none(out, policy32, reward32, tokenizer32):
    assert out.texts is None
    texts = StarsEngine(policy32, reward32, tokenizer=tokenizer32).generate(PROMPTS, CONFIG, seed=0)
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


def test_a_cause_keeps_its_exception_and_its_copies_are_words():
    cause = Cause.of(KeyError("no such column"), "the reward raised ")
    assert cause == "the reward raised KeyError: 'no such column'" and isinstance(cause.exception, KeyError)
    behind = cause.after("calibration: ")
    assert behind.exception is cause.exception and behind.startswith("calibration: the reward")
    assert type(pickle.loads(pickle.dumps(cause))) is type(copy.deepcopy(cause)) is str


def test_a_cause_can_be_of_an_exception_that_cannot_say_what_it_is():
    class Mute(Exception):
        def __str__(self):
            raise TypeError

    assert Cause.of(Mute()) == "Mute: (what it says cannot be read: TypeError)"


def test_an_output_prints_as_a_line(engine):
    out = engine.generate(PROMPTS, CONFIG, seed=0)
    counts = f"policy_tokens={out.stats['policy_tokens']}, committed_tokens={out.stats['committed_tokens']}"
    begins = f"StarsOutput(4 answers, 0 with an error, {counts}, first: {out.completions[0]!r:.80}"
    assert repr(out).startswith(begins) and len(repr(out)) < len(begins) + 5

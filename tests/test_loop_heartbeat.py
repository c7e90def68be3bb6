"""A reward that fails ends the request it fails for, and no other."""

import itertools
import math
import traceback
import warnings

import pytest
from conftest import sum_reward

from stars_fast import StarsConfig, StarsEngine
from stars_fast.loop.heartbeat import Loop
from stars_fast.rewards import Reward

VOCAB = 32
PROMPTS = [[5, 6, 7], [8], [9, 10, 11], [14, 15]]
SEEDS = [1, 2, 3, 4]
CONFIG = StarsConfig(segment_length=4, max_attempts=5, target_reward=1.5, beta=0.6, max_new_tokens=14, ignore_eos=True)
BAD = 2  # the request that fails


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


@pytest.mark.parametrize("ahead", [False, True])
def test_where_a_device_works_by_itself_the_next_extension_is_launched_before_the_host_counts(
    policy32, monkeypatch, ahead
):
    engine, done = StarsEngine(policy32, sum_reward), []
    engine.core.ahead = ahead
    prefill = engine.policy.prefill
    monkeypatch.setattr(engine.policy, "prefill", lambda *args: done.append("encode") or prefill(*args))
    engine.on_heartbeat = lambda beat: done.append("count")
    engine.generate(PROMPTS[:1], CONFIG, target_reward=-100.0, max_new_tokens=8, seed=1)
    assert done == ["encode", *(["encode", "count"] if ahead else ["count", "encode"]), "count"]


def test_a_round_counts_whose_early_extension_fails(policy32, monkeypatch):
    def stats(failing):
        engine, calls = StarsEngine(policy32, sum_reward), itertools.count(1)
        engine.core.ahead = True
        prefill = engine.policy.prefill

        def encode(*args):
            if next(calls) == failing:
                raise ValueError("not now")
            return prefill(*args)

        monkeypatch.setattr(engine.policy, "prefill", encode)
        found = engine.generate(PROMPTS[:1], CONFIG, target_reward=-100.0, max_new_tokens=8, seed=1).stats
        return [found[name] for name in ("heartbeats", "policy_tokens", "committed_tokens")]

    expected = stats(None)
    with pytest.warns(UserWarning, match="a heartbeat broke off"):
        assert stats(2) == expected


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


def test_one_warning_says_how_many_failed_and_the_log_has_the_traceback(policy32, caplog):
    engine = StarsEngine(policy32, fails_after_one_segment("raises"))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert "error" in engine.generate(PROMPTS, CONFIG, seed=SEEDS).finish_reasons
    (warning,) = [str(one.message) for one in told]
    assert "1 of 4 requests failed" in warning and "the judge is out" in warning
    (record,) = caplog.records
    assert record.name == "stars_fast" and "prompts[2]" in record.message and "in reward" in caplog.text


def test_the_log_has_one_of_a_kind(policy32, caplog):
    def reward(completions):
        raise RuntimeError("the judge is out")

    with pytest.warns(UserWarning, match="no request succeeded"):
        StarsEngine(policy32, reward).generate(PROMPTS, CONFIG, seed=SEEDS)
    assert len(caplog.records) == 1


def test_what_is_raised_has_the_users_own_exception_as_its_cause(policy32):
    engine = StarsEngine(policy32, fails_after_one_segment("raises"))
    with pytest.raises(RuntimeError, match=r"prompts\[2\]: .*the judge is out") as raised:
        engine.generate(PROMPTS, CONFIG, seed=SEEDS, on_error="raise")
    cause = raised.value.__cause__
    assert str(cause) == "the judge is out" and raised.traceback  # in the user's own frame
    assert any(frame.name == "reward" for frame in traceback.extract_tb(cause.__traceback__))


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


def test_a_reward_of_text_needs_a_tokenizer(policy32):
    class OfText(Reward):
        def score(self, completions):
            return [float(len(completion.text)) for completion in completions]

    out = StarsEngine(policy32, OfText()).generate(PROMPTS, CONFIG)
    assert all("no text without a tokenizer: pass tokenizer=" in error for error in out.errors)


def test_rewards_that_nobody_on_the_host_has_seen_give_the_same_texts(monkeypatch, policy32, reward32):
    want = StarsEngine(policy32, reward32).generate(PROMPTS, CONFIG, seed=4)
    taken = []
    monkeypatch.setattr(
        Loop, "_stays", lambda loop, scores, drawn: taken.append(scores.tensor is not None) or taken[-1]
    )
    got = StarsEngine(policy32, reward32).generate(PROMPTS, CONFIG, seed=4)
    assert taken and all(taken)
    assert got.completions == want.completions
    assert got.rewards == pytest.approx(want.rewards, abs=1e-5)
    assert [[s.attempts for s in row] for row in got.segments] == [[s.attempts for s in row] for row in want.segments]


def test_a_prompt_that_cannot_be_read_ahead_fails_by_itself_and_says_why(policy32):
    class Unreadable(Reward):
        def score(self, completions):
            return sum_reward([completion.tokens for completion in completions])

        def read_ahead(self, prompts, most):
            for prompt in prompts:
                if prompt.source == self.bad:
                    raise KeyError("no such prompt")
            return []

    reward = Unreadable()
    reward.bad = None
    want = StarsEngine(policy32, reward).generate(PROMPTS, CONFIG, seed=4)
    reward.bad = PROMPTS[1]
    out = StarsEngine(policy32, reward).generate(PROMPTS, CONFIG, seed=4)
    assert "KeyError" in out.errors[1] and "no such prompt" in out.errors[1] and out.completions[1] == []
    others = [0, 2, 3]
    assert [out.completions[i] for i in others] == [want.completions[i] for i in others]
    assert [out.errors[i] for i in others] == [None] * 3

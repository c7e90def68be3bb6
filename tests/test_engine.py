"""What ``generate`` and ``stream`` promise: every parameter, many threads and streams at a time, and who fails alone.

What comes back stands in test_outputs.py, what a reward function is called with in test_rewards_callable.py.
"""

import inspect
import math
import threading
import warnings
from contextlib import closing

import numpy as np
import pytest
import torch
from conftest import sum_reward, tiny_tokenizer, word_reward

import stars_fast
from stars_fast import StarsConfig, StarsEngine
from stars_fast.inputs.arguments import Arguments
from stars_fast.inputs.job import Job
from stars_fast.methods.base import Method, Segments
from stars_fast.rewards import Reward

VOCAB, EOS = 32, 31
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15]]
CONFIG = StarsConfig(segment_length=4, max_attempts=5, target_reward=1.5, beta=0.6, max_new_tokens=14)
EVERYTHING_PASSES = {"target_reward": -1e6}


@pytest.fixture(scope="module")
def engine(policy32, reward32):
    return StarsEngine(policy32, reward32)


@pytest.fixture(scope="module")
def text_engine(policy32, tokenizer32):
    return StarsEngine(policy32, word_reward, tokenizer=tokenizer32)


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


@pytest.fixture(scope="module", params=["w0", "</s>"], ids=["pad", "pad is eos"])
def padding_tokenizer(request):
    tokenizer = tiny_tokenizer(VOCAB)
    tokenizer.pad_token = request.param
    return tokenizer


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


def last_tokens(out, finish_reason):
    return {c[-1] for c, reason in zip(out.completions, out.finish_reasons, strict=True) if reason == finish_reason}


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


@pytest.mark.parametrize(
    "prompts, overrides", [([[99]], {}), ([[1], [2]], {}), ([[1]], {"top_p": 2.0}), ([[1]], {"segment": 3})], ids=str
)
def test_whoever_reads_a_streamer_is_told_of_the_end_of_a_call_that_is_refused(idle, prompts, overrides):
    collector = Collector()
    with pytest.raises((ValueError, TypeError)):
        idle.generate(prompts, CONFIG, streamer=collector, **overrides)
    assert collector.ended == 1 and not collector.ids


def test_whoever_reads_a_streamer_is_told_of_the_end_of_a_call_that_fails(policy32):
    def broken(completions):
        raise ArithmeticError

    collector = Collector()
    with pytest.raises(RuntimeError, match="ArithmeticError"):
        StarsEngine(policy32, broken).generate([PROMPTS[0]], CONFIG, streamer=collector, on_error="raise")
    assert collector.ended == 1


# A target that nothing reaches


def test_a_target_that_nothing_reaches_is_named_once(policy32):
    engine, config = StarsEngine(policy32, sum_reward), CONFIG.replace(target_reward=50.0, alpha=1.0)
    with pytest.warns(
        UserWarning, match=r"hardly any of \d+ segments.*best reward is 1\.\d.*target_reward=50\.0.*None"
    ):
        engine.generate(PROMPTS * 4, config, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.generate(PROMPTS * 4, config, seed=0)


@pytest.mark.parametrize(
    "settings", [{"target_reward": 1.5}, {"target_reward": math.inf}, {"target_reward": None}], ids=str
)
def test_targets_that_are_reached_or_meant_to_be_beyond_are_not_spoken_of(policy32, settings):
    engine, config = StarsEngine(policy32, sum_reward), StarsConfig(segment_length=4, max_attempts=5, max_new_tokens=14)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*were drawn to find a target")
        engine.generate(PROMPTS * 4, config.replace(**settings), seed=0)


# The host models stay themselves


# Many at a time

SETTINGS = [
    dict(),
    dict(max_attempts=2, temperature=0.7, candidates=2),
    dict(method="vanilla", top_k=5),
    dict(target_reward=None),
    dict(method="best_of_n"),
    dict(method="particle_filter"),
    dict(segment_length=2, repetition_penalty=1.3),
    dict(method="rejection_sampling", max_new_tokens=6, max_attempts=4),
]


@pytest.mark.filterwarnings("ignore:method=.* itself")
def test_threads_with_settings_of_their_own_get_the_texts_they_have_alone(policy32, reward32):
    engine, texts, start = StarsEngine(policy32, reward32), {}, threading.Barrier(len(SETTINGS))

    def call(place, settings):
        start.wait(30)
        for again in range(2):
            texts[place, again] = engine.generate(PROMPTS[:2], CONFIG, seed=place, **settings).completions

    threads = [threading.Thread(target=call, args=pair) for pair in enumerate(SETTINGS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for place, settings in enumerate(SETTINGS):
        alone = StarsEngine(policy32, reward32).generate(PROMPTS[:2], CONFIG, seed=place, **settings).completions
        assert texts[place, 0] == texts[place, 1] == alone
    assert engine.core.loop is None and engine.policy.tree.nodes == 0


# What is the caller's own, and raises for one request

BAD = 2


def raising(row, value):
    """What a hook of a row is: one that raises for the bad row, and changes nothing for others."""

    def hook(*args):
        if row == BAD:
            raise ArithmeticError("not today")
        return value(*args)

    return hook


class Picky(Method):
    """Cannot value the candidates of one prompt."""

    name = "picky"

    def values(self, candidates):
        if any(candidate.completion.response.prompt.index == BAD for candidate in candidates):
            raise ArithmeticError("not today")
        return super().values(candidates)


HOOKS = {
    "values": dict(config=CONFIG.replace(method=Picky())),
    "logits processor": dict(processor=lambda row: raising(row, lambda ids, logits: logits)),
    "stop test": dict(stop=lambda row: raising(row, lambda ids: False)),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_that_raises_costs_its_request_alone(policy32, hook):
    """Not the others of its call, and not those of another call that are drawn beside them."""
    engine, expected = (
        StarsEngine(policy32, sum_reward),
        StarsEngine(policy32, sum_reward).generate(PROMPTS, CONFIG, seed=5),
    )
    other = engine.stream(PROMPTS, CONFIG, seed=5)
    events = [next(other)]
    out = engine.run(Arguments(PROMPTS, **{"config": CONFIG, "seed": 5} | HOOKS[hook]))
    events += other
    assert "ArithmeticError: not today" in out.errors[BAD] and out.completions[BAD] == []
    for row, completion in enumerate(expected.completions):
        assert row == BAD or (out.errors[row], out.completions[row]) == (None, completion)
        assert [token for event in events if event.index == row for token in event.segment.tokens] == completion
    assert engine.policy.tree.nodes == 0


class Stepwise(Method):
    """Steps that end with a text, the first accepted as it is."""

    name, has_target = "stepwise", False

    def rule(self, config):
        return config.replace(target_reward=-math.inf, base_reward=None)

    def segments(self):
        return Segments(delimiter="w1")


@pytest.mark.filterwarnings("ignore:method=.* itself")
def test_a_tokenizer_that_cannot_read_a_step_costs_that_request_alone(policy32, monkeypatch):
    tokenizer = tiny_tokenizer(VOCAB)
    engine, config = StarsEngine(policy32, word_reward, tokenizer=tokenizer), CONFIG.replace(method=Stepwise())
    good, decode = engine.generate(PROMPTS, config, seed=5), tokenizer.decode
    first = good.completions[BAD][0]

    def picky(ids, **kwargs):
        if not kwargs and ids[0] == first:
            raise ArithmeticError("not today")
        return decode(ids, **kwargs)

    monkeypatch.setattr(tokenizer, "decode", picky)
    out = engine.generate(PROMPTS, config, seed=5)
    begins = [any(segment.tokens[0] == first for segment in segments) for segments in good.segments]
    assert begins[BAD] and not all(begins)
    assert [error is not None and "ArithmeticError: not today" in error for error in out.errors] == begins
    assert all(begins[row] or out.completions[row] == good.completions[row] for row in range(len(PROMPTS)))
    assert out.completions[BAD] == []


class Sums(Reward):
    def score(self, completions):
        return sum_reward([completion.tokens for completion in completions])


@pytest.mark.filterwarnings("ignore:no request succeeded")
def test_events_without_their_text_are_told_and_cost_nobody_an_answer(policy32, monkeypatch):
    """A tokenizer reads the text of events, and a reward may have no use for it."""
    tokenizer = tiny_tokenizer(VOCAB)
    engine, config = StarsEngine(policy32, Sums(), tokenizer=tokenizer), CONFIG.replace(ignore_eos=True)
    expected, decode = engine.generate(PROMPTS, config, seed=5).completions, tokenizer.decode
    other = Job(engine.prepare(Arguments(PROMPTS, config, seed=5)), None)
    engine.core.submit(other)

    def picky(ids, **kwargs):
        if len(ids) > CONFIG.segment_length:
            raise ArithmeticError("not today")
        return decode(ids, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "decode", picky)
        events = list(engine.stream(PROMPTS, config, seed=5))
    for row, ids in enumerate(expected):
        own = [event for event in events if event.index == row]
        assert [token for event in own for token in event.segment.tokens] == ids
        assert [event.error for event in own[:-1]] == [None] * (len(own) - 1) and own[-1].finish_reason == "length"
        assert "could not be decoded: the tokenizer raised ArithmeticError: not today" in own[-1].error
    while not other.over:
        engine.core.step()
    assert engine.output(other).completions == expected
    assert engine.policy.tree.nodes == 0


def test_a_text_that_cannot_be_decoded_costs_that_text_alone(policy32, monkeypatch):
    tokenizer = tiny_tokenizer(VOCAB)
    engine = StarsEngine(policy32, Sums(), tokenizer=tokenizer)
    good, decode = engine.generate(PROMPTS, CONFIG, seed=5), tokenizer.decode

    def picky(ids, **kwargs):
        if list(ids) == good.completions[BAD]:
            raise ArithmeticError("not today")
        return decode(ids, **kwargs)

    monkeypatch.setattr(tokenizer, "decode", picky)
    with pytest.warns(UserWarning, match=f"1 of {len(PROMPTS)} requests failed.*could not be decoded"):
        out = engine.generate(PROMPTS, CONFIG, seed=5)
    assert (out.completions, out.rewards, out.finish_reasons) == (good.completions, good.rewards, good.finish_reasons)
    assert out.texts == ["" if row == BAD else text for row, text in enumerate(good.texts)]
    assert [error is not None for error in out.errors] == [row == BAD for row in range(len(PROMPTS))]
    with pytest.raises(RuntimeError, match=rf"prompts\[{BAD}\]: its text") as raised:
        engine.generate(PROMPTS, CONFIG, seed=5, on_error="raise")
    assert isinstance(raised.value.__cause__, ArithmeticError)


class Failing(list):
    """A streamer that takes so many pieces."""

    def __init__(self, most):
        super().__init__()
        self.most, self.ended = most, False

    def put(self, ids):
        if len(self) == self.most:
            raise ArithmeticError("not today")
        self.append(ids.tolist())

    def end(self):
        self.ended = True


def test_released_memory_is_made_anew_and_changes_no_text(policy32, reward32):
    engine = StarsEngine(policy32, reward32)
    trees = [engine.policy, *engine.reward.tree_models]
    first = engine.generate(PROMPTS, CONFIG, seed=0).completions
    engine.policy.graphs.get("shape", lambda: object(), capture=False)
    for _ in range(2):
        engine.release_memory()
        assert [tree.pool.slots for tree in trees] == [1, 1]
        assert "shape" not in engine.policy.graphs
        assert engine.generate(PROMPTS, CONFIG, seed=0).completions == first


def test_memory_that_a_call_has_in_use_is_not_released(policy32, reward32):
    engine, other = (StarsEngine(policy32, reward32) for _ in range(2))
    with closing(engine.stream(PROMPTS, CONFIG, seed=0)) as events:
        first = next(events)
        with pytest.raises(RuntimeError, match="this engine is generating: let"):
            engine.release_memory()
        with pytest.raises(RuntimeError, match="another engine with this policy is generating"):
            other.release_memory()
        assert [first, *events] == list(other.stream(PROMPTS, CONFIG, seed=0))


def test_a_streamer_that_cannot_end_leaves_the_answer_whole(policy32):
    class Endless(Failing):
        def end(self):
            raise ArithmeticError("not today")

    engine = StarsEngine(policy32, sum_reward)
    whole = engine.generate(PROMPTS[:1], CONFIG, seed=5)
    with pytest.warns(UserWarning, match="the streamer could not be ended: it raised ArithmeticError: not today"):
        out = engine.generate(PROMPTS[:1], CONFIG, seed=5, streamer=Endless(99))
    assert (out.completions, out.finish_reasons) == (whole.completions, whole.finish_reasons)


def test_a_streamer_that_raises_leaves_what_there_is_of_the_answer(policy32):
    engine = StarsEngine(policy32, sum_reward)
    whole = engine.generate(PROMPTS[:1], CONFIG, seed=5)
    streamer = Failing(2)  # the prompt and a segment
    with pytest.warns(UserWarning, match="the streamer raised ArithmeticError: not today"):
        out = engine.generate(PROMPTS[:1], CONFIG, seed=5, streamer=streamer)
    assert streamer.ended and out.finish_reasons == ["error"] and "ArithmeticError" in out.errors[0]
    assert out.completions[0] and out.completions[0] == whole.completions[0][: len(out.completions[0])]
    assert engine.core.open_calls == 0 and engine.policy.tree.nodes == 0

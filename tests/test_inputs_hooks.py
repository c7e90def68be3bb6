"""Stop strings, stopping criteria and logits processors do to a row what they do in transformers.

Stop strings end an answer with the token that completes one, whatever its text is decoded with.
"""

import itertools
import math

import pytest
import torch
from conftest import sum_reward, tiny_policy, tiny_tokenizer, word_reward
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dropin import CONFIG, EOS, PAD, PROMPTS, VOCAB, both, callback, completions, facade
from test_text_decode import TOKENIZERS, ids_of, tokenizers
from tiny_tokenizers import byte_bpe
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)
from transformers.generation import EosTokenCriteria

import stars_fast
from stars_fast import StarsConfig, StarsEngine
from stars_fast.inputs.hooks import stop_test
from stars_fast.text.decode import CONTEXT_TOKENS

pytestmark = pytest.mark.filterwarnings("ignore:Using the model-agnostic default")


@pytest.fixture(scope="module")
def policy():
    policy = tiny_policy(VOCAB, hidden=32)
    policy.generation_config.pad_token_id = PAD
    return policy


def first_stop(tokenizer, prompt, ids, strings):
    """How many tokens there are when the text of all of them first has one of the strings behind the prompt's."""
    before = tokenizer.decode(prompt)
    for end in range(1, len(ids) + 1):
        whole = tokenizer.decode(prompt + ids[:end])
        text = whole[len(before) :] if whole.startswith(before) else tokenizer.decode(ids[:end])
        if any(string in text for string in strings):
            return end
    return None


# transformers' clean-up rewrites every second one of a run of quotes: which, the beginning of the run decides.
@pytest.mark.parametrize("name", sorted(TOKENIZERS.keys() - {"cleaned word pieces"}))
@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_an_answer_stops_where_its_whole_text_has_a_stop_string(name, data):
    tokenizer = TOKENIZERS[name]
    written = data.draw(ids_of(tokenizer))
    prompt, ids = written[: (start := data.draw(st.integers(0, 12)))], written[start:]
    text = tokenizer.decode(ids) or "a"
    first = data.draw(st.integers(0, len(text) - 1))
    strings = [text[first : first + data.draw(st.integers(1, 9))], data.draw(st.sampled_from([" world", "END", "\n"]))]
    test = stop_test(strings, tokenizer, prompt)
    stopped = next((end for end in range(1, len(ids) + 1) if test(ids[:end])), None)
    assert stopped == first_stop(tokenizer, prompt, ids, strings)


@tokenizers
def test_only_the_end_of_a_long_answer_is_decoded(tokenizer, monkeypatch):
    ids = tokenizer(" a world is" * 50, add_special_tokens=False)["input_ids"]
    lengths, decode, test = [], tokenizer.decode, stop_test(["END"], tokenizer, [0])
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **options: lengths.append(len(ids)) or decode(ids, **options))
    assert not any(test(ids[:end]) for end in range(1, len(ids)))
    assert max(lengths) <= 2 * CONTEXT_TOKENS + 3


@pytest.mark.parametrize("name", ["metaspace", "llama"])
def test_a_space_in_front_of_a_stop_string_is_seen_where_the_answer_begins(name):
    tokenizer = TOKENIZERS[name]
    a, world = tokenizer.convert_tokens_to_ids(["▁a", "▁world"])
    assert tokenizer.decode([world]) == "world"
    assert stop_test(" world", tokenizer, [a])([world])
    assert not stop_test("a world", tokenizer, [a])([world])
    assert stop_test(["x", "world"], tokenizer)([world])


def test_a_prompt_of_many_bytes_does_not_hide_a_stop_string():
    """Llama's decoder gives up a run of bytes that begins within a character."""
    tokenizer = TOKENIZERS["llama"]
    prompt, ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("日本日本", "日本日本日本"))
    assert stop_test("本", tokenizer, prompt)(ids[len(prompt) :])


def test_a_stop_string_is_sought_behind_each_prompt_of_its_own(policy32):
    """Though the prompts of a call end differently, and one holds the stop string."""
    tokenizer = TOKENIZERS["metaspace"]
    a, world = tokenizer.convert_tokens_to_ids(["▁a", "▁world"])
    assert max(a, world) < 32
    engine = StarsEngine(policy32, lambda completion_ids: [0.0] * len(completion_ids), tokenizer=tokenizer)
    config = StarsConfig(target_reward=0.0, max_new_tokens=6, stop_strings=" world", ignore_eos=True)
    out = engine.generate([[a], [a, world]] * 64, config, seed=0)
    begun = [completion for completion in out.completions if completion[0] == world]
    assert begun and all(len(completion) == 1 for completion in begun)
    others = [ids for ids, text in zip(out.completions, out.texts, strict=True) if "world" not in text]
    assert {len(completion) for completion in others} == {6}


def test_stop_strings_end_a_candidate_before_it_is_scored(policy32, reward32, tokenizer32):
    engine = StarsEngine(policy32, reward32, tokenizer=tokenizer32)
    free = engine.generate(PROMPTS, CONFIG, seed=1, target_reward=-1e6)
    row = max(range(4), key=lambda i: len(free.completions[i]))
    stop = tokenizer32.decode(free.completions[row][3:5])  # begins in one segment and ends in the next
    assert len(stop.split()) == 2
    out = engine.generate(PROMPTS, CONFIG, seed=1, stop_strings=stop, target_reward=-1e6)
    assert out.completions[row] == free.completions[row][:5]
    assert out.finish_reasons[row] == "stop"
    assert out.texts[row].endswith(stop)
    assert [len(segment.tokens) for segment in out.segments[row]] == [4, 1]
    with torch.no_grad():
        fresh = reward32(torch.tensor([PROMPTS[row] + out.completions[row]])).logits.item()
    assert out.rewards[row] == pytest.approx(fresh, abs=1e-4)


def test_stop_strings_hold_under_rejection_and_are_not_sought_in_the_prompt(policy32, tokenizer32):
    engine = StarsEngine(policy32, word_reward, tokenizer=tokenizer32)
    out = engine.generate([[7, 9]] * 16, CONFIG, seed=1, stop_strings=["w7", "w9"], candidates=3)
    stopped = [c for c in out.completions if c[-1] in (7, 9)]
    assert stopped
    for completion, reason, segments in zip(out.completions, out.finish_reasons, out.segments, strict=True):
        assert not {7, 9} & set(completion[:-1])
        assert (reason == "stop") == (completion[-1] in (7, 9, EOS))
        if reason == "stop":
            assert segments[-1].threshold == pytest.approx(CONFIG.target_reward)


@both
def test_stop_strings_end_a_text(policy, generate):
    tokenizer = tiny_tokenizer(VOCAB)
    scored = []

    def reward(completion_ids):
        scored.extend(map(tuple, completion_ids))
        return sum_reward(completion_ids)

    if generate is facade:
        out = generate(policy, reward, tokenizer=tokenizer, stop_strings=["w9", "w12 w"], num_return_sequences=8)
    else:
        config = CONFIG.replace(stop_strings=["w9", "w12 w"])
        out = generate(policy, reward, config, tokenizer=tokenizer, num_return_sequences=8)
    assert {9, 12} <= {token for text in scored for token in text}
    for text in scored:
        assert 9 not in text[:-1] and 12 not in text[:-2]
    assert len(out) == 32


LETTERS = byte_bpe(270)
STOPS, OTHERS = list("abcdefghijklm"), list("nopqrstuvwxyz")


def spelling(**settings):
    policy = tiny_policy(len(LETTERS), scale=0.1)
    policy.generation_config.pad_token_id = 0
    for name, value in settings.items():
        setattr(policy.generation_config, name, value)
    return policy


def nothing(completion_ids):
    return [0.0] * len(completion_ids)


def engine_texts(policy, config, tokenizer=LETTERS):
    engine = StarsEngine(policy, nothing, tokenizer=tokenizer)
    return engine.generate([[5]] * 48, config, seed=0).completions


def facade_texts(policy, config):
    ids = torch.full((48, 1), 5)
    out = stars_fast.generate(policy, ids, reward_model=nothing, stars_config=config, tokenizer=LETTERS, seed=0)
    return out[:, 1:].tolist()


def callback_texts(policy, config, mine=LETTERS, **call):
    how = stars_fast.decoding(nothing, config, seed=0, tokenizer=mine)
    return policy.generate(torch.full((48, 1), 5), do_sample=True, custom_generate=how, **call)[:, 1:].tolist()


def callers_texts(policy, config, **call):
    return callback_texts(policy, config, mine=None, tokenizer=LETTERS, **call)


def stopped_at(texts, strings):
    """Whether some text ended with one of the strings, and none went on behind one."""
    found = [first_stop(LETTERS, [], [token for token in text if token], strings) for text in texts]
    ends = [len([token for token in text if token]) for text in texts]
    return any(found) and all(first in (None, end) for first, end in zip(found, ends, strict=True))


@pytest.mark.parametrize("texts", [engine_texts, facade_texts, callback_texts, callers_texts])
def test_stop_strings_of_the_models_own_end_a_text(texts):
    config = StarsConfig(target_reward=-math.inf, segment_length=4, max_new_tokens=9, ignore_eos=True)
    policy = spelling(stop_strings=STOPS, suppress_tokens=[0])
    assert stopped_at(texts(policy, config), STOPS)
    instead = texts(policy, config.replace(stop_strings=OTHERS))
    assert stopped_at(instead, OTHERS) and not stopped_at(instead, STOPS)


@pytest.mark.parametrize(
    "given", [{"stop_strings": OTHERS}, {"generation_config": OTHERS}], ids=["alone", "in a config"]
)
def test_stop_strings_of_the_call_win_over_the_models(given):
    policy = spelling(stop_strings=STOPS, suppress_tokens=[0])
    if "generation_config" in given:
        given = {"generation_config": GenerationConfig(stop_strings=OTHERS, pad_token_id=0)}
    config = StarsConfig(target_reward=-math.inf, segment_length=4, max_new_tokens=9, ignore_eos=True)
    ids = torch.full((48, 1), 5)
    options = {"reward_model": nothing, "stars_config": config, "tokenizer": LETTERS, "seed": 0}
    texts = stars_fast.generate(policy, ids, **options, **given)[:, 1:].tolist()
    assert stopped_at(texts, OTHERS) and not stopped_at(texts, STOPS)


def test_stop_strings_of_the_models_own_ask_for_a_tokenizer():
    config = StarsConfig(target_reward=0.0, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"stop_strings=\('a', .* needs a tokenizer.*stop_strings=\(\)"):
        engine_texts(spelling(stop_strings=STOPS), config, None)
    assert engine_texts(spelling(stop_strings=STOPS), config.replace(stop_strings=()), None)


def test_stop_strings_of_the_call_reach_decoding_with_the_calls_tokenizer():
    config = StarsConfig(target_reward=-math.inf, segment_length=4, max_new_tokens=9, ignore_eos=True)
    assert stopped_at(callers_texts(spelling(suppress_tokens=[0]), config, stop_strings=STOPS), STOPS)


# Processors and criteria that the engine does not know


def processed_scores(policy, reward=sum_reward, **kwargs):
    """Per row, the logits that were sampled from at each step of the text that was returned."""
    outputs = []
    output = StarsEngine.output

    def watch(self, job, texts=True):
        outputs.append(output(self, job, texts))
        return outputs[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StarsEngine, "output", watch)
        facade(policy, reward, seed=0, **kwargs)  # a PAD that is drawn would repeat the padding, as in transformers
    return outputs[0]


@torch.no_grad()
def assert_sampled_from(policy, out, processors_of, prompts=PROMPTS):
    """``sampling_logprobs`` are those of transformers' own processors on the same unpadded text, ``logprobs`` raw."""
    for row, (prompt, completion) in enumerate(zip(prompts, out.completions, strict=True)):
        logits = policy(torch.tensor([prompt + completion]), use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        for t, token in enumerate(completion):
            ids = torch.tensor([prompt + completion[:t]])
            expected = processors_of(len(prompt))(ids, logits[t : t + 1].clone()).log_softmax(-1)[0, token]
            assert out.sampling_logprobs[row][t] == pytest.approx(expected.item(), abs=1e-4)
            assert out.logprobs[row][t] == pytest.approx(logits[t].log_softmax(-1)[token].item(), abs=1e-4)


class OnlyEven(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores.masked_fill(torch.arange(scores.shape[-1]) % 2 == 1, -math.inf)


def made_by_transformers(policy, prompt=None, **kwargs):
    """The processor list that ``model.generate`` would build, for one row without padding; of any prompt by default."""
    built = {}

    def take(model, input_ids, logits_processor, stopping_criteria, generation_config, **_):
        built["list"] = logits_processor
        return input_ids

    def of_length(length):
        if length not in built:
            ids = torch.tensor([prompt or [0] * length])
            policy.generate(ids, do_sample=True, custom_generate=take, **kwargs)
            built[length] = built["list"]
        return built[length]

    return of_length


@pytest.mark.parametrize(
    "kwargs",
    [
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[4], [6, 7]]},
        {"typical_p": 0.7, "temperature": 0.8},
        {"repetition_penalty": 1.4},
        {"repetition_penalty": 1.4, "no_repeat_ngram_size": 3, "top_p": 0.9},
        {"logits_processor": LogitsProcessorList([OnlyEven()])},
        {"logits_processor": LogitsProcessorList([TemperatureLogitsWarper(0.3)])},
        {"logits_processor": LogitsProcessorList([TopKLogitsWarper(3)]), "temperature": 0.7},
        {"min_new_tokens": 9, "epsilon_cutoff": 0.02},
        {"suppress_tokens": [1, 2, 3], "renormalize_logits": True},
    ],
    ids=lambda kwargs: " and ".join(kwargs),  # objects print addresses, which test runners cannot compare
)
def test_processors_mean_what_they_mean_in_transformers(policy, kwargs):
    """With a left-padded batch; so the pads may neither be penalised nor count as text."""
    out = processed_scores(policy, max_new_tokens=12, **kwargs)
    # A prompt-length criterion counts the padding, as transformers' own loop does.
    make = made_by_transformers(policy, max_new_tokens=12, **kwargs)
    assert_sampled_from(policy, out, make)


def test_settings_of_the_config_join_processors_of_the_call(policy):
    config = CONFIG.replace(temperature=0.4, top_k=6, repetition_penalty=1.3)
    out = processed_scores(policy, config=config, no_repeat_ngram_size=2)
    make = made_by_transformers(policy, temperature=0.4, top_k=6, repetition_penalty=1.3, no_repeat_ngram_size=2)
    assert_sampled_from(policy, out, make)
    assert torch.equal(
        *(generate(policy, config=config, no_repeat_ngram_size=2, seed=0) for generate in (facade, callback))
    )
    with pytest.raises(ValueError, match=r"temperature=0\.4 of the StarsConfig.*pass temperature to model\.generate"):
        callback(policy, config=config, typical_p=0.9)


def test_a_users_repetition_penalty_is_not_taken_for_transformers_own(policy):
    """It leaves the prompt alone, which the engine's does not."""
    prompts = [[5, 6, 7, 8]]
    own = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.4, prompt_ignore_length=4)])
    out = processed_scores(policy, prompts=prompts, logits_processor=own)
    assert_sampled_from(policy, out, lambda length: LogitsProcessorList([*own, TopKLogitsWarper(VOCAB)]), prompts)


def test_no_repeated_bigram_is_ever_returned(policy):
    out = facade(policy, no_repeat_ngram_size=2, max_new_tokens=14, num_return_sequences=4)
    for row, completion in enumerate(completions(out)):
        text = PROMPTS[row // 4] + completion
        bigrams = list(itertools.pairwise(text))
        assert len(set(bigrams)) == len(bigrams)


@both
def test_allowed_tokens_are_asked_for_by_row(policy, generate):
    def allowed(row, ids):
        return [row + 1, row + 11]

    out = generate(policy, prefix_allowed_tokens_fn=allowed, max_new_tokens=6)
    for row, completion in enumerate(completions(out)):
        assert set(completion) <= {row + 1, row + 11}


@pytest.mark.parametrize("extra", [{"guidance_scale": 1.5}], ids=str)
def test_processors_with_a_state_are_refused(policy, extra):
    with pytest.raises(ValueError, match=r"guidance_scale=1\.5.*pass guidance_scale=1"):
        facade(policy, **extra)


class AfterToken(StoppingCriteria):
    """Stops a row at a token."""

    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token


@both
@pytest.mark.parametrize(
    "criterion", [AfterToken(9), EosTokenCriteria(torch.tensor([9]))], ids=["a user's own", "transformers' EOS"]
)
def test_stopping_criteria_end_a_text_before_it_is_scored(policy, generate, criterion):
    scored = []

    def reward(completions):
        scored.extend(map(tuple, completions))
        return sum_reward(completions)

    criteria = StoppingCriteriaList([criterion])
    out = generate(policy, reward, stopping_criteria=criteria, num_return_sequences=8, eos_token_id=30)
    assert any(9 in text for text in scored)
    assert all(9 not in text[:-1] for text in scored)
    stopped = [row[5:] for row in out.tolist() if 9 in row[5:]]
    assert stopped and all(set(row[row.index(9) + 1 :]) <= {30, PAD} for row in stopped)


class Unlikely(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return scores[0].max() < 0.1


@both
def test_a_criterion_that_reads_scores_is_named(policy, generate):
    with pytest.raises(RuntimeError, match=r"criterion Unlikely raised TypeError.*no scores"):
        generate(policy, stopping_criteria=StoppingCriteriaList([Unlikely()]))


@both
def test_a_length_criterion_of_the_user_holds(policy, generate):
    criteria = StoppingCriteriaList([MaxLengthCriteria(8)])
    out = generate(policy, config=CONFIG.replace(ignore_eos=True), stopping_criteria=criteria, max_new_tokens=12)
    assert out.shape[1] == 8

"""What a tokenizer cannot read or write is an error in words, and costs nobody else anything."""

import asyncio

import pytest
from conftest import refused, sum_reward, tiny_tokenizer
from tiny_tokenizers import CHATML, byte_bpe
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from stars_fast import StarsConfig, StarsEngine
from stars_fast.text.tokens import guarded, legible, refuse_long, text_of, token_ids, undecodable

CONFIG = StarsConfig(segment_length=4, max_new_tokens=12, target_reward=0.5, ignore_eos=True)


class PanicException(BaseException):
    """As what pyo3 raises where Rust panics."""


@pytest.fixture
def partial_tokenizer(monkeypatch):
    """It decodes all ids but some."""
    tokenizer = tiny_tokenizer(32)
    decode = tokenizer.decode

    def decode_some(ids, **options):
        if any(token % 5 == 0 for token in ids):
            raise OverflowError("no such id")
        return decode(ids, **options)

    monkeypatch.setattr(tokenizer, "decode", decode_some)
    return tokenizer


def test_half_a_surrogate_pair_is_named_with_its_prompt(policy32):
    tokenizer = byte_bpe(263, template=CHATML)
    engine = StarsEngine(policy32, sum_reward, tokenizer=tokenizer)
    with refused(r"prompts\[1\]", "character 2", "half of a surrogate pair"):
        engine.generate(["a", "ab\ud83d"], CONFIG)
    with refused(r"prompts\[0\]", "turn 0", "half of a surrogate pair"):
        engine.generate([[{"role": "user", "content": "ab\ud83d"}]], CONFIG)


def test_text_that_the_tokenizer_refuses_is_named_with_its_prompt(policy32, monkeypatch):
    unknowing = Tokenizer(models.WordLevel({"w1": 1, "w2": 2}, unk_token="<unk>"))
    unknowing.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    engine = StarsEngine(policy32, sum_reward, tokenizer=PreTrainedTokenizerFast(tokenizer_object=unknowing))
    with refused(r"prompts\[1\]", "tokenizer cannot read it"):
        engine.generate(["w1", "w9"], CONFIG)
    panicking = tiny_tokenizer(32)
    monkeypatch.setattr(panicking, "_encode_plus", lambda *a, **k: (_ for _ in ()).throw(PanicException("ouch")))
    with pytest.raises(ValueError, match="ouch"):
        token_ids(panicking, "w1")


def test_a_panic_is_an_error_in_words_and_an_interruption_passes(monkeypatch):
    raising = tiny_tokenizer(32)
    for error in (PanicException("ouch"), OverflowError("ouch")):
        monkeypatch.setattr(raising, "decode", lambda *a, error=error, **k: (_ for _ in ()).throw(error))
        assert text_of(raising, [1]) == ("\ufffd", None)  # of an id alone
    panicking = tiny_tokenizer(32)
    monkeypatch.setattr(panicking, "decode", lambda ids, **k: panic() if len(ids) > 1 else "w1")
    text, cause = text_of(panicking, [1, 2])
    assert (
        text == "" and cause == "its text could not be decoded: the tokenizer raised RuntimeError: PanicException: ouch"
    )
    for error in (asyncio.CancelledError, KeyboardInterrupt):
        with pytest.raises(error):
            guarded(lambda error=error: (_ for _ in ()).throw(error()))


def panic():
    raise PanicException("ouch")


def test_an_id_that_cannot_be_decoded_costs_its_own_row_a_character(policy32, partial_tokenizer):
    engine = StarsEngine(policy32, lambda completion_ids: sum_reward(completion_ids), tokenizer=partial_tokenizer)
    with pytest.warns(UserWarning, match=r"prompts\[\d\]: the tokenizer cannot decode id \d+"):
        out = engine.generate([[1], [2], [3]], CONFIG, seed=0)
    assert out.errors == [None] * 3
    plain = StarsEngine(policy32, lambda completion_ids: sum_reward(completion_ids)).generate(
        [[1], [2], [3]], CONFIG, seed=0
    )
    assert out.completions == plain.completions and out.rewards == plain.rewards
    for ids, text in zip(out.completions, out.texts, strict=True):
        assert text.count("\ufffd") == sum(token % 5 == 0 for token in ids)
    streamed = engine.stream([[1]], CONFIG, seed=0)
    assert all(event.error is None for event in streamed)


def test_a_reward_of_text_fails_the_rows_that_cannot_be_decoded(policy32, partial_tokenizer):
    engine = StarsEngine(policy32, lambda completions: [0.0] * len(completions), tokenizer=partial_tokenizer)
    with pytest.warns(UserWarning, match="."):
        out = engine.generate([[1]], CONFIG, seed=0, max_attempts=1)
    assert all(error is None or "no such id" in error for error in out.errors)


def test_legible_text_and_what_is_not(partial_tokenizer):
    assert undecodable(partial_tokenizer, [1, 5, 2, 5]) == [5]
    assert legible(partial_tokenizer, [1, 5, 2, 3, 10]) == "w1\ufffdw2 w3\ufffd"
    assert legible(partial_tokenizer, [1, 2]) == "w1 w2"


def test_a_text_that_is_far_too_long_costs_its_beginning_alone(policy32, reward32, monkeypatch):
    tokenizer, lengths = tiny_tokenizer(32), []
    encode = tokenizer._encode_plus
    monkeypatch.setattr(tokenizer, "_encode_plus", lambda text, **k: lengths.append(len(text)) or encode(text, **k))
    engine = StarsEngine(policy32, sum_reward, tokenizer=tokenizer)
    text = "w5 " * 300_000
    for prompt in (text, [{"role": "user", "content": text}]):
        with refused(r"prompts\[1\]", "900000 characters", "256 positions"):
            engine.generate(["w1", prompt], CONFIG)
    judged = StarsEngine(policy32, reward32, tokenizer=tokenizer, reward_tokenizer=tokenizer)
    with refused(r"reward_prompts\[0\]", "900000 characters", "reward model's 256 positions"):
        judged.generate(["w1"], CONFIG, reward_prompts=[text])
    assert max(lengths) < 70_000
    refuse_long("x", ["w5" + " " * 300_000], tokenizer, 256, "policy")  # few tokens after all

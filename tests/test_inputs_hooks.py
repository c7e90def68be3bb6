"""Stop strings end an answer with the token that completes one, wherever its text would be decoded."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_text_decode import TOKENIZERS, ids_of, tokenizers

from stars_fast import StarsConfig, StarsEngine
from stars_fast.inputs.hooks import stop_test
from stars_fast.text.decode import CONTEXT_TOKENS


def first_stop(tokenizer, prompt, ids, strings):
    """How many tokens there are when the text of all of them first has one of the strings behind the prompt's."""
    before = tokenizer.decode(prompt)
    for end in range(1, len(ids) + 1):
        whole = tokenizer.decode(prompt + ids[:end])
        text = whole[len(before) :] if whole.startswith(before) else tokenizer.decode(ids[:end])
        if any(string in text for string in strings):
            return end
    return None


@tokenizers
@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_an_answer_stops_where_its_whole_text_has_a_stop_string(tokenizer, data):
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
    assert max(lengths) <= 2 * (3 + CONTEXT_TOKENS)


@pytest.mark.parametrize("name", ["metaspace", "llama"])
def test_a_space_in_front_of_a_stop_string_is_seen_where_the_answer_begins(name):
    tokenizer = TOKENIZERS[name]
    a, world = tokenizer.convert_tokens_to_ids(["▁a", "▁world"])
    assert tokenizer.decode([world]) == "world"
    assert stop_test(" world", tokenizer, [a])([world])
    assert not stop_test("a world", tokenizer, [a])([world])
    assert stop_test(["x", "world"], tokenizer)([world])


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

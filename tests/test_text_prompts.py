"""Prompts become the ids that transformers makes of them, with one beginning-of-sequence token, or are refused."""

import asyncio
import re
import warnings

import numpy as np
import pytest
import torch
from conftest import refused, sum_reward, tiny_tokenizer, word_reward
from test_inputs_arguments import CONFIG, PROMPTS, VOCAB
from tiny_tokenizers import BEGUN, CHAT, LLAMA3, begun_ids, byte_bpe, chat_prefix

from stars_fast import AsyncStarsEngine, StarsEngine, calibrate
from stars_fast.text.prompts import read_prompts


@pytest.fixture(scope="module")
def engine(policy32, reward32):
    return StarsEngine(policy32, reward32)


@pytest.mark.parametrize("add_bos", [False, True])
def test_text_that_a_chat_template_wrote_has_one_bos(add_bos):
    tokenizer = byte_bpe(300, template=LLAMA3, add_bos=add_bos)
    text = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    (prompt,) = read_prompts(text, tokenizer)
    assert prompt.ids == chat_prefix(tokenizer, CHAT)
    assert prompt.ids.count(tokenizer.bos_token_id) == 1


def test_other_text_gets_the_special_tokens_of_its_tokenizer():
    tokenizer = byte_bpe(300, add_bos=True)
    (prompt,) = read_prompts("the cat", tokenizer)
    assert prompt.ids == tokenizer("the cat")["input_ids"]
    assert prompt.ids[0] == tokenizer.bos_token_id


def test_a_chat_that_ends_with_the_assistants_turn_goes_on_from_it():
    tokenizer = byte_bpe(300, template=LLAMA3)
    (prompt,) = read_prompts([BEGUN], tokenizer)
    assert prompt.ids == begun_ids(tokenizer)
    assert tokenizer.decode(prompt.ids).endswith("\n\nI like")


def test_all_five_forms_of_prompt_mean_the_same(policy32, tokenizer32):
    engine = StarsEngine(policy32, lambda completion_ids: sum_reward(completion_ids), tokenizer=tokenizer32)
    generate = lambda prompts, **kw: engine.generate(prompts, CONFIG, seed=4, **kw)  # noqa: E731
    expected = generate([[1, 5, 6, 2, 3]])
    assert generate("w1 w5 w6 w2 w3").completions == expected.completions
    assert generate(["w1 w5 w6 w2 w3"]).completions == expected.completions
    assert generate([[{"role": "user", "content": "w5 w6"}]]).completions == expected.completions
    padded = torch.tensor([[0, 0, 1, 5, 6, 2, 3]])
    tensor = generate(padded, attention_mask=(torch.arange(7) > 1).long()[None])
    assert tensor.completions == expected.completions
    assert tensor.sequences[0, :5].tolist() == [1, 5, 6, 2, 3]


def test_an_array_of_texts_is_a_list_of_texts(policy32, tokenizer32):
    texts, engine = ["w5 w6", "w8"], StarsEngine(policy32, word_reward, tokenizer=tokenizer32)
    out = engine.generate(np.array(texts), CONFIG, seed=0)
    assert out.completions == engine.generate(texts, CONFIG, seed=0).completions


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_an_id_tensor_is_ignored_on_either_side(engine, side):
    ids, mask = torch.zeros(4, 3, dtype=torch.long), torch.zeros(4, 3, dtype=torch.long)
    for row, prompt in enumerate(PROMPTS):
        where = slice(3 - len(prompt), 3) if side == "left" else slice(0, len(prompt))
        ids[row, where], mask[row, where] = torch.tensor(prompt), 1
    expected = engine.generate(PROMPTS, CONFIG, seed=4)
    assert engine.generate(ids, CONFIG, seed=4, attention_mask=mask).completions == expected.completions


def test_a_tensor_without_a_mask_is_taken_whole(engine):
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    assert engine.generate(ids, CONFIG, seed=4).completions == engine.generate(ids.tolist(), CONFIG, seed=4).completions


@pytest.fixture(scope="module", params=["w0", "</s>"], ids=["pad", "pad is eos"])
def padding_tokenizer(request):
    tokenizer = tiny_tokenizer(VOCAB)
    tokenizer.pad_token = request.param
    return tokenizer


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["pt", "np", None])
def test_a_tokenizers_output_is_a_prompt_without_its_padding(policy32, padding_tokenizer, kind, side):
    padding_tokenizer.padding_side = side
    engine = StarsEngine(policy32, word_reward, tokenizer=padding_tokenizer)
    texts = ["w5 w6 w7", "w8"]
    expected = engine.generate(texts, CONFIG, seed=4).completions
    encoded = padding_tokenizer(texts, padding=True, return_tensors=kind)
    assert engine.generate(encoded, CONFIG, seed=4).completions == expected
    assert engine.generate(dict(encoded), CONFIG, seed=4).completions == expected
    unpadded = padding_tokenizer(texts, return_attention_mask=False)
    assert engine.generate(unpadded, CONFIG, seed=4).completions == expected


@pytest.mark.parametrize("kind", ["pt", None])
def test_a_rendered_chat_is_a_prompt_and_a_mask_of_ones_own_wins(policy32, tokenizer32, kind):
    engine = StarsEngine(policy32, lambda completion_ids: sum_reward(completion_ids), tokenizer=tokenizer32)
    chat = [{"role": "user", "content": "w5 w6"}]
    encoded = tokenizer32.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors=kind)
    assert engine.generate(encoded, CONFIG, seed=4).completions == engine.generate(chat, CONFIG, seed=4).completions
    if kind == "pt":
        mask = torch.tensor([[0, 1, 1, 1, 1]])
        out = engine.generate(encoded, CONFIG, seed=4, attention_mask=mask)
        assert out.sequences[0, :4].tolist() == [5, 6, 2, 3]


@pytest.mark.parametrize("kind", ["pt", None], ids=["tensor", "lists"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_ids_without_a_mask_are_warned_of(policy32, padding_tokenizer, side, kind):
    padding_tokenizer.padding_side = side
    engine = StarsEngine(policy32, word_reward, tokenizer=padding_tokenizer)
    ids = padding_tokenizer(["w5 w6 w7", "w8"], padding=True, return_tensors=kind)["input_ids"]
    with pytest.warns(UserWarning, match=rf"prompts: some rows.*pad token {padding_tokenizer.pad_token_id}.*no atten"):
        engine.generate(ids, CONFIG)


def test_pad_tokens_that_all_rows_share_are_not_warned_of(policy32, padding_tokenizer):
    """A BOS or EOS that pads, too."""
    engine = StarsEngine(policy32, word_reward, tokenizer=padding_tokenizer)
    pad = padding_tokenizer.pad_token_id
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for ids in ([[pad, 5, pad, 6], [pad, 7, 8, 9]], [[5, pad], [6, pad]], [[pad, 5]]):
            engine.generate(torch.tensor(ids), CONFIG)
        engine.generate(torch.tensor([[pad, 5], [6, 7]]), CONFIG, attention_mask=torch.tensor([[0, 1], [1, 1]]))
        engine.generate({"input_ids": [[pad, 5], [6, 7]], "attention_mask": [[1, 1], [1, 1]]}, CONFIG)


@pytest.mark.parametrize(
    "prompts, words",
    [
        ([5, 6, 7], "=[5, 6, 7] is one list of ids: give"),
        ((one for one in ["w5"]), " is a generator: give text"),
        ({"w5"}, " is a set: give"),
    ],
)
def test_what_is_no_list_of_prompts_is_told_how_to_be_one(idle, prompts, words):
    with pytest.raises(TypeError, match=rf"^prompts{re.escape(words)}.* a list of "):
        idle.generate(prompts, CONFIG)


def test_ids_that_no_tensor_holds_are_refused_as_others_are(idle):
    with refused(r"prompts\[1\] holds id 1267650600228229401496703205376, outside the policy's vocabulary"):
        idle.generate([[5], [2**100]], CONFIG)


@pytest.mark.parametrize("prompts", [[[5], [], [6]], torch.zeros(3, 0, dtype=torch.long)], ids=["ids", "tensor"])
def test_an_empty_prompt_is_named_by_its_index(idle, prompts):
    with refused(rf"prompts\[{1 if isinstance(prompts, list) else 0}\]", "empty"):
        idle.generate(prompts, CONFIG)


def test_an_empty_text_or_chat_is_named_by_its_index(policy32, tokenizer32):
    engine = StarsEngine(policy32, sum_reward, tokenizer=tokenizer32)
    with refused(r"prompts\[1\]", "empty"):
        engine.generate(["w1", ""], CONFIG)
    with refused(r"prompts\[1\]"):
        engine.generate([[{"role": "user", "content": "w1"}], []], CONFIG)


@pytest.mark.parametrize(
    "prompts, keys",
    [
        ([{"messages": [{"role": "user", "content": "w1"}]}], "messages"),
        ([{"prompt": "w1"}, {"prompt": "w2"}], "prompt"),
        ([[{"role": "user", "content": "w1"}, {"content": "w2", "from": "bot"}]], "from"),
        ({"prompt": "w1"}, "prompt"),
    ],
    ids=str,
)
def test_a_data_sets_row_is_no_chat(policy32, tokenizer32, prompts, keys):
    engine = StarsEngine(policy32, sum_reward, tokenizer=tokenizer32)
    with refused(r"prompts(\[0\])?", f"keys.*{keys}"):
        engine.generate(prompts, CONFIG)
    with refused(r"reward_prompts(\[0\])?", f"keys.*{keys}"):
        engine.generate("w1", CONFIG, reward_prompts=prompts)


def test_a_fully_masked_row_is_an_empty_prompt(idle):
    mask = torch.tensor([[1, 1], [0, 0]])
    with refused(r"prompts\[1\]", "empty"):
        idle.generate(torch.ones(2, 2, dtype=torch.long), CONFIG, attention_mask=mask)


def test_a_mask_of_another_shape_is_refused(idle):
    with refused("attention_mask"):
        idle.generate(torch.ones(2, 3, dtype=torch.long), CONFIG, attention_mask=torch.ones(2, 4))
    with refused("attention_mask"):
        idle.generate(PROMPTS, CONFIG, attention_mask=torch.ones(4, 3))
    with refused("attention_mask", r"\(1, 5\)", r"\(2, 3\)"):
        idle.generate(torch.ones(2, 3, dtype=torch.long), CONFIG, attention_mask=[1] * 5)
    with refused("attention_mask"):
        idle.generate(torch.ones(2, 3, dtype=torch.long), CONFIG, attention_mask=[[1, 1], [1]])


def test_text_needs_a_tokenizer(idle):
    with refused(r"prompts\[0\]", "tokenizer"):
        idle.generate(["once upon a time"], CONFIG)
    with refused(r"prompts\[0\]", "tokenizer"):
        idle.generate([[{"role": "user", "content": "hello"}]], CONFIG)
    with refused("stop_strings", "tokenizer"):
        idle.generate(PROMPTS, CONFIG, stop_strings=["x"])


@pytest.mark.parametrize("prompts", [[5, 6, 7], [[5], 3.5], [[5.0]], [None], 7, None, b"bytes", [[True]]], ids=str)
def test_what_is_no_prompt_is_refused(idle, prompts):
    with refused(r"prompts(\[\d\])?"):
        idle.generate(prompts, CONFIG)


def test_float_ids_are_refused(idle):
    with refused("prompts", r"torch\.float32"):
        idle.generate(torch.ones(2, 3), CONFIG)


THINKING = (
    "{% for m in messages %}w1 {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}{{ 'w3' if enable_thinking | default(true) else 'w4' }}{% endif %}"
)


@pytest.fixture
def thinking_tokenizer():
    tokenizer = tiny_tokenizer(32)
    tokenizer.chat_template = THINKING
    return tokenizer


async def _tokens(events):
    return [token async for event in events for token in event.segment.tokens]


def test_a_templates_variables_are_the_callers(policy32, thinking_tokenizer):
    engine = StarsEngine(policy32, lambda completion_ids: sum_reward(completion_ids), tokenizer=thinking_tokenizer)
    chat, off = [{"role": "user", "content": "w5"}], {"enable_thinking": False}
    out = engine.generate([chat], CONFIG, seed=0, chat_template_kwargs=off)
    assert out.sequences[0, :3].tolist() == [1, 5, 4]
    assert engine.generate([chat], CONFIG, seed=0).sequences[0, :3].tolist() == [1, 5, 3]
    events = list(engine.stream([chat], CONFIG, seed=0, chat_template_kwargs=off))
    assert [token for event in events for token in event.segment.tokens] == out.completions[0]
    asynchronous = AsyncStarsEngine(engine)
    try:
        served = asyncio.run(_tokens(asynchronous.generate(chat, CONFIG, seed=3, chat_template_kwargs=off)))
    finally:
        asynchronous.close()
    assert served == engine.generate([chat], CONFIG, seed=[3], chat_template_kwargs=off).completions[0]
    found = [calibrate(engine, [chat], config=CONFIG, seed=0, chat_template_kwargs=one).config for one in (off, None)]
    assert found[0] == calibrate(engine, [[1, 5, 4]], config=CONFIG, seed=0).config != found[1]
    for none, what in [({"tokenize": False}, "tokenize"), ({"chat_template": "x"}, "chat_template"), ([1], "mapping")]:
        with refused("chat_template_kwargs", what):
            engine.generate([chat], CONFIG, chat_template_kwargs=none)


@pytest.mark.parametrize("keys", [["pixel_values", "image_grid_thw"], ["position_ids"], ["inputs_embeds"]])
def test_what_the_policy_would_not_see_of_an_encoding_is_refused_by_name(engine, keys):
    encoding = {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.tensor([[1, 1]])}
    with pytest.raises(ValueError, match=f"prompts holds {', '.join(keys)}, which the policy would not see"):
        engine.generate({**encoding, **dict.fromkeys(keys, torch.zeros(1))}, CONFIG)
    told = {"token_type_ids": torch.tensor([[0, 0]]), "length": torch.tensor([2])}
    expected = engine.generate([[5, 6]], CONFIG, seed=0).completions
    assert engine.generate({**encoding, **told}, CONFIG, seed=0).completions == expected


def test_a_chat_under_a_policy_without_a_template_is_one_line_of_what_to_give():
    with pytest.raises(ValueError, match=r"prompts\[0\] is a chat, and .* no chat template: give text, or a tokenizer"):
        read_prompts([[{"role": "user", "content": "Hi"}]], byte_bpe(300))

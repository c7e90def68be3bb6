"""Prompts become the ids that transformers makes of them, with one beginning-of-sequence token."""

import pytest
from tiny_tokenizers import BEGUN, CHAT, LLAMA3, begun_ids, byte_bpe, chat_prefix

from stars_fast.text.prompts import read_prompts


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

"""Turns have a role in words, and a content that can be read; anything else is named."""

import json

import pytest
from conftest import refused
from tiny_tokenizers import CHATML, LLAMA3, byte_bpe, chat_prefix, models_for

from stars_fast import StarsConfig, StarsEngine
from stars_fast.rewards import ClassifierReward, JudgeReward, RewardPrompt
from stars_fast.text.prompts import read_prompts
from stars_fast.text.turns import spoken

PARTS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
)
TEXT = [{"role": "user", "content": "the cat\nsat"}]
IN_PARTS = [{"role": "user", "content": [{"type": "text", "text": "the cat"}, {"type": "text", "text": "sat"}]}]
CALL = [{"type": "function", "function": {"name": "look", "arguments": {"a": 1}}}]
TOOLS = [
    {"role": "user", "content": "weather?"},
    {"role": "assistant", "content": None, "tool_calls": CALL},
    {"role": "tool", "content": "sun"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_bpe(300, template=CHATML)


@pytest.mark.parametrize(
    "turn, said",
    [
        ({"role": ["user"], "content": ["hello"]}, "role"),
        ({"role": None, "content": "hello"}, "role"),
        ({"role": "user", "content": None}, "content"),
        ({"role": "user"}, "content"),
        ({"role": "user", "content": 7}, "content"),
        ({"role": "user", "content": ["hello"]}, "content"),
        ({"role": "user", "content": [{"type": "image", "image": "x"}]}, "image"),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, "text"),
        ({"role": "system", "content": {"a": 1}}, "content"),
        ({"role": "tool", "content": 7}, "content"),
    ],
    ids=str,
)
def test_what_is_no_turn_is_named_with_its_place(tokenizer, turn, said):
    with refused(r"prompts\[1\]", "turn 1", said):
        read_prompts([TEXT, [*TEXT, turn]], tokenizer)


def test_parts_of_text_are_joined_where_a_template_cannot_take_them(tokenizer):
    (prompt,) = read_prompts([IN_PARTS], tokenizer)
    assert prompt.ids == chat_prefix(tokenizer, TEXT) and prompt.source == IN_PARTS
    takes = byte_bpe(300, template=PARTS)
    assert read_prompts([IN_PARTS], takes)[0].ids == chat_prefix(takes, IN_PARTS)
    rendering = ClassifierReward(models_for(tokenizer)[1], tokenizer, takes).make_rendering(takes)
    assert rendering.context(RewardPrompt(0, IN_PARTS, [1])).prefix == chat_prefix(tokenizer, TEXT)


@pytest.mark.filterwarnings("ignore:the verdict .* has")
def test_a_judge_is_shown_parts_as_text_and_calls_of_tools_as_what_they_are(tokenizer):
    judge = JudgeReward(models_for(tokenizer)[0], tokenizer, template="{prompt}|{answer}", yes="Y", no="N")
    show = lambda chat: tokenizer.decode(judge.context(RewardPrompt(0, chat, [1])).prefix)  # noqa: E731
    assert "the cat\nsat|" in show(IN_PARTS)
    assert "None" not in show(TOOLS) and '"look"' in show(TOOLS)
    assert spoken(TOOLS[1]) == '[{"type": "function", "function": {"name": "look", "arguments": {"a": 1}}}]'


@pytest.mark.parametrize("returned", [{"sun": [1, 2]}, [{"sun": 1}, {"rain": 2}]], ids=str)
def test_what_a_tool_returned_is_left_to_the_template(returned):
    as_json = CHATML.replace("m['content']", "(m['content'] if m['content'] is string else m['content'] | tojson)")
    tokenizer = byte_bpe(300, template=as_json)
    chat = [*IN_PARTS, {"role": "assistant", "content": "hello"}, {"role": "tool", "content": returned}]
    (prompt,) = read_prompts([chat], tokenizer)
    assert prompt.ids == chat_prefix(tokenizer, [*TEXT, *chat[1:]])
    assert spoken(chat[-1]) == json.dumps(returned)


def test_content_of_none_beside_calls_of_tools_is_no_content(tokenizer):
    assert b"None" not in tokenizer.decode(read_prompts([TOOLS], tokenizer)[0].ids).encode()


def test_an_answer_in_parts_that_the_prompt_begins_is_one_text():
    tokenizer = byte_bpe(300, template=LLAMA3)
    policy, _ = models_for(tokenizer)
    begun = [*TEXT, {"role": "assistant", "content": [{"type": "text", "text": "I like"}]}]
    seen = []
    engine = StarsEngine(
        policy, lambda completions: [seen.append(c[0]["content"]) or 0.0 for c in completions], tokenizer=tokenizer
    )
    engine.generate([begun], StarsConfig(max_new_tokens=4, segment_length=4, target_reward=0.0), seed=0)
    assert seen and all(text.startswith("I like") for text in seen)

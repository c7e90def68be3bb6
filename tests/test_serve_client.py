"""The server as openai's client sees it, and what the engine gives for the same request."""

import base64
import io
from dataclasses import replace

import openai
import pytest
from conftest import sum_reward
from serving import CONFIG, running, tiny_engine
from tiny_pictures import asked, llava, llava_processor, picture

from stars_fast import StarsEngine
from stars_fast.methods import Guided

CHAT = [{"role": "user", "content": "hello there"}]


@pytest.fixture(scope="module")
def engine():
    return tiny_engine()


@pytest.fixture(scope="module")
def client(engine):
    with running(engine, api_key="secret") as server:
        yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0)


def alone(engine, prompt, **settings):
    return engine.generate([prompt], CONFIG.replace(**settings), seed=[settings.pop("seed", 7)])


def test_models_are_listed_and_found(client):
    (model,) = client.models.list()
    assert model.id == client.models.retrieve("tiny").id == "tiny" and model.model_extra["max_model_len"] == 512
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


@pytest.mark.parametrize("samples", [1, 2])
def test_an_answer_is_the_engines_whole_or_in_pieces(engine, client, samples):
    want = alone(engine, CHAT, max_new_tokens=40, num_return_sequences=samples)
    asked = dict(model="tiny", messages=CHAT, seed=7, n=samples, max_completion_tokens=40)
    whole = client.chat.completions.create(**asked)
    assert [choice.message.content for choice in whole.choices] == want.texts
    assert [choice.finish_reason for choice in whole.choices] == want.finish_reasons
    texts = [""] * samples
    segments = [0] * samples
    for chunk in client.chat.completions.create(**asked, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content
        segments[choice.index] += choice.delta.role is None
    assert texts == want.texts and segments == [len(one) for one in want.segments]


def test_completions_take_texts_and_ids_several_at_a_time(engine, client):
    prompts = ["the cat", "a dog sat on"]
    want = [alone(engine, prompt, max_new_tokens=16, num_return_sequences=2).texts for prompt in prompts]
    ids = [engine.tokenizer(prompt)["input_ids"] for prompt in prompts]
    for given in (prompts, ids):
        got = client.completions.create(model="tiny", prompt=given, seed=7, n=2)
        assert [choice.text for choice in got.choices] == [*want[0], *want[1]]
        assert [choice.index for choice in got.choices] == [0, 1, 2, 3]
    assert client.completions.create(model="tiny", prompt=ids[0], seed=7, n=2).choices[1].text == want[0][1]


def test_the_stream_helper_and_usage_work(client):
    asked = dict(model="tiny", messages=CHAT, seed=3, max_tokens=24, extra_body={"ignore_eos": True})
    with client.chat.completions.stream(**asked, stream_options={"include_usage": True}) as stream:
        events = list(stream)
    texts = [event.delta for event in events if event.type == "content.delta"]
    usages = [event.chunk.usage for event in events if event.type == "chunk" and event.chunk.usage]
    whole = client.chat.completions.create(**asked)
    assert "".join(texts) == whole.choices[0].message.content
    assert [usage.total_tokens for usage in usages] == [whole.usage.total_tokens]
    assert whole.usage.completion_tokens == usages[0].completion_tokens == 24
    cost = whole.usage.model_extra["stars"]
    assert cost["drawn_tokens"] == 24 + cost["discarded_tokens"] and cost["scored_tokens"] > 0


def test_settings_of_ours_go_in_extra_body(engine, client):
    ruled = dict(max_new_tokens=20, target_reward=None, base_reward=None)
    want = alone(engine, "the cat", **ruled, method="vanilla", max_attempts=1)
    extra = {"stars": {"method": "vanilla", "segment_length": 6}}
    got = client.completions.create(model="tiny", prompt="the cat", seed=7, max_tokens=20, extra_body=extra)
    assert got.choices[0].text == want.texts[0]
    best = {"stars": {"method": {"name": "best_of_n", "n": 3}}}
    want = alone(engine, "the cat", **ruled, method=best["stars"]["method"], max_attempts=3)
    got = client.completions.create(model="tiny", prompt="the cat", seed=7, max_tokens=20, extra_body=best)
    assert got.choices[0].text == want.texts[0]
    assert got.choices[0].model_extra["stars"]["reward"] == pytest.approx(want.rewards[0], rel=1e-5)


def test_a_method_asked_for_decides_about_what_the_servers_guides_draw():
    mix, engine = Guided([(None, -0.5, lambda text: "now " + text)], weight=1.5), tiny_engine()
    named, ruled = {"name": "best_of_n", "n": 3}, dict(max_new_tokens=12, target_reward=None, base_reward=None)
    want, plain = (
        alone(engine, "the cat", **ruled, method=method).texts[0] for method in (replace(mix, method=named), named)
    )
    with running(engine, config=CONFIG.replace(method=mix, target_reward=None, base_reward=None)) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        extra = {"stars": {"method": named}}
        got = client.completions.create(model="tiny", prompt="the cat", seed=7, max_tokens=12, extra_body=extra)
    assert got.choices[0].text == want != plain


WRONG = [
    (dict(model="other"), openai.NotFoundError, "model='other'"),
    (dict(temperature=0), openai.BadRequestError, "--greedy sample"),
    (dict(temperature="hot"), openai.BadRequestError, "temperature is text: must be a valid number"),
    (dict(n=10**9), openai.BadRequestError, "n=1000000000 must be less than or equal to 128"),
    (dict(logit_bias={"5": 1}), openai.BadRequestError, "logit_bias is not served"),
    (dict(max_tokens=10**6), openai.BadRequestError, "max_tokens=1000000"),
    (dict(extra_body={"stars": {"target_rewrd": 1}}), openai.BadRequestError, "did you mean 'target_reward'"),
    (dict(extra_body={"target_reward": 1}), openai.BadRequestError, "give stars:"),
    *(
        (dict(extra_body={name: value}), openai.BadRequestError, f"{name} is not served: ")
        for name, value in {
            "stop_token_ids": [1],
            "top_logprobs": 2,
            "guided_json": {"type": "object"},
            "bad_words": ["the"],
            "allowed_token_ids": [3],
            "truncate_prompt_tokens": 4,
            "max_completion_tokens": 3,
            "include_stop_str_in_output": True,
            "length_penalty": 3.0,
            "prompt_embeds": "x",
            "skip_special_tokens": False,
            "add_special_tokens": False,
            "regex": "a+",
            "max_new_tokens": 3,
        }.items()
    ),
    (dict(extra_body={"stars": {"temperature": 1}}), openai.BadRequestError, "beside stars"),
    (dict(extra_body={"stars": {"segment_length": 99}}), openai.BadRequestError, "max_segment_length=32"),
    (dict(extra_body={"stars": {"method": "magic"}}), openai.BadRequestError, "known methods"),
    (dict(extra_body={"stars": {"method": {"name": "rsd", "draft": "/etc"}}}), openai.BadRequestError, "numbers"),
    (
        dict(extra_body={"stars": {"method": "vanilla", "target_reward": 1}}),
        openai.BadRequestError,
        "decides it itself",
    ),
    (dict(prompt=[]), openai.BadRequestError, "prompt"),
    (dict(prompt=[1, 4000]), openai.BadRequestError, "4000"),
    (dict(prompt=""), openai.BadRequestError, "prompt is empty: give text"),
]


@pytest.mark.parametrize("fields, kind, words", WRONG)
def test_what_is_wrong_is_named_with_value_and_limit(client, fields, kind, words):
    with pytest.raises(kind) as caught:
        client.completions.create(**{"model": "tiny", "prompt": "the cat", "max_tokens": 200, **fields})
    assert words in caught.value.body["message"] and caught.value.body["code"] == caught.value.status_code
    first = next(iter(fields.get("extra_body", fields)))
    assert caught.value.param is None or caught.value.param.startswith(("stars", first, "prompt"))


def test_pictures_and_other_speakers_are_refused_by_name(client):
    picture = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    for messages, words in (
        (picture, "content[0].type='image_url'"),
        ([{"role": "tool", "content": "x"}], "messages[0].role"),
        ([], "messages is empty"),
    ):
        with pytest.raises(openai.BadRequestError, match="messages") as caught:
            client.chat.completions.create(model="tiny", messages=messages)
        assert words in caught.value.body["message"]


def test_what_a_chat_holds_beside_its_texts_is_refused_and_what_says_nothing_is_let_through(client):
    begun = [*CHAT, {"role": "assistant", "content": "I am"}]
    for messages, extra, words in (
        (CHAT, {"chat_template_kwargs": {"tools": [{"type": "function"}]}}, "chat_template_kwargs.tools"),
        (CHAT, {"chat_template_kwargs": {"documents": [{"text": "x"}]}}, "chat_template_kwargs.documents"),
        ([{**CHAT[0], "name": "bob"}], {}, "messages[0].name"),
        ([*CHAT, {"role": "assistant", "content": "", "tool_calls": [{}]}], {}, "messages[1].tool_calls"),
        (begun, {"continue_final_message": False}, "continue_final_message"),
        (CHAT, {"add_generation_prompt": False}, "add_generation_prompt"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="tiny", messages=messages, extra_body=extra)
        assert caught.value.body["message"].startswith(words) and caught.value.param == words
    nothing = {"guided_json": None, "length_penalty": 1.0, "skip_special_tokens": True, "bad_words": [], "user": "me"}
    nothing |= {"temprature": 1, "add_generation_prompt": True, "continue_final_message": False}
    chat = [{**CHAT[0], "name": None, "tool_calls": []}]
    assert client.chat.completions.create(model="tiny", messages=chat, max_tokens=2, extra_body=nothing).choices


def test_a_chat_may_be_in_parts_and_end_with_the_beginning_of_an_answer(engine, client):
    parts = [{"role": "user", "content": [{"type": "text", "text": "hello"}, {"type": "text", "text": "there"}]}]
    begun = [*CHAT, {"role": "assistant", "content": "I am"}]
    for chat in (parts, begun):
        got = client.chat.completions.create(model="tiny", messages=chat, seed=7, max_tokens=16)
        assert got.choices[0].message.content == alone(engine, chat, max_new_tokens=16).texts[0]


def test_a_chat_may_have_the_rest_of_the_context(client):
    extra = {"ignore_eos": True, "stars": {"method": "vanilla", "segment_length": 32}}
    got = client.chat.completions.create(model="tiny", messages=CHAT, seed=1, extra_body=extra)
    assert got.usage.total_tokens == 512 and got.choices[0].finish_reason == "length"


def test_no_key_and_a_wrong_one_are_refused(client):
    for key in ("wrong", "s", "secretsecret"):
        with pytest.raises(openai.AuthenticationError, match="wrong API key"):
            client.with_options(api_key=key).models.list()


def with_picture(image, said="what is it?"):
    """A chat as openai's client has it."""
    file = io.BytesIO()
    image.save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": said}]
    return [{"role": "user", "content": parts}]


def test_an_answer_about_a_picture_is_the_engines_whole_or_in_pieces():
    engine = StarsEngine(llava(), lambda completion_ids: sum_reward(completion_ids), processor=llava_processor())
    with running(engine, api_key="secret") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0)
        texts = []
        for seed in (1, 2):
            want = alone(engine, asked(picture(seed)), max_new_tokens=20, num_return_sequences=2)
            ask = dict(model="tiny", messages=with_picture(picture(seed)), seed=7, n=2, max_tokens=20)
            whole = client.chat.completions.create(**ask)
            texts.append([choice.message.content for choice in whole.choices])
            assert texts[-1] == want.texts and whole.usage.prompt_tokens > 16, "a slot of the picture each"
            pieces = [""] * 2
            for chunk in client.chat.completions.create(**ask, stream=True):
                pieces[chunk.choices[0].index] += chunk.choices[0].delta.content
            assert pieces == want.texts
        assert texts[0] != texts[1], "the picture was not seen"
        begun = [*with_picture(picture(1)), {"role": "assistant", "content": "I see"}]
        got = client.chat.completions.create(model="tiny", messages=begun, seed=7, max_tokens=8)
        chat = [*asked(picture(1)), begun[-1]]
        assert got.choices[0].message.content == alone(engine, chat, max_new_tokens=8).texts[0]
        rest = {"ignore_eos": True, "stars": {"method": "vanilla", "segment_length": 32}}
        got = client.chat.completions.create(model="tiny", messages=with_picture(picture(1)), seed=1, extra_body=rest)
        assert got.usage.total_tokens == 512 and got.choices[0].finish_reason == "length"
        with pytest.raises(openai.BadRequestError, match="not fetched"):
            parts = [{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}]
            client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": parts}])
        server.settle()

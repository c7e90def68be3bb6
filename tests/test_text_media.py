"""Prompts with pictures become what the processor makes of them, in every form, or are refused by what is wrong."""

import base64
import io
import json
import warnings

import numpy as np
import pytest
import torch
from conftest import refused, tiny_policy
from PIL import Image
from tiny_pictures import (
    IMAGE,
    VOCAB,
    asked,
    gemma3,
    gemma3_processor,
    llava,
    llava_processor,
    picture,
    processed,
    qwen2_5_vl,
    qwen_inputs,
)
from tiny_vision import together
from transformers import AutoModelForImageTextToText, LlavaProcessor, MllamaConfig

from stars_fast import StarsConfig, StarsEngine
from stars_fast.inputs import models
from stars_fast.inputs.arguments import Arguments
from stars_fast.inputs.models import load_policy
from stars_fast.methods import PersonaJudge
from stars_fast.text import media
from stars_fast.text.media import forward_arguments, identity
from stars_fast.text.prompts import read_prompts

PNG = io.BytesIO()
picture(0).save(PNG, "png")
DATA = "data:image/png;base64," + base64.b64encode(PNG.getvalue()).decode()


@pytest.fixture(scope="module", params=[(llava, llava_processor), (gemma3, gemma3_processor)], ids=["llava", "gemma3"])
def pair(request):
    model, processor = request.param
    return forward_arguments(model()), processor()


def read(prompts, pair, **kwargs):
    takes, processor = pair
    return read_prompts(prompts, processor.tokenizer, processor=processor, takes=takes, **kwargs)


def same_inputs(media, encoding) -> bool:
    return media.inputs.keys() == encoding.keys() and all(torch.equal(media.inputs[k], encoding[k]) for k in encoding)


@pytest.mark.parametrize("chat", [asked(picture(0)), asked(picture(1), picture(2)), [*asked(picture(0)),
    {"role": "assistant", "content": [{"type": "text", "text": "A cat"}]}]], ids=["one", "two", "begun"])  # fmt: skip
def test_a_chat_with_pictures_is_what_transformers_makes_of_it(pair, chat):
    begun = chat[-1]["role"] == "assistant"
    form = {"add_generation_prompt": not begun, "continue_final_message": begun}
    encoding = processed(pair[1], chat, **form)
    (prompt,) = read(chat, pair)
    assert prompt.ids == encoding["input_ids"][0].tolist() and same_inputs(prompt.media, encoding)
    given = [part["image"] for part in chat[0]["content"][:-1]]
    assert list(map(id, prompt.media.images)) == list(map(id, given))
    assert prompt.source[0]["content"][:-1] == [{"type": "image"}] * len(given), "the caller's own is as it was"


def test_a_processor_with_a_way_of_its_own_renders_its_chats(pair):
    class Own(LlavaProcessor):
        def apply_chat_template(self, conversation, **kwargs):
            assert [part.get("image") for part in conversation[0]["content"]] == [image, None]
            return super().apply_chat_template(conversation, **kwargs)

    image, own = picture(0), llava_processor()
    own.__class__ = Own
    takes = forward_arguments(llava())
    expected = identity(read(asked(image), (takes, llava_processor()))[0])
    assert identity(read(asked(image), (takes, own))[0]) == expected
    for variables in ({"images": ["/nowhere.png"]}, {"processor_kwargs": {"images": ["http://nowhere/a.png"]}}):
        assert identity(read(asked(image), (takes, own), chat_template_kwargs=variables)[0]) == expected


def test_a_picture_may_be_an_object_an_array_a_file_or_a_data_url(pair, tmp_path):
    path = tmp_path / "a picture.png"
    picture(0).save(path)
    text = {"type": "text", "text": "what is it?"}
    parts = [
        {"type": "image", "image": np.asarray(picture(0))},
        {"type": "image", "image": torch.from_numpy(np.array(picture(0)))},
        {"type": "image", "path": path},
        {"type": "image", "url": str(path)},
        {"type": "image", "url": path.as_uri()},
        {"type": "image", "image": DATA},
        {"type": "image", "base64": DATA.partition(",")[2]},
        {"type": "image_url", "image_url": {"url": DATA}},
        {"type": "image_url", "image_url": DATA},
    ]
    prompts = read([asked(picture(0)), *([{"role": "user", "content": [part, text]}] for part in parts)], pair)
    assert all(identity(prompt) == identity(prompts[0]) for prompt in prompts)


def test_a_chat_of_text_and_text_are_read_as_without_a_processor(pair):
    tokenizer = pair[1].tokenizer
    chat = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    assert tokenizer.chat_template is None, "the processor has it"
    expected = processed(pair[1], chat)
    prompts = read([chat, "hello"], pair)
    assert prompts[0].ids == expected["input_ids"][0].tolist() and prompts[1].ids == tokenizer("hello")["input_ids"]
    (encoded,) = read(expected, pair)
    assert [prompt.media for prompt in (*prompts, encoded)] == [None] * 3


@pytest.mark.parametrize("kind", ["pt", "np", None])
def test_a_processors_output_is_a_prompt_for_each_row_without_its_padding(pair, kind):
    chats = [asked(picture(0)), asked(picture(1), text="a longer question, which is it?")]
    alone = read(chats, pair)
    processor = pair[1]
    texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    batch = processor(text=texts, images=[[picture(0)], [picture(1)]], padding=True, return_tensors=kind)
    together = read(batch, pair)
    assert [prompt.ids for prompt in together] == [prompt.ids for prompt in alone] == [p.source for p in together]
    assert [prompt.media.row for prompt in together] == [0, 1]
    assert together[0].media.inputs is together[1].media.inputs
    assert all(isinstance(value, torch.Tensor) for value in together[0].media.inputs.values())


def test_a_list_of_outputs_is_a_prompt_each_and_a_mask_of_ones_own_wins(pair):
    chats = [asked(picture(0)), asked(picture(1))]
    outputs = [processed(pair[1], chat) for chat in chats]
    assert list(map(identity, read(outputs, pair))) == list(map(identity, read(chats, pair)))
    assert list(map(identity, read([dict(one) for one in outputs], pair))) == list(map(identity, read(chats, pair)))
    mask = outputs[0]["attention_mask"].clone()
    mask[0, -1] = 0
    (prompt,) = read(outputs[0], pair, attention_mask=mask)
    assert prompt.ids == outputs[0]["input_ids"][0, :-1].tolist() and prompt.media.inputs["attention_mask"] is mask
    both = {name: torch.cat([one[name] for one in outputs]) for name in outputs[0]}
    with refused(r"prompts\[1\]", "2 prompts", "one each"):
        read([outputs[0], both], pair)


@pytest.mark.parametrize("side", ["left", "right"])
def test_of_a_packed_batch_every_row_is_told_by_its_picture(side):
    takes = forward_arguments(qwen2_5_vl())
    batch = qwen_inputs((8, 12), (4, 6), padding_side=side)
    rows = read_prompts(batch, None, takes=takes)
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    assert [row.ids for row in rows] == [ids[0].tolist(), ids[1][mask[1]].tolist()]
    other = {**batch, "pixel_values": -batch["pixel_values"]}
    seen = {tuple(identity(row)) for one in (batch, other) for row in read_prompts(one, None, takes=takes)}
    assert len(seen) == 4 and tuple(identity(rows[0])) in seen
    one = qwen_inputs((4, 6))
    twins = read_prompts(together([one, {**one, "pixel_values": -one["pixel_values"]}], side), None, takes=takes)
    assert twins[0].ids == twins[1].ids and identity(twins[0]) != identity(twins[1])


def test_pictures_are_digested_once_a_batch_and_only_where_targets_go_by_prompts(monkeypatch):
    digests, digest = [], media.hashlib.blake2b
    monkeypatch.setattr(media.hashlib, "blake2b", lambda *args, **more: digests.append(1) or digest(*args, **more))
    batch = qwen_inputs((8, 12), (4, 6), (4, 4))
    engine = StarsEngine(qwen2_5_vl(), lambda completions: [])
    prompts = engine.prepare(Arguments(batch, StarsConfig(target_reward=1.0))).prompts
    assert not digests
    assert len(set(map(tuple, map(identity, prompts)))) == 3 and len(digests) == 1


@pytest.mark.filterwarnings("ignore:Image size")
def test_what_is_wrong_with_a_picture_is_said_with_its_turn(pair, tmp_path, monkeypatch):
    broken = tmp_path / "broken.png"
    broken.write_bytes(PNG.getvalue()[:200])
    (tmp_path / "text.png").write_text("no picture")
    for part, *said in (
        ({"image": str(tmp_path / "none.png")}, "no picture", "none.png"),
        ({"image": str(broken)}, "broken.png", "cannot be read"),
        ({"image": str(tmp_path / "text.png")}, "text.png", "cannot be read"),
        ({"url": "https://example.org/cat.png"}, "not fetched", "a path"),
        ({"image": "data:image/png;base64,????"}, "base64"),
        ({"image": "data:image/svg+xml,<svg/>"}, "base64"),
        ({"image": 7}, "int"),
        ({"image": np.zeros(3)}, r"\(3,\)"),
        ({}, "no picture"),
    ):
        with refused(r"prompts\[1\], turn 0 \(user\)", *said):
            read(["hello", [{"role": "user", "content": [{"type": "image", **part}]}]], pair)
    with refused(r"prompts\[0\], turn 0", "'video'"):
        read([{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}], pair)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    for image in (picture(0), DATA):
        with refused(r"prompts\[0\], turn 0", "56 x 40 pixels", "2000"):
            read(asked(image), pair)


def test_a_picture_that_nobody_would_see_is_refused(pair, tokenizer32, policy32):
    chat, output = asked(picture(0)), processed(pair[1], asked(picture(0)))
    engine = StarsEngine(policy32, lambda completions: [], tokenizer=tokenizer32)
    with refused(r"prompts\[0\], turn 0 \(user\)", "'image'", "processor="):
        engine.generate(chat)
    for prompts in (output, [output]):
        with refused("pixel_values", "would not see"):
            engine.generate(prompts)
    with pytest.warns(UserWarning, match="reads nothing"):
        text_policy = StarsEngine(tiny_policy(VOCAB), lambda completions: [], processor=pair[1])
    with refused(r"prompts\[0\]", "pixel_values", "would not see"):
        text_policy.generate(chat)
    with refused("prompts", "nothing_known"):
        read({**output, "nothing_known": torch.zeros(1)}, pair)
    for reward_prompts in ([chat], output):
        with refused("reward_prompts", "'image'" if reward_prompts == [chat] else "pixel_values"):
            text_policy.generate("hello", reward_prompts=reward_prompts)


def test_what_the_processor_raises_names_the_prompt(pair):
    too_many = "<image>" if pair[1].image_token == "<image>" else "<start_of_image>"
    with refused(r"prompts\[1\]", "the processor cannot read it"):
        read(["hello", asked(picture(0), text=too_many)], pair)
    processor = llava_processor()
    processor.chat_template = "{{ messages[0]['content'][0]['type'] * 99999999 }}"
    with refused(r"prompts\[0\]", "the chat template makes more"):
        read(asked(picture(0)), (pair[0], processor))


def test_a_batch_that_is_no_tensor_or_no_batch_is_refused(pair):
    one = processed(pair[1], asked(picture(0)))
    with refused("input_ids", "batch"):
        read({**one, "input_ids": one["input_ids"][0], "attention_mask": one["attention_mask"][0]}, pair)
    with refused("input_ids", "return_tensors='pt'"):
        read({**one, "input_ids": [[1, 2], [1]]}, pair)
    with refused("attention_mask", r"\(1, 3\)"):
        read(one, pair, attention_mask=torch.ones(1, 3))
    with refused(r"prompts\[0\]", "empty"):
        read(one, pair, attention_mask=torch.zeros_like(one["input_ids"]))


def test_placeholders_count_as_tokens_of_the_prompt(pair):
    engine = StarsEngine(llava(), lambda completions: [], processor=llava_processor())
    (prompt,) = read_prompts(asked(picture(0)), engine.tokenizer, processor=engine.processor, takes=pair[0])
    assert prompt.ids.count(IMAGE) == 16
    with refused(r"prompts\[0\]", rf"{len(prompt.ids)} tokens", "positions"):
        engine.generate(asked(picture(0)), StarsConfig(max_new_tokens=500))


def test_a_policy_that_takes_pictures_is_loaded_by_name_with_its_processor(tmp_path):
    model = llava()
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=rf"policy='{tmp_path}' takes pictures, and its processor cannot be loaded"):
        loaded, tokenizer, processor = load_policy(tmp_path, None)
    assert type(loaded) is type(model) and tokenizer is processor is None
    llava_processor().save_pretrained(tmp_path)
    engine = StarsEngine(tmp_path, lambda completions: [])
    chat = asked(picture(0))
    given = StarsEngine(model, lambda completions: [], processor=tmp_path)
    for one in (engine, given):
        assert one.tokenizer is one.processor.tokenizer
        assert same_inputs(
            read_prompts(chat, one.tokenizer, processor=one.processor, takes=forward_arguments(model))[0].media,
            processed(llava_processor(), chat),
        )


@pytest.mark.parametrize("saved", ["MllamaForCausalLM", "MllamaForConditionalGeneration"])
def test_a_config_that_serves_both_is_loaded_as_what_it_was_saved_as(tmp_path, saved, monkeypatch):
    monkeypatch.setattr(models, "_loaded", lambda auto, *args: pytest.fail(auto.__name__))
    monkeypatch.setattr(models, "processor_beside", lambda *args: None)
    MllamaConfig(architectures=[saved]).save_pretrained(tmp_path)
    auto = "AutoModelForCausalLM" if saved == "MllamaForCausalLM" else "AutoModelForImageTextToText"
    with pytest.raises(pytest.fail.Exception, match=auto):
        load_policy(tmp_path, None)


def test_an_adapter_is_loaded_as_the_model_that_it_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "_loaded", lambda auto, *args: pytest.fail(auto.__name__))
    monkeypatch.setattr(models, "processor_beside", lambda *args: None)
    llava().config.save_pretrained(tmp_path / "base")
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "base")}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(pytest.fail.Exception, match="AutoModelForImageTextToText"):
        load_policy(tmp_path, None)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(pytest.fail.Exception, match="AutoModelForCausalLM"):
        load_policy(tmp_path, None)


def test_what_an_adapter_has_not_of_its_own_is_that_of_the_model_it_changes(tmp_path):
    peft = pytest.importorskip("peft")
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    llava().save_pretrained(base)
    llava_processor().save_pretrained(base)
    changed = AutoModelForImageTextToText.from_pretrained(base)
    peft.get_peft_model(changed, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, tokenizer, processor = load_policy(adapter, None)
    assert type(processor) is type(llava_processor()) and tokenizer is processor.tokenizer
    own = llava_processor()
    own.tokenizer.chat_template = "mine"
    own.tokenizer.save_pretrained(adapter)
    _, tokenizer, processor = load_policy(adapter, None)
    assert tokenizer.chat_template == "mine" and tokenizer is processor.tokenizer
    assert processor.chat_template == own.chat_template
    own.chat_template += "\n"
    own.save_pretrained(adapter)
    assert load_policy(adapter, None)[2].chat_template == own.chat_template


def test_a_processor_of_whose_pictures_the_policy_reads_nothing_is_named_when_it_is_given(pair):
    words = "processor= is a .*Processor.*pixel_values.* the policy, a LlamaForCausalLM, reads nothing"
    with pytest.warns(UserWarning, match=words):
        StarsEngine(tiny_policy(VOCAB), lambda completions: [], processor=pair[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        StarsEngine(llava(), lambda completions: [], processor=llava_processor())


def test_ids_that_stand_for_pictures_where_there_are_none_are_warned_of():
    processor = llava_processor()
    engine = StarsEngine(llava(), lambda prompts, completions: [0.0] * len(completions), processor=processor)
    inputs = processor(text="<image> what?", images=picture(0), return_tensors="pt")
    for prompt in ("<image> what?", {key: inputs[key] for key in ("input_ids", "attention_mask")}):
        with pytest.warns(UserWarning, match=rf"prompts\[0\] holds the id {IMAGE}, which stands for a picture"):
            engine.generate(prompt, method="vanilla", max_new_tokens=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.generate(inputs, method="vanilla", max_new_tokens=2)


def test_what_is_no_processor_is_refused(policy32, tokenizer32, tmp_path):
    for processor in (tokenizer32, 7, type(llava_processor())):
        with refused("processor is", "give a transformers processor"):
            StarsEngine(policy32, lambda completions: [], processor=processor)
    with refused(r"tokenizer has .*\(32 ids\)", "processor=", "leave tokenizer= out"):
        StarsEngine(policy32, lambda completions: [], tokenizer=tokenizer32, processor=llava_processor())
    with pytest.raises(OSError, match=r"processor='.*' cannot be loaded"):
        StarsEngine(policy32, lambda completions: [], processor=tmp_path)
    with refused("tokenizer is a LlavaProcessor", "processor="):
        StarsEngine(llava(), lambda completions: [], tokenizer=llava_processor())


def test_preferences_are_not_put_before_pictures(pair):
    engine = StarsEngine(llava(), lambda completions: [], processor=llava_processor())
    with refused(r"prompts\[0\]", "pictures", "preferences"):
        engine.generate(asked(picture(0)), method=PersonaJudge("be kind", "be brief"), max_new_tokens=4)

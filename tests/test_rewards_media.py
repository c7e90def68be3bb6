"""Scorers of prompts with pictures give what plain forward passes give that see them, or say why they do not."""

import copy

import pytest
import torch
from conftest import refused, tiny_policy, tiny_reward
from histories import live
from tiny_pictures import asked, gemma3, gemma3_processor, llava, llava_processor, picture, qwen2_5_vl, qwen_inputs
from transformers import Gemma3ForSequenceClassification, Qwen2_5_VLModel, Qwen2_5_VLPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from stars_fast.rewards import (
    CallableReward,
    ClassifierReward,
    GroundingReward,
    ImplicitReward,
    JudgeReward,
    ProcessReward,
    RewardPrompt,
    RuleReward,
    ValueHeadReward,
    noised,
)
from stars_fast.text.media import forward_arguments
from stars_fast.text.prompts import read_prompts

WORDS = [list(range(start, start + length)) for start, length in ((10, 3), (30, 1), (50, 5), (71, 2))]
CHATS = [asked(picture(0)), asked(picture(1), picture(2, 32, 32), text="and these?")]


def read(prompts, model, processor=None):
    """Prompts as an engine of this policy hands them to a scorer."""
    tokenizer = getattr(processor, "tokenizer", None)
    found = read_prompts(prompts, tokenizer, processor=processor, takes=forward_arguments(model))
    return [
        RewardPrompt(i, prompt.source, prompt.ids, tokenizer=tokenizer, media=prompt.media)
        for i, prompt in enumerate(found)
    ]


def draw(chance):
    return list(chance.choice(WORDS))


def alone(media):
    """The inputs of a prompt that a processor made for itself."""
    return dict(media.inputs)


def of_row(media):
    """Those of a row of :func:`qwen_inputs`, without its padding."""
    there, grid = media.inputs["attention_mask"][media.row].bool(), media.inputs["image_grid_thw"]
    pixels = media.inputs["pixel_values"].split(grid.prod(-1).tolist())[media.row]
    rows = {name: media.inputs[name][media.row, there][None] for name in ("input_ids", "mm_token_type_ids")}
    return rows | {"pixel_values": pixels, "image_grid_thw": grid[media.row : media.row + 1]}


def with_answer(inputs, answer):
    """The inputs of a plain pass over prompt and answer."""
    longer = {**inputs, "input_ids": torch.cat([inputs["input_ids"], torch.tensor([answer], dtype=torch.long)], 1)}
    longer.pop("attention_mask", None)
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            types = inputs[name]
            longer[name] = torch.cat([types, types.new_zeros(1, len(answer))], 1)
    return longer


@torch.no_grad()
def logprob(model, inputs, answer):
    """Of the answer's ids, by one plain pass."""
    if not answer:
        return 0.0
    logits = model(**with_answer(inputs, answer), use_cache=False).logits[0, -len(answer) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum().item()


FAMILIES = {
    "llava": (llava, lambda: read(CHATS, llava(), llava_processor()), alone),
    "gemma3": (gemma3, lambda: read(CHATS, gemma3(), gemma3_processor()), alone),
    "qwen2.5": (qwen2_5_vl, lambda: read(qwen_inputs((4, 8), (8, 4), (4, 4)), qwen2_5_vl()), of_row),
}


@pytest.mark.parametrize("slots", [2000, 90])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_log_ratio_sees_the_pictures_after_any_history(family, slots):
    make, prompts, inputs = FAMILIES[family]
    pair = [make(seed) for seed in (1, 2)]
    scorer = ImplicitReward(*pair, beta=0.5)

    def expected(completion):
        given = inputs(completion.response.prompt.media)
        ours, reference = (logprob(model, given, completion.tokens) for model in pair)
        return 0.5 * (ours - reference)

    live(scorer, prompts(), expected, draw=draw, slots=slots, rounds=6, seed=slots)


def as_rendered(processor, prompt, answer, chat=None):
    """What the processor itself makes of the prompt's chat, as far as the answer's end."""
    form = {"add_generation_prompt": True, "tokenize": False}
    text = processor.apply_chat_template(prompt.source if chat is None else chat, **form) + answer
    made = processor(text=[text], images=[prompt.media.images], return_tensors="pt", add_special_tokens=False)
    return {name: value for name, value in made.items() if name in ("input_ids", "pixel_values")}


def test_a_foreign_pair_reads_chat_and_pictures_with_its_own_processor():
    pair, processor = [llava(seed) for seed in (1, 2)], llava_processor()
    prompts = read(CHATS, gemma3(), gemma3_processor())
    scorer = ImplicitReward(*pair, processor=processor)

    def expected(completion):
        prompt, total = completion.response.prompt, 0.0
        before, whole = (as_rendered(processor, prompt, text) for text in ("", completion.text))
        answer = whole["input_ids"][0, before["input_ids"].shape[1] :].tolist() + [2] * completion.eos
        for model, sign in zip(pair, (1, -1), strict=True):
            total += sign * logprob(model, before, answer)
        return total

    live(scorer, prompts, expected, draw=draw, rounds=5, tokenizer=prompts[0].tokenizer, eos=2)


def test_a_judge_is_shown_the_pictures_in_front_of_its_question():
    judge, processor = llava(3), llava_processor()
    scorer = JudgeReward(judge, processor=processor, yes="Y", no="N", template="{prompt}|{answer}|{question}")
    verdicts = [processor.tokenizer(word)["input_ids"][0] for word in "YN"]

    @torch.no_grad()
    def expected(completion):
        prompt = completion.response.prompt
        asks = f"{prompt.source[0]['content'][-1]['text']}|{completion.text}|{scorer.question}"
        content = [*prompt.source[0]["content"][:-1], {"type": "text", "text": asks}]
        inputs = as_rendered(processor, prompt, "", [{"role": "user", "content": content}])
        yes, no = judge(**inputs, use_cache=False).logits[0, -1, verdicts].tolist()
        return yes - no

    prompts = read(CHATS, gemma3(), gemma3_processor())
    live(scorer, prompts, expected, draw=draw, slots=190, rounds=4, tokenizer=prompts[0].tokenizer)


def test_a_process_reward_model_reads_the_pictures_in_its_first_turn():
    model, processor = llava(4), llava_processor()
    labels = processor.tokenizer("+-")["input_ids"]
    scorer = ProcessReward.rlhflow(model, processor=processor, aggregate="min")

    @torch.no_grad()
    def expected(completion):
        prompt = completion.response.prompt
        *images, question = prompt.source[0]["content"]
        ends = [*completion.response.ends, len(completion.tokens)]
        steps = [completion.tokens[a:b] for a, b in zip([0, *ends], ends, strict=False) if b > a]
        steps = [completion.tokenizer.decode(step).strip() for step in steps] or [""]
        scores, turns = [], []
        for place, step in enumerate(steps):
            text = f"{question['text']} {step}" if place == 0 else step
            turns.append({"role": "user", "content": [*(images if place == 0 else ()), {"type": "text", "text": text}]})
            shown = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            made = processor(text=[shown], images=[prompt.media.images], return_tensors="pt", add_special_tokens=False)
            inputs = {name: made[name] for name in ("input_ids", "pixel_values")}
            scores.append(model(**inputs, use_cache=False).logits[0, -1, labels].softmax(-1)[0].item())
            turns.append({"role": "assistant", "content": [{"type": "text", "text": "+"}]})
        return min(scores)

    prompts = read(CHATS, gemma3(), gemma3_processor())
    live(scorer, prompts, expected, draw=draw, rounds=4, tokenizer=prompts[0].tokenizer)

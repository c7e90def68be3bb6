"""Prompts with pictures through the engine: the policy's own numbers, the method's own law, whoever else is there."""

import asyncio
import gc
import json
import math
import weakref
from itertools import pairwise

import pytest
import torch
from conftest import sum_reward, tiny_policy, tiny_reward
from oracle import Oracle, Rule, p_value, prefixes, text
from test_methods import EVERY
from tiny_pictures import (
    IMAGE,
    VOCAB,
    asked,
    gemma3,
    gemma3_processor,
    llava,
    llava_processor,
    paligemma,
    picture,
    processed,
    qwen2_5_vl,
    qwen_inputs,
)
from tiny_vision import answer_logits, answer_logprobs
from transformers import RepetitionPenaltyLogitsProcessor

from stars_fast import AsyncStarsEngine, StarsConfig, StarsEngine, calibrate
from stars_fast.methods import RSD
from stars_fast.policy.policy import Policy

RULE = Rule(segment_length=2, max_attempts=3, max_new_tokens=4, target_reward=1.2, alpha=0.3, beta=0.6, eos=3)
CONFIG = StarsConfig(target_reward=1.2, beta=0.3, segment_length=4, max_new_tokens=12, max_attempts=6, top_k=30)


def reward(completion_ids):
    return sum_reward(completion_ids)


def _outputs(make, processor):
    """A model, and what its processor makes of three prompts: two of them differ in nothing but the picture."""
    chats = [asked(picture(0)), asked(picture(1)), asked(picture(2), text="which colour has it?")]
    return make(), [processed(processor(), chat) for chat in chats]


def _llava():
    return _outputs(llava, llava_processor)


def _gemma3():
    return _outputs(gemma3, gemma3_processor)


def _qwen():
    first, third = qwen_inputs((8, 12)), qwen_inputs((4, 6), seed=1)
    return qwen2_5_vl(), [first, {**first, "pixel_values": first["pixel_values"].flip(0)}, third]


@pytest.fixture(scope="module", params=[_llava, _gemma3, _qwen], ids=["llava", "gemma3", "qwen2.5-vl"])
def made(request):
    return request.param()


@pytest.fixture
def reads(monkeypatch):
    """Rows of each pass that read pictures."""
    seen, read = [], Policy.read_media

    def noted(policy, inputs, rows=(0,), *args, **kwargs):
        seen.append(tuple(rows))
        return read(policy, inputs, rows, *args, **kwargs)

    monkeypatch.setattr(Policy, "read_media", noted)
    return seen


def test_an_answer_has_the_log_probabilities_of_the_untouched_model(made):
    model, outputs = made
    out = StarsEngine(model, reward).generate(outputs, CONFIG, seed=0, on_error="raise")
    for inputs, tokens, logprobs in zip(outputs, out.completions, out.logprobs, strict=True):
        torch.testing.assert_close(torch.tensor(logprobs), answer_logprobs(model, inputs, tokens), atol=1e-4, rtol=0)
    assert out.sequences[0, : outputs[0]["input_ids"].shape[1]].tolist() == outputs[0]["input_ids"][0].tolist()
    assert out.completions[0] != out.completions[1], "the picture is all they differ in"


def test_a_text_depends_on_nobody_beside_it_nor_on_candidates(made, reads):
    model, outputs = made
    seeds, prompts = [5, 6, 7, 8], [*outputs, outputs[0]]
    engine = StarsEngine(model, reward)
    expected = engine.generate(prompts, CONFIG, seed=seeds, candidates=1, on_error="raise").completions
    assert reads == [(0,)] * 4, "once each, whatever is shared of their ids"
    assert engine.generate(prompts, CONFIG, seed=seeds, candidates=8).completions == expected
    for prompt, seed, tokens in zip(prompts, seeds, expected, strict=True):
        assert [event.segment.tokens for event in engine.stream(prompt, CONFIG, seed=[seed]) if event.segment] == [
            tokens[a:b] for a, b in pairwise([0, *range(4, len(tokens), 4), len(tokens)])
        ]


def test_a_batch_that_is_read_again_and_again_is_warned_of(reads):
    inputs, engine = qwen_inputs((4, 4), (4, 4), (4, 4)), StarsEngine(qwen2_5_vl(), reward, max_rows=2)
    with pytest.warns(UserWarning, match="batch of 3, .*=1, is more than max_rows=2 .* one prompt"):
        engine.generate(inputs, CONFIG, seed=0, max_new_tokens=4, ignore_eos=True)
    assert reads == [(0, 1), (2,)]


def test_nothing_holds_pictures_after_the_call():
    inputs, engine = qwen_inputs((8, 12), (4, 6)), StarsEngine(qwen2_5_vl(), reward)
    pixels = weakref.ref(inputs["pixel_values"])
    engine.generate(inputs, CONFIG, seed=0, max_new_tokens=2)
    del inputs
    gc.collect()
    assert pixels() is None


def wave(completion) -> float:
    return 1.5 * math.cos(sum((2 * place + 3) * (token + 1) for place, token in enumerate(completion)))


@torch.no_grad()
def exact_law(model, inputs) -> dict:
    """Of STARS's text, over four ids, by plain forward passes over the picture and every text; the fifth is barred."""
    table = {}
    for length in range(RULE.max_new_tokens):
        rows = prefixes(4, RULE.eos, length)
        ids = torch.cat([inputs["input_ids"].expand(len(rows), -1), torch.tensor(rows).long().view(len(rows), -1)], 1)
        pixels = inputs["pixel_values"].expand(len(rows), -1, -1, -1)
        logits = model(input_ids=ids, pixel_values=pixels).logits[:, -1, :4].double()
        table.update(zip(rows, logits.softmax(1).numpy(), strict=True))
    return Oracle(table, wave, RULE).law(text)


def test_the_text_has_the_enumerated_law_under_its_picture_and_not_under_the_other():
    model = llava(vocab=5, image=4)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    ids = torch.tensor([[0, *[4] * 16, 1, 2]])
    pixels = torch.randn(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).mul(2)
    outputs = [{"input_ids": ids, "pixel_values": pixels[i]} for i in range(2)]
    engine = StarsEngine(model, lambda completion_ids: list(map(wave, completion_ids)), max_rows=4096)
    settings = {**RULE.stars_config(), "candidates": 3, "num_return_sequences": 800}
    drawn = [tuple(tokens) for tokens in engine.generate(outputs, seed=0, **settings).completions]
    runs, laws = {0: drawn[:800], 1: drawn[800:]}, {i: exact_law(model, outputs[i]) for i in range(2)}
    assert p_value(runs, laws) > 1e-3
    assert p_value(runs, {0: laws[1], 1: laws[0]}) < 1e-9


def test_pictures_are_read_again_where_their_request_had_to_give_way(reads, small_pools):
    model, outputs = _qwen()
    expected = StarsEngine(model, reward).generate(outputs, CONFIG, seed=1).completions
    reads.clear()
    slots = 2 * outputs[0]["input_ids"].shape[1] + 15  # two begin, and cannot both end
    out = StarsEngine(model, reward, kv_cache_tokens=slots).generate(outputs, CONFIG, seed=1, candidates=2)
    assert out.completions == expected and out.stats["preemptions"] and len(reads) > 3


def test_samples_of_a_prompt_share_one_reading(reads):
    model, outputs = _llava()
    engine = StarsEngine(model, reward)
    out = engine.generate(outputs[0], CONFIG, seed=[3], num_return_sequences=3)
    assert len(reads) == 1 and len({tuple(tokens) for tokens in out.completions}) > 1
    reads.clear()
    assert engine.generate(outputs[0], CONFIG, seed=[3]).completions == out.completions[:1]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_read_in_one_pass_and_means_the_same(reads, side):
    model, batch = qwen2_5_vl(), qwen_inputs((8, 12), (4, 6), padding_side=side)
    first = {**{name: batch[name][:1] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}}
    first |= {"pixel_values": batch["pixel_values"][:96], "image_grid_thw": batch["image_grid_thw"][:1]}
    engine = StarsEngine(model, reward)
    out = engine.generate(batch, CONFIG, seed=[3, 4], on_error="raise")
    assert reads == [(0, 1)]
    assert engine.generate(first, CONFIG, seed=[3]).completions == out.completions[:1]


def test_a_batch_whose_rows_cannot_run_together_is_read_for_each(reads, small_pools):
    model, batch = qwen2_5_vl(), qwen_inputs((8, 12), (8, 12), (8, 12))
    expected = StarsEngine(model, reward).generate(batch, CONFIG, seed=1).completions
    reads.clear()
    slots = batch["input_ids"].shape[1] + 24
    out = StarsEngine(model, reward, kv_cache_tokens=slots).generate(batch, CONFIG, seed=1)
    assert out.completions == expected and reads == [(0,), (1,), (2,)]


@pytest.mark.parametrize("method", ["metropolis_hastings", "args", "particle_filter"])
def test_other_methods_have_the_same_text_in_any_batch(method):
    model, outputs = _llava()
    config = CONFIG.replace(method=EVERY[method], target_reward=None, top_k=None)
    engine = StarsEngine(model, tiny_reward(VOCAB), reward_tokenizer="policy")
    asked_for = {"reward_prompts": [[5, 6]] * 2}  # a reward of text
    out = engine.generate(outputs[:2], config, seed=[1, 2], on_error="raise", **asked_for)
    for prompt, seed, tokens in zip(outputs, (1, 2), out.completions, strict=False):
        alone = engine.generate([prompt], config, seed=[seed], reward_prompts=[[5, 6]], on_error="raise")
        assert alone.completions == [tokens]


def test_sessions_share_heartbeats_among_pictures_and_text():
    engine = StarsEngine(llava(), reward, processor=llava_processor())
    prompts = [asked(picture(0)), "what is it?", asked(picture(1)), _llava()[1][2]]
    expected = [engine.generate([one], CONFIG, seed=[i]).completions[0] for i, one in enumerate(prompts)]

    async def answer(served, place):
        events = [event async for event in served.generate(prompts[place], CONFIG, seed=place)]
        return [token for event in events if event.segment for token in event.segment.tokens]

    async def all_of_them():
        async with AsyncStarsEngine(engine) as served:
            return await asyncio.gather(*(answer(served, place) for place in range(len(prompts))))

    assert asyncio.run(all_of_them()) == expected


def test_a_prompt_that_the_model_refuses_fails_alone_and_says_why():
    model, outputs = _llava()
    bad = {**outputs[0], "pixel_values": torch.zeros(2, 3, 32, 32)}
    engine = StarsEngine(model, reward)
    expected = engine.generate(outputs[:2], CONFIG, seed=[1, 3]).completions
    with pytest.warns(UserWarning, match="1 of 3 requests failed"):
        out = engine.generate([outputs[0], bad, outputs[1]], CONFIG, seed=[1, 2, 3])
    assert [out.completions[0], out.completions[2]] == expected
    assert out.finish_reasons[1] == "error" and out.completions[1] == []
    assert "the policy cannot read the prompt" in out.errors[1] and "tokens" in out.errors[1]
    with pytest.raises(RuntimeError, match=r"prompts\[0\]: the policy cannot read"):
        engine.generate(bad, CONFIG, seed=0, on_error="raise", num_return_sequences=2)
    assert engine.policy.tree.free_slots == engine.policy.tree.capacity - 1
    calibrated = engine.generate(bad, CONFIG, seed=0, target_reward=None)
    assert "the policy cannot read" in calibrated.errors[0]


def test_pictures_that_memory_lacks_for_fail_their_request_alone(monkeypatch):
    """And where it lacks once, nothing of the text changes."""
    model, outputs = _llava()
    engine, read, left = StarsEngine(model, reward), Policy.read_media, [1, 10**9]
    expected = engine.generate(outputs, CONFIG, seed=[1, 2, 3]).completions

    def short(policy, inputs, *args, **kwargs):
        place = 0 if torch.equal(inputs["pixel_values"], outputs[0]["pixel_values"]) else 1
        if left[place] and not torch.equal(inputs["pixel_values"], outputs[2]["pixel_values"]):
            left[place] -= 1
            raise torch.OutOfMemoryError("no room for the tower")
        return read(policy, inputs, *args, **kwargs)

    monkeypatch.setattr(Policy, "read_media", short)
    with pytest.warns(UserWarning, match="1 of 3 requests failed"):
        out = engine.generate(outputs, CONFIG, seed=[1, 2, 3])
    assert out.completions == [expected[0], [], expected[2]]
    assert "too little memory for this request alone" in out.errors[1] and "the tower" in out.errors[1]


def test_a_batch_with_a_bad_row_says_so_for_all_its_rows():
    bad = qwen_inputs((8, 12), (4, 6))
    bad["pixel_values"] = bad["pixel_values"][:-8]
    with pytest.warns(UserWarning, match="no request succeeded"):
        out = StarsEngine(qwen2_5_vl(), reward).generate(bad, CONFIG, seed=0)
    assert all("the prompt, one of 2 of a batch: " in error for error in out.errors)


def test_equal_ids_with_another_picture_have_a_target_of_their_own():
    model, outputs = _llava()
    engine = StarsEngine(model, reward)
    config = CONFIG.replace(target_reward=None)
    calibration = calibrate(engine, outputs[:2], config=config, seed=0)
    targets = calibration.config.target_reward
    assert targets[0] != targets[1], "or this shows nothing"

    def thresholds(prompts, seeds):
        out = engine.generate(prompts, calibration.config, seed=seeds, on_error="raise")
        return [[segment.threshold for segment in row] for row in out.segments]

    both = thresholds(outputs[:2], [1, 2])
    assert [row[-1] for row in both] == pytest.approx(targets)
    assert thresholds(outputs[1::-1], [2, 1]) == both[::-1]
    assert thresholds([outputs[1]], [2]) == both[1:]


def test_a_model_whose_prompts_see_themselves_in_both_directions_reads_text_whole_too(reads):
    model = paligemma()
    text, pixels = [1, 5, 9, 7, 30], torch.ones(1, 3, 32, 32).cumsum(3) / 32
    ids = torch.tensor([[IMAGE] * 16 + text])
    seen = {"input_ids": ids, "pixel_values": pixels, "token_type_ids": torch.zeros_like(ids)}
    engine = StarsEngine(model, reward)
    reads.clear()  # of what it was compared by
    out = engine.generate([seen, text], CONFIG, seed=[1, 2], on_error="raise")
    assert reads == [(0,), (0,)]
    for inputs, tokens, logprobs in zip(
        (seen, {"input_ids": torch.tensor([text])}), out.completions, out.logprobs, strict=True
    ):
        given, cache, expected = inputs, None, []
        for token in tokens:  # as generate does: what follows the prompt sees what is before it
            with torch.no_grad():
                step = model(**given, past_key_values=cache, use_cache=True)
            expected.append(step.logits[0, -1].log_softmax(0)[token])
            given, cache = {"input_ids": torch.tensor([[token]])}, step.past_key_values
        torch.testing.assert_close(torch.tensor(logprobs), torch.stack(expected), atol=1e-4, rtol=0)
    assert engine.generate([text], CONFIG, seed=[2]).completions == out.completions[1:]


def test_a_draft_model_reads_the_pictures_too_or_is_refused(reads):
    model, outputs = _llava()
    engine = StarsEngine(model, reward)
    config = StarsConfig(
        method=RSD(draft=llava(seed=1), threshold=9.0, delimiter=None), segment_length=4, max_new_tokens=8
    )
    out = engine.generate(outputs[:2], config, seed=[1, 2], on_error="raise")
    assert len(reads) == 4, "each prompt by each model"
    assert out.completions[0] == engine.generate(outputs[0], config, seed=[1]).completions[0]
    with pytest.raises(ValueError, match=r"prompts\[0\] has pictures: its pixel_values .* draft model, a LlamaFor"):
        draft = tiny_policy(104, positions=512)
        engine.generate(outputs[0], config.replace(method=RSD(draft=draft, threshold=0.0, delimiter=None)))


def test_a_placeholder_may_lie_outside_the_models_embeddings():
    """As Gemma 3's does where a vocabulary was cut; no other id may."""
    model, ((inputs, *_)) = gemma3(image=VOCAB), _gemma3()[1]
    moved = {**inputs, "input_ids": inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, VOCAB)}
    out = StarsEngine(model, reward).generate(moved, CONFIG, seed=0, on_error="raise")
    expected = answer_logprobs(model, moved, out.completions[0])
    torch.testing.assert_close(torch.tensor(out.logprobs[0]), expected, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match=r"prompts\[0\] holds id 105, outside the policy's vocabulary of 104"):
        StarsEngine(model, reward).generate({**moved, "input_ids": moved["input_ids"].clamp_min(105)}, CONFIG)


def test_pictures_count_where_prompts_are_admitted_and_repetition_is_penalised():
    model, outputs = _llava()
    engine = StarsEngine(model, reward)
    out = engine.generate(outputs[0], CONFIG, seed=[0], repetition_penalty=1.3, top_k=0)
    ids, (tokens,) = outputs[0]["input_ids"], out.completions
    logits, penalty = answer_logits(model, outputs[0], tokens), RepetitionPenaltyLogitsProcessor(1.3)
    logits[:, IMAGE] = -math.inf
    for place, token in enumerate(tokens):
        seen = torch.cat([ids, torch.tensor([tokens[:place]], dtype=torch.int64)], 1)
        law = penalty(seen, logits[place : place + 1])[0].log_softmax(0)
        assert out.sampling_logprobs[0][place] == pytest.approx(law[token].item(), abs=1e-4)
    assert out.sequences[0].tolist().count(IMAGE) == (ids == IMAGE).sum() == 16
    length = ids.shape[1]
    with pytest.raises(ValueError, match=rf"prompts\[0\] has {length} tokens and needs {length + 16} slots"):
        StarsEngine(model, reward, kv_cache_tokens=length + 4).generate(outputs[0], CONFIG)


def test_a_trace_shows_a_picture_as_one_placeholder(tmp_path):
    engine = StarsEngine(llava(), lambda prompts, completions: [0.0] * len(completions), processor=llava_processor())
    output = engine.generate(asked(picture(0)), method="vanilla", max_new_tokens=2, trace=True)
    output.save_trace(tmp_path / "trace.jsonl")
    record = json.loads((tmp_path / "trace.jsonl").read_text())
    assert record["prompt"][0]["content"][0] == {"type": "image"}
    assert record["prompt_ids"].count(IMAGE) == 16 and record["prompt_text"].count("<image>") == 1
    assert record["prompt_text"].endswith("<image>\nwhat is it?assistant: ")

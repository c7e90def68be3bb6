"""Guides of prompts with pictures: each sees its own, and the mix is that of plain forward passes."""

import copy

import numpy as np
import pytest
import torch
from conftest import refused, sum_reward, tiny_policy, tiny_tokenizer
from test_media_engine import CONFIG
from tiny_pictures import IMAGE, VOCAB, asked, llava, llava_processor, picture, processed, qwen2_5_vl, qwen_inputs
from tiny_vision import answer_logits

from stars_fast import StarsEngine
from stars_fast.inputs.arguments import Arguments
from stars_fast.methods import RSD, Guided, Stars
from stars_fast.policy.policy import Policy
from stars_fast.rewards.grounding import noised

CHATS = [asked(picture(0)), asked(picture(1)), asked(picture(2), text="which colour has it?")]


def reward(completion_ids):
    return sum_reward(completion_ids)


def turned(chat):
    """The chat with its picture upside down, in place."""
    chat[0]["content"][0]["image"] = chat[0]["content"][0]["image"].rotate(180)
    return chat


def turned_before(inputs):
    return turned(inputs.chat)


def faded(inputs):
    """What a processor made, with the pictures faded, in place."""
    inputs["pixel_values"].mul_(0.1)
    return inputs


def mixed_logprobs(weights, models, inputs, tokens):
    """Of an answer's tokens under the softmax of the weighted logits of plain forward passes over their inputs."""
    parts = zip(weights, models, inputs, strict=True)
    mix = sum(weight * answer_logits(model, one, tokens).double() for weight, model, one in parts)
    barred = [IMAGE, 101, 102, 103] if hasattr(models[0].config, "vision_start_token_id") else [IMAGE]
    laws = mix.index_fill(1, torch.tensor(barred), -torch.inf).log_softmax(1)
    return laws.gather(1, torch.tensor(tokens)[:, None])[:, 0]


def assert_mixed(out, weights, models, inputs):
    for row, tokens in enumerate(out.completions):
        expected = mixed_logprobs(weights, models, inputs[row], tokens)
        torch.testing.assert_close(torch.tensor(out.sampling_logprobs[row]).double(), expected, atol=1e-4, rtol=0)


def test_the_chat_comes_with_what_was_made_of_it_and_the_mix_is_exact():
    """Contrastive decoding with a distorted picture, and a guide with weights of its own, in one mix."""
    policy, guide, processor = llava(), llava(seed=1), llava_processor()
    method = Guided([(None, -0.5, turned_before), (guide, 0.3)], weight=1.5, method=Stars())
    engine = StarsEngine(policy, reward, processor=processor)
    out = engine.generate(CHATS, CONFIG, seed=1, method=method, top_k=0, on_error="raise")
    seen = [processed(processor, chat) for chat in CHATS]
    other = [processed(processor, turned(copy.deepcopy(chat))) for chat in CHATS]
    inputs = [[a, b, a] for a, b in zip(seen, other, strict=True)]
    assert_mixed(out, (1.5, -0.5, 0.3), (policy, policy, guide), inputs)
    again = engine.generate(CHATS, CONFIG, seed=1, method=method, top_k=0, candidates=1)
    assert again.completions == out.completions
    assert engine.policy.tree.nodes == engine._guides[1].tree.nodes == 0
    distorted = Guided([(None, -0.5, noised)], weight=1.5)
    out = engine.generate(CHATS, CONFIG, seed=1, method=distorted, top_k=0, on_error="raise")
    assert_mixed(out, (1.5, -0.5), (policy, policy), [[one, noised(one)] for one in seen])


def test_what_a_transform_does_to_a_picture_stays_with_its_guide():
    image = np.array(picture(0))
    before, processor = image.copy(), llava_processor()

    def blacken(inputs):
        inputs.chat[0]["content"][0]["image"][:] = 0
        return inputs.chat

    arguments = Arguments(asked(image), CONFIG, dict(method=Guided([(None, -0.5, blacken)], weight=1.5)))
    (node,) = StarsEngine(llava(), reward, processor=processor).prepare(arguments).nodes
    assert (image == before).all() and (node.media.images[0] == before).all()
    assert not torch.equal(node.media.inputs["pixel_values"], node.beside[0].media.inputs["pixel_values"])


@pytest.mark.parametrize("batch", [False, True], ids=["one each", "in one piece"])
def test_what_a_processor_made_is_handed_over_as_it_is(batch, small_pools):
    """In a batch in one piece, and the policy's own picture stays what it was; where requests give way, it is read
    again under both."""
    model = qwen2_5_vl()
    each = [qwen_inputs((8, 12)), qwen_inputs((8, 12), seed=1), qwen_inputs((8, 12), seed=2)]
    whole = {name: torch.cat([one[name] for one in each]) for name in each[0]}
    given, method = whole if batch else each, Guided([(None, -1.0, faded)], weight=2.0, method=Stars())
    call = dict(seed=[1, 2, 3], method=method, top_k=0, on_error="raise")
    out = StarsEngine(model, reward).generate(given, CONFIG, **call)
    inputs = [[one, faded({name: value.clone() for name, value in one.items()})] for one in each]
    assert_mixed(out, (2.0, -1.0), (model, model), inputs)
    slots = 4 * each[0]["input_ids"].shape[1] + 30  # two begin, and cannot both end
    small = StarsEngine(model, reward, kv_cache_tokens=slots).generate(given, CONFIG, **call, candidates=2)
    assert small.completions == out.completions and small.stats["preemptions"]


def test_ids_that_stand_for_pictures_in_any_of_the_models_are_never_drawn():
    policy, guide = llava(), qwen2_5_vl()  # which has more of them
    with torch.no_grad():
        guide.lm_head.weight[100:] *= 50
    method = Guided([(guide, 1.0, lambda inputs: [5, 6, 7])])
    engine = StarsEngine(policy, reward, processor=llava_processor())
    out = engine.generate(CHATS[:1], CONFIG, seed=0, method=method, top_k=0, max_new_tokens=40, ignore_eos=True)
    assert out.errors == [None] and max(out.completions[0]) < IMAGE


def test_ids_that_only_a_guide_writes_may_stand_for_its_pictures():
    policy, tokenizer = tiny_policy(VOCAB - 4, hidden=32), tiny_tokenizer(VOCAB - 4)
    engine = StarsEngine(policy, reward, tokenizer=tokenizer)
    method = Guided([(llava(), 1.0)], method=Stars())
    assert engine.generate([[5, 6, 7]], CONFIG, seed=0, method=method).errors == [None]


def test_a_draft_draws_no_picture_of_the_policys():
    draft = tiny_policy(VOCAB, hidden=32)
    with torch.no_grad():
        draft.lm_head.weight[IMAGE] *= 60
    method = RSD(draft=draft, threshold=-9.0, delimiter=None, longest=4)
    out = StarsEngine(llava(), reward).generate([[5, 6, 7]] * 6, method=method, seed=0, max_new_tokens=12)
    assert out.errors == [None] * 6 and all(IMAGE not in row for row in out.completions)


def test_a_guide_that_reads_text_alone_is_given_text(monkeypatch):
    policy, guide = llava(), tiny_policy(VOCAB, hidden=32)
    engine = StarsEngine(policy, reward, processor=llava_processor())
    with refused(r"prompts\[0\] has pictures", r"pixel_values are nothing that guide models\[0\]"):
        engine.generate(CHATS[:1], CONFIG, seed=0, method=Guided([(guide, 0.5)]))
    reads, read = [], Policy.read_media
    monkeypatch.setattr(
        Policy, "read_media", lambda self, *args, **more: reads.append(self) or read(self, *args, **more)
    )
    method = Guided([(guide, 0.5, lambda inputs: inputs.chat[0]["content"][-1]["text"])], method=Stars())
    assert engine.generate(CHATS, CONFIG, seed=0, method=method).errors == [None] * 3
    assert reads == [engine.policy] * 3


def test_a_batch_that_changes_its_size_is_refused():
    whole = qwen_inputs((8, 12), (8, 12))
    one = qwen_inputs((8, 12))
    with refused(r"guide models\[0\]", "1 prompts of a batch of 2"):
        StarsEngine(qwen2_5_vl(), reward).generate(whole, CONFIG, method=Guided([(None, -1.0, lambda inputs: one)]))

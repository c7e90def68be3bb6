"""Adapters give what tiny random models of the published shapes give by their own forward pass over the whole text."""

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config, tiny_policy, tiny_reward
from histories import assert_engine_agrees, ids_prompts, live, text_prompts
from tiny_tokenizers import LLAMA3, byte_bpe
from torch import nn
from transformers import LlamaModel, LlamaPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from stars_fast import StarsConfig, StarsEngine
from stars_fast.rewards import ArmoRMReward, Completion, InternLM2Reward, Response, ValueHeadReward

CONFIG = StarsConfig(segment_length=4, max_attempts=4, target_reward=1.0, beta=0.5, max_new_tokens=10)
TEXTS = ["the cat sat", "how are you?"]
VOCAB, ATTRIBUTES, REWARD_TOKEN = 300, 5, 7


class Gate(nn.Module):
    """Layers with ReLU between them, and a softmax at a temperature."""

    def __init__(self, width):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, 24), nn.Linear(24, ATTRIBUTES)])

    def forward(self, hidden):
        return F.softmax(self.layers[1](F.relu(self.layers[0](hidden))) / 0.1, dim=1)


class Gated(LlamaPreTrainedModel):
    """ArmoRM's shape."""

    def __init__(self, config, gating_tokens):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.regression_layer = nn.Linear(config.hidden_size, ATTRIBUTES, bias=False)
        self.gating = Gate(config.hidden_size)
        self.reward_transform_matrix = nn.Parameter(torch.randn(ATTRIBUTES, ATTRIBUTES))
        self.gating_tokens = gating_tokens
        self.post_init()

    def forward(self, input_ids):
        hidden, (ids,) = self.model(input_ids).last_hidden_state, input_ids.tolist()
        width = len(self.gating_tokens)
        (*_, gate) = (i for i in range(len(ids)) if ids[i : i + width] == self.gating_tokens)
        rewards = self.regression_layer(hidden[:, -1]) @ self.reward_transform_matrix
        return (self.gating(hidden[:, gate]) * rewards).sum(1)


class Valued(LlamaPreTrainedModel):
    """InternLM2's shape: the last id must be the reward token."""

    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.v_head = nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        assert input_ids[:, -1].eq(self.config.reward_token_id).all()
        return SequenceClassifierOutput(
            logits=self.v_head(self.model(input_ids, attention_mask).last_hidden_state[:, -1])
        )


@pytest.fixture(scope="module")
def llama3():
    return byte_bpe(VOCAB, template=LLAMA3, eos="<|eot_id|>")


@pytest.fixture(scope="module")
def gating_tokens(llama3):
    text = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    return llama3(text, add_special_tokens=False)["input_ids"]


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


@pytest.fixture(scope="module")
def gated(gating_tokens):
    return seeded(lambda: Gated(tiny_config(VOCAB, hidden=32, positions=512), gating_tokens))


@pytest.fixture(scope="module")
def valued():
    return seeded(lambda: Valued(tiny_config(VOCAB, hidden=32, positions=512, reward_token_id=REWARD_TOKEN)))


def chat_ids(tokenizer, question, answer):
    chat = [{"role": "user", "content": question}]
    before = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
    text = tokenizer.decode(answer)
    if text != text.strip() and "\ufffd" not in text:  # Llama 3's template trims it
        answer = tokenizer(text.strip(), add_special_tokens=False)["input_ids"]
    return before + answer + tokenizer("<|eot_id|>", add_special_tokens=False)["input_ids"]


def draw(chance):
    return [chance.randrange(10, VOCAB) for _ in range(chance.randint(1, 4))]


@pytest.mark.parametrize("slots", [2000, 130])
def test_the_gate_is_read_at_the_prompt_and_the_rewards_at_the_end(gated, llama3, gating_tokens, slots):
    @torch.no_grad()
    def expected(completion):
        answer = completion.tokens[:-1] if completion.eos else completion.tokens
        return gated(torch.tensor([chat_ids(llama3, completion.response.prompt.source, answer)])).item()

    scorer = ArmoRMReward(gated, llama3, gating_tokens=gating_tokens)
    live(scorer, text_prompts(TEXTS, llama3), expected, draw=draw, slots=slots, tokenizer=llama3, eos=4, rounds=8)


def test_the_gate_runs_once_per_prompt(gated, llama3, gating_tokens):
    calls = []
    hook = gated.gating.register_forward_hook(lambda *_: calls.append(1))
    policy = tiny_policy(VOCAB, positions=512, eos_token_id=4)
    engine = StarsEngine(policy, ArmoRMReward(gated, llama3, gating_tokens=gating_tokens), tokenizer=llama3)

    @torch.no_grad()
    def own(i, tokens, ends, eos):
        return gated(torch.tensor([chat_ids(llama3, TEXTS[i], tokens[:-1] if eos else tokens)])).item()

    checked = []
    out = assert_engine_agrees(
        engine, TEXTS, CONFIG, lambda *now: checked.append(len(calls)) or own(*now), num_return_sequences=3
    )
    hook.remove()
    assert checked[0] == len(TEXTS)
    assert any(segment.attempts > 1 for row in out.segments for segment in row)


@pytest.mark.parametrize("templated", [True, False])
def test_the_reward_token_stands_behind_template_and_answer(valued, llama3, templated):
    @torch.no_grad()
    def expected(completion):
        prompt, answer = completion.response.prompt, completion.tokens
        answer = answer[:-1] if completion.eos else answer
        ids = chat_ids(llama3, prompt.source, answer) if templated else prompt.ids + answer
        return valued(torch.tensor([[*ids, REWARD_TOKEN]])).logits.item()

    scorer = InternLM2Reward(valued, llama3 if templated else None)
    assert scorer.tree_model is not None, scorer.reason
    prompts = text_prompts(TEXTS, llama3) if templated else ids_prompts([[20, 30, 40], [50]])
    live(scorer, prompts, expected, draw=draw, tokenizer=llama3, eos=4, rounds=6)


def test_the_reward_token_stands_behind_an_answer_that_the_template_ends_otherwise(valued):
    ends = "{% if ';' in m['content'] %}<|im_end|>{% else %}<|eot_id|>{% endif %}"
    tokenizer = byte_bpe(VOCAB, template=LLAMA3.replace("<|eot_id|>", ends), eos="<|eot_id|>")
    scorer, (prompt,) = InternLM2Reward(valued, tokenizer), text_prompts(TEXTS[:1], tokenizer)
    answer = Completion(Response(prompt), tokenizer("fine; ok", add_special_tokens=False)["input_ids"], finished=True)
    scorer.begin([prompt], 8, 1, None)
    try:
        scorer.open([prompt], 8)
        _, ids, tail, _ = scorer.text(answer)
    finally:
        scorer.end()
    chat = [{"role": "user", "content": TEXTS[0]}, {"role": "assistant", "content": "fine; ok"}]
    assert [*ids, *tail] == [*tokenizer.apply_chat_template(chat, return_dict=False), REWARD_TOKEN]


def test_the_reward_token_is_there_in_full_passes_too_and_guides_the_engine(valued, llama3, monkeypatch):
    monkeypatch.setattr("stars_fast.rewards.classifier.TreeModel", refuse)
    scorer = InternLM2Reward(valued, llama3)
    assert scorer.tree_model is None and scorer.reason == "its attention is its own"
    engine = StarsEngine(tiny_policy(VOCAB, positions=512, eos_token_id=4), scorer, tokenizer=llama3)

    @torch.no_grad()
    def expected(i, tokens, ends, eos):
        ids = chat_ids(llama3, TEXTS[i], tokens[:-1] if eos else tokens)
        return valued(torch.tensor([[*ids, REWARD_TOKEN]])).logits.item()

    with pytest.warns(UserWarning, match="scored in full"):
        assert_engine_agrees(engine, TEXTS, CONFIG, expected)


def test_a_value_head_with_dropout_is_in_evaluation_mode_while_it_is_asked_and_in_its_own_afterwards():
    head = nn.Sequential(nn.Dropout(0.5), nn.Linear(16, 1)).train()
    policy = tiny_policy(VOCAB, eos_token_id=4)
    engine = StarsEngine(policy, ValueHeadReward(tiny_policy(VOCAB, seed=3), head, "policy"))

    @torch.no_grad()
    def expected(i, tokens, ends, eos):
        hidden = engine.reward.caches[0].model.model.model(torch.tensor([[20, 30, *tokens]])).last_hidden_state
        return head[1](hidden[0, -1]).item()

    assert_engine_agrees(engine, [[20, 30]], CONFIG, expected)
    assert all(module.training for module in head.modules())


@pytest.mark.parametrize("kind", ["gated", "valued"])
def test_that_the_policys_ids_are_read_is_said_in_one_word(request, kind, gating_tokens, recwarn):
    model = request.getfixturevalue(kind)
    scorer = (
        ArmoRMReward(model, "policy", gating_tokens=gating_tokens)
        if kind == "gated"
        else (InternLM2Reward(model, "policy"))
    )
    engine = StarsEngine(tiny_policy(VOCAB, positions=512), scorer)
    assert engine.generate([[20, *gating_tokens]], CONFIG, seed=0).errors == [None]
    assert not [one for one in recwarn if "ids" in str(one.message)]
    with pytest.raises(ValueError, match="tokenizer='mine'"):
        type(scorer)(model, "mine")


def refuse(*_):
    raise NotImplementedError("its attention is its own")


def test_models_of_another_shape_are_refused(gated, llama3):
    with pytest.raises(ValueError, match=r"has no config\.reward_token_id"):
        InternLM2Reward(tiny_reward(VOCAB))
    with pytest.raises(ValueError, match=r"lacks regression_layer, gating, reward_transform_matrix"):
        ArmoRMReward(tiny_reward(VOCAB))
    policy = tiny_policy(VOCAB, positions=512)
    with pytest.raises(ValueError, match=r"prompts\[0\] does not hold the tokens \[128009, .*gating_tokens="):
        StarsEngine(policy, ArmoRMReward(gated, llama3), tokenizer=llama3).generate(TEXTS, CONFIG)

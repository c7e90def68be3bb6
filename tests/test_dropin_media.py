"""What a processor made beside ids goes through ``model.generate`` as it came: not encoded, repeated or lost."""

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import stars_fast
from stars_fast import StarsConfig, StarsEngine

PICTURE, EOS = 60, 31
CONFIG = StarsConfig(segment_length=3, max_attempts=3, target_reward=1.5, beta=0.6, max_new_tokens=9)


@pytest.fixture(scope="module")
def policy():
    """A LLaVA of random weights: 16 slots a picture."""
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=32, patch_size=8),
        text_config=LlamaConfig(
            **sizes, vocab_size=64, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3,
            bos_token_id=None, eos_token_id=EOS, pad_token_id=0,
        ),
        image_token_id=PICTURE,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config).float().eval()
    for weight in model.model.multi_modal_projector.parameters():  # transformers' own are too small to matter
        torch.nn.init.normal_(weight, std=0.5)
    model.generation_config.pad_token_id = 0
    return model


def inputs(prompts=([5, 6], [7, 8, 9, 10])):
    """Prompts of a picture and text behind it, padded on the left."""
    rows = [[PICTURE] * 16 + prompt for prompt in prompts]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    pixels = torch.randn(len(rows), 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": pixels}


def reward(completion_ids):
    return [(sum(ids) % 7) / 2 - 1 for ids in completion_ids]


def facade(policy, given, config=CONFIG, **kwargs):
    return stars_fast.generate(policy, **given, reward_model=reward, stars_config=config, **kwargs)


def callback(policy, given, config=CONFIG, seed=None, **kwargs):
    how = stars_fast.decoding(reward, config, seed=seed)
    return policy.generate(**given, custom_generate=how, **{"do_sample": True, **kwargs})


both = pytest.mark.parametrize("generate", [facade, callback])
# transformers tells a call without max_new_tokens to set it; the length then comes from StarsConfig.
pytestmark = pytest.mark.filterwarnings("ignore:Using the model-agnostic default")


class Asked(Exception):
    pass


@both
def test_pictures_come_as_they_were_given_for_any_number_of_samples(policy, generate, monkeypatch):
    asked = []

    def finished(engine, arguments, streaming):
        asked.append(arguments)
        raise Asked

    monkeypatch.setattr(StarsEngine, "finished", finished)
    given = {**inputs(), "vision_feature_layer": -1}  # a setting of forward's, which is no tensor
    with pytest.raises(Asked):
        generate(policy, given, num_return_sequences=3)
    (arguments,) = asked
    assert arguments.prompts.keys() == given.keys() and arguments.attention_mask is None
    assert arguments.prompts["pixel_values"] is given["pixel_values"]
    assert all(torch.equal(arguments.prompts[name], given[name]) for name in ("input_ids", "attention_mask"))


@both
def test_text_alone_goes_to_a_model_that_takes_pictures(policy, generate):
    ids = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 10]])}
    out = generate(policy, ids, seed=[1, 2])
    assert torch.equal(out[:, :3], ids["input_ids"])
    want = StarsEngine(policy, reward).generate([[5, 6, 7], [8, 9, 10]], CONFIG.replace(top_k=50), seed=[1, 2])
    assert [row[3 : 3 + len(ids)].tolist() for row, ids in zip(out, want.completions, strict=True)] == want.completions


@both
def test_what_has_been_encoded_already_is_refused_by_name(policy, generate):
    encoded = {"image": policy.get_image_features(inputs()["pixel_values"])}
    given = {name: value for name, value in inputs().items() if name != "pixel_values"}
    with pytest.raises(ValueError, match=r"mm_encoder_outputs is given|not used by the model.*mm_encoder_outputs"):
        generate(policy, {**given, "mm_encoder_outputs": encoded})


@both
@pytest.mark.parametrize("name", ["pixel_values", "token_type_ids"])
def test_a_model_of_text_is_given_nothing_else(generate, name):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, eos_token_id=EOS))
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(ValueError, match=name):  # of the second GPT-2 would make other hidden states
        generate(model, {"input_ids": ids, name: torch.zeros_like(ids)})

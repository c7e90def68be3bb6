"""What a processor made beside ids goes through ``model.generate`` as it came: not encoded, repeated or lost."""

import pytest
import torch
from tiny_pictures import gemma3, gemma3_processor, llava, llava_processor, picture, qwen2_5_vl, qwen_inputs
from transformers import GPT2Config, GPT2LMHeadModel

import stars_fast
from stars_fast import StarsConfig, StarsEngine

CONFIG = StarsConfig(segment_length=3, max_attempts=4, target_reward=1.0, beta=0.6, max_new_tokens=6, ignore_eos=True)


def made_by(processor, place: str) -> dict:
    """A batch, padded on the left."""
    processor.tokenizer.padding_side = "left"
    texts = [f"{place} what?", f"{place} and what is this?"]
    return dict(processor(text=texts, images=[[picture(1)], [picture(2)]], return_tensors="pt", padding=True))


FAMILIES = {
    "llava": (llava, lambda: made_by(llava_processor(), "<image>")),
    "gemma3": (gemma3, lambda: made_by(gemma3_processor(), "<start_of_image>")),
    "qwen": (qwen2_5_vl, lambda: qwen_inputs((4, 8), (8, 4), (4, 4))),
}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    model, inputs = (make() for make in FAMILIES[request.param])
    return model, inputs


@pytest.fixture(scope="module")
def policy():
    return llava()


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


@both
def test_pictures_come_as_they_were_given_for_any_number_of_samples(pair, generate, monkeypatch):
    (policy, given), asked = pair, []

    def finished(engine, arguments, streaming):
        asked.append(arguments.prompts)
        raise ArithmeticError

    monkeypatch.setattr(StarsEngine, "finished", finished)
    with pytest.raises(ArithmeticError):
        generate(policy, given, num_return_sequences=3)
    (prompts,) = asked
    assert prompts.keys() == given.keys()
    assert all(torch.equal(prompts[name], given[name]) for name in ("input_ids", "attention_mask"))
    assert all(prompts[name] is given[name] for name in given.keys() - {"input_ids", "attention_mask"})


@both
def test_the_text_is_the_engines_and_depends_on_the_pictures(pair, generate):
    policy, given = pair
    settings = CONFIG.replace(top_k=50, num_return_sequences=2)  # transformers' own default
    want = StarsEngine(policy, reward).generate(given, settings, seed=3)
    width = given["input_ids"].shape[1]
    out = generate(policy, given, num_return_sequences=2, seed=3)
    assert torch.equal(out[:, :width], given["input_ids"].repeat_interleave(2, 0))
    assert out[:, width:].tolist() == want.completions
    swapped = {**given, "pixel_values": given["pixel_values"].flip(0)}
    assert not torch.equal(generate(policy, swapped, num_return_sequences=2, seed=3), out)


@both
def test_text_alone_goes_to_a_model_that_takes_pictures(policy, generate):
    prompts = [[5, 6, 7], [8, 9, 10]]
    out = generate(policy, {"input_ids": torch.tensor(prompts)}, seed=[1, 2])
    want = StarsEngine(policy, reward).generate(prompts, CONFIG.replace(top_k=50), seed=[1, 2])
    assert out[:, 3:].tolist() == want.completions


@both
@pytest.mark.parametrize("name", ["mm_encoder_outputs", "inputs_embeds", "vision_feature_layer"])
def test_what_is_no_processors_work_is_refused_by_name(policy, generate, name):
    given = FAMILIES["llava"][1]()
    pixels = given.pop("pixel_values")
    other = {
        "mm_encoder_outputs": lambda: {"image": policy.get_image_features(pixels)},
        "inputs_embeds": lambda: policy.get_input_embeddings()(given["input_ids"]),
        "vision_feature_layer": lambda: -1,
    }[name]()
    # Before 5.24 transformers itself knows nothing of outputs of encoders, and says so.
    with pytest.raises(ValueError, match=rf"{name} is given|not used by the model: \['{name}'\]"):
        generate(policy, {**given, name: other})


@both
@pytest.mark.parametrize("name", ["pixel_values", "token_type_ids"])
def test_a_model_of_text_is_given_nothing_else(generate, name):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, eos_token_id=31))
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(ValueError, match=name):  # of the second GPT-2 would make other hidden states
        generate(model, {"input_ids": ids, name: torch.zeros_like(ids)})

"""``model.generate(custom_generate="hub", trust_remote_code=True)``: the repository in ``hub/`` is the drop-in."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import sum_reward, tiny_policy, tiny_tokenizer, word_reward
from tiny_pictures import qwen2_5_vl, qwen_inputs
from transformers import AutoModelForCausalLM, TextStreamer

import stars_fast
from stars_fast import StarsConfig

HUB = Path(__file__).parents[1] / "hub"
FIELDS = {"segment_length": 4, "max_attempts": 5, "target_reward": 1.5, "beta": 0.6}
PROMPT = torch.tensor([[5, 6, 7]])
CALL = {"max_new_tokens": 12, "seed": 3}


@pytest.fixture(autouse=True)
def modules(tmp_path, monkeypatch):
    """transformers copies what it runs into its cache: into none of the user's."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.fixture(scope="module")
def policy():
    policy = tiny_policy(32, hidden=32)
    policy.generation_config.pad_token_id = 0
    return policy


@pytest.fixture(scope="module")
def expected(policy):
    config = StarsConfig(**FIELDS)
    return stars_fast.generate(policy, PROMPT, reward_model=sum_reward, stars_config=config, **CALL)


def custom(policy, folder=HUB, reward=sum_reward, **kwargs):
    call = {"trust_remote_code": True, "stars_config": FIELDS, **CALL, **kwargs}
    return policy.generate(PROMPT, custom_generate=str(folder), reward_model=reward, **call)


def test_the_folder_gives_the_ids_of_the_drop_in(policy, expected):
    assert torch.equal(custom(policy), expected)
    assert torch.equal(custom(policy, stars_config=StarsConfig(**FIELDS)), expected)
    assert torch.equal(custom(policy, revision="main", local_files_only=True), expected), "the hub's, not the engine's"


def test_the_output_object_has_the_rewards(policy, expected):
    out = custom(policy, return_dict_in_generate=True)
    assert torch.equal(out.sequences, expected)
    assert out.rewards.tolist() == pytest.approx(sum_reward([expected[0, 3:].tolist()]))


def test_a_streamer_and_a_reward_of_text_get_what_they_need(policy, capsys):
    tokenizer = tiny_tokenizer(32)
    ids = custom(policy, reward=word_reward, tokenizer=tokenizer, streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out.split() == tokenizer.decode(ids[0]).split()


def test_nothing_is_run_without_trust(policy):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        custom(policy, trust_remote_code=False)


def test_a_model_that_carries_the_folder_generates_by_it(policy, expected, tmp_path):
    policy.save_pretrained(tmp_path / "model")
    shutil.copytree(HUB / "custom_generate", tmp_path / "model" / "custom_generate")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
    ids = loaded.generate(inputs=PROMPT, reward_model=sum_reward, stars_config=FIELDS, **CALL)
    assert torch.equal(ids, expected)


def test_requirements_that_are_not_met_are_named(policy, tmp_path):
    shutil.copytree(HUB / "custom_generate", tmp_path / "repo" / "custom_generate")
    (tmp_path / "repo" / "custom_generate" / "requirements.txt").write_text("stars-fast>=99.0\n")
    with pytest.raises(ImportError, match="stars-fast>=99"):
        custom(policy, tmp_path / "repo")


def test_a_misspelt_setting_is_refused_by_name(policy):
    with pytest.raises(TypeError, match="'target' is not a field of StarsConfig"):
        custom(policy, stars_config={"target": 1.0})


def test_what_a_processor_made_goes_through():
    policy, given = qwen2_5_vl(), qwen_inputs((4, 8), (8, 4))
    config = StarsConfig(**FIELDS)
    expected = stars_fast.generate(policy, **given, reward_model=sum_reward, stars_config=config, **CALL)
    call = {"reward_model": sum_reward, "stars_config": FIELDS, "trust_remote_code": True, **CALL}
    assert torch.equal(policy.generate(**given, custom_generate=str(HUB), **call), expected)

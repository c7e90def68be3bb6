"""Models as users name them, or a refusal that says what they can be.

A tokenizer that is there is loaded, and one that cannot be is never passed over.
"""

import json

import pytest
import torch
from conftest import refused, sum_reward, tiny_config, tiny_policy, tiny_reward
from test_inputs_arguments import CONFIG, PROMPTS
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    BloomForCausalLM,
    LlamaForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from stars_fast import StarsEngine
from stars_fast.inputs import models as loading
from stars_fast.inputs.models import load_classifier, load_policy, placement
from stars_fast.rewards import RuleReward


@pytest.fixture
def folder(tmp_path, reward32):
    reward32.save_pretrained(tmp_path)
    return tmp_path


def test_a_folder_without_a_tokenizer_has_none(folder):
    assert load_classifier(folder, None)[1] is None


def test_a_family_with_an_empty_tokenizer_of_its_own_has_none(tmp_path):
    config = BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, num_labels=1)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    assert load_classifier(tmp_path, None)[1] is None


@pytest.mark.parametrize(
    "file, content",
    [("tokenizer.json", "{"), ("tokenizer_config.json", '{"tokenizer_class": "NoSuchTokenizer"}')],
    ids=["broken", "unknown class"],
)
def test_a_tokenizer_that_cannot_be_loaded_is_an_error_with_name_and_cause(folder, policy32, file, content):
    (folder / file).write_text(content)
    with pytest.raises(OSError, match=rf"{folder}.*reward_tokenizer=.*: \S") as caught:
        StarsEngine(policy32, folder)
    assert str(caught.value.__cause__) in str(caught.value)


def test_a_policys_tokenizer_that_cannot_be_loaded_is_an_error_too(tmp_path, policy32):
    policy32.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(OSError, match=rf"{tmp_path}.*pass tokenizer="):
        StarsEngine(tmp_path, sum_reward)


def test_models_may_be_given_as_paths(tmp_path, policy32, reward32):
    policy32.save_pretrained(tmp_path / "policy")
    reward32.save_pretrained(tmp_path / "reward")
    paths = StarsEngine(str(tmp_path / "policy"), tmp_path / "reward").generate(PROMPTS, CONFIG, seed=4)
    assert paths.completions == StarsEngine(policy32, reward32).generate(PROMPTS, CONFIG, seed=4).completions


def test_a_reward_model_with_more_than_one_label_is_refused(policy32):
    reward = LlamaForSequenceClassification(tiny_config(VOCAB, num_labels=2))
    with refused("reward", "2", "1"):
        StarsEngine(policy32, reward)


def test_a_causal_lm_as_the_reward_is_told_what_it_can_be(tmp_path, policy32):
    policy32.save_pretrained(tmp_path)
    for reward in (policy32, str(tmp_path)):
        with refused("reward", "JudgeReward", "ImplicitReward"):
            StarsEngine(policy32, reward)


@pytest.mark.parametrize("head", ["score.weight", "lm_head.weight"])
def test_a_checkpoint_without_its_head_is_refused_by_the_heads_name(tmp_path, policy32, reward32, head):
    policy32.save_pretrained(tmp_path / "score.weight")
    reward32.save_pretrained(tmp_path / "lm_head.weight")
    with pytest.raises(ValueError, match=rf"='{tmp_path}.*lacks {head}, .*random head"):
        load_classifier(tmp_path / head, None) if head == "score.weight" else load_policy(tmp_path / head, None)


def test_other_weights_that_a_checkpoint_lacks_are_warned_of(tmp_path, reward32):
    weights = {name: value for name, value in reward32.state_dict().items() if "o_proj" not in name}
    reward32.save_pretrained(tmp_path, state_dict=weights)
    with pytest.warns(UserWarning, match=r"lacks model\.layers\.0\.self_attn\.o_proj\.weight, .* random now"):
        load_classifier(tmp_path, None)


def test_a_policy_whose_head_is_its_embedding_is_whole(tmp_path, recwarn):
    tiny_policy(VOCAB, tie_word_embeddings=True).save_pretrained(tmp_path)
    load_policy(tmp_path, None)
    assert not recwarn.list


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_head_has_as_many_labels_as_rows_whatever_the_config_says(tmp_path, rows):
    model = LlamaForSequenceClassification(tiny_config(VOCAB, num_labels=rows))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    said = {name: value for name, value in config.items() if name not in ("id2label", "label2id", "num_labels")}
    (tmp_path / "config.json").write_text(json.dumps(said))
    if rows == 1:
        assert torch.equal(load_classifier(tmp_path, None)[0].score.weight, model.score.weight)
    else:
        with refused("reward", "num_labels=2", "exactly 1"):
            load_classifier(tmp_path, None)


class Judge(torch.nn.Module):
    def forward(self, completions):
        return sum_reward(completions)


def test_a_network_is_no_function_of_completions_unless_it_takes_them(policy32, reward32):
    with refused("DataParallel", "LlamaForSequenceClassification", r"\.module"):
        StarsEngine(policy32, torch.nn.DataParallel(reward32))
    with refused("policy", "DataParallel", r"\.module"):
        StarsEngine(torch.nn.DataParallel(policy32), sum_reward)
    with refused("Linear", "input", r"stars_fast\.rewards\.HiddenStateProbe"):
        StarsEngine(policy32, torch.nn.Linear(32, 1))
    assert not any(StarsEngine(policy32, Judge()).generate(PROMPTS, CONFIG, seed=0).errors)


@pytest.mark.parametrize("reward", [RuleReward, LlamaForSequenceClassification])
def test_a_class_is_no_reward(policy32, reward):
    with refused("reward", "class", rf"{reward.__name__}\(\.\.\.\)"):
        StarsEngine(policy32, reward)


def test_what_is_no_model_or_reward_is_refused(policy32, reward32):
    with refused("policy"):
        StarsEngine(reward32, sum_reward)
    with refused("policy"):
        StarsEngine(7, sum_reward)
    with refused("reward"):
        StarsEngine(policy32, 7)
    with refused("reward"):
        StarsEngine(policy32, tiny_policy(VOCAB))


def test_a_reward_model_of_another_vocabulary_needs_its_tokenizer(policy32):
    with refused("reward_tokenizer"):
        StarsEngine(policy32, tiny_reward(VOCAB // 2)).generate(PROMPTS, CONFIG)


@pytest.fixture
def accelerator(monkeypatch):
    """Let torch name an accelerator."""

    def name(kind):
        named = kind and torch.device(kind)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: named)

    return name


def test_models_go_to_an_accelerator_that_the_operators_have_kernels_for(accelerator):
    for kind, place in (("cuda", "cuda"), ("mps", "cpu"), (None, "cpu")):
        accelerator(kind)
        assert placement() == placement("auto") == torch.device(place)
        assert placement("meta") == torch.device("meta")


def test_models_given_by_name_are_placed_and_objects_stay(tmp_path, monkeypatch, policy32, reward32):
    policy32.save_pretrained(tmp_path / "policy")
    reward32.save_pretrained(tmp_path / "reward")
    monkeypatch.setattr(loading, "placement", lambda device=None: torch.device(device or "meta"))
    for load, role, object_ in ((load_policy, "policy", policy32), (load_classifier, "reward", reward32)):
        assert load(tmp_path / role, None)[0].device.type == "meta"
        assert load(tmp_path / role, None, "cpu")[0].device.type == "cpu"
        assert object_.device.type == "cpu"
    assert load_policy(policy32, None)[0] is policy32
    engine = StarsEngine(policy32, tmp_path / "reward", device="cpu")
    assert engine.reward.model.device.type == "cpu"


def test_a_device_is_refused_where_nothing_is_loaded_or_none_is_there(tmp_path, policy32):
    with pytest.raises(ValueError, match="device='cpu': policy and reward are objects"):
        StarsEngine(policy32, sum_reward, device="cpu")
    policy32.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="device='abacus'"):
        StarsEngine(tmp_path, sum_reward, device="abacus")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_this_machine_lacks_is_named(tmp_path, policy32):
    policy32.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="device='cuda'"):
        load_policy(tmp_path, None, "cuda")


def test_a_device_without_room_for_a_model_is_not_taken_for_one_that_is_lacking(monkeypatch):
    def full(model, where):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(PreTrainedModel, "to", full)
    with pytest.raises(torch.OutOfMemoryError):
        load_policy("demo", None, "cpu")


def test_the_models_of_the_package_are_called_demo():
    policy, tokenizer, _ = load_policy("demo", None, "cpu")
    reward, own = load_classifier("demo", None, "cpu", dtype="bfloat16")
    assert policy.dtype == torch.float32 and reward.dtype == torch.bfloat16
    assert tokenizer.get_vocab() == own.get_vocab()


def test_a_folder_that_is_not_there_is_said_in_one_line():
    with pytest.raises(FileNotFoundError, match=r"no folder \./nowhere: give a model's folder, a hub id or 'demo'$"):
        load_policy("./nowhere", None)


VOCAB = 32


def test_an_unreachable_family_is_refused_by_name():
    policy = BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=1, n_head=2))
    with refused("(?i:bloom\\w*)"):
        StarsEngine(policy, sum_reward)


def test_a_stateful_model_is_refused_by_name():
    mamba = MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4))
    with refused("(?i:mamba\\w*)"):
        StarsEngine(mamba, sum_reward)


def test_linear_attention_is_refused_by_name():
    config = Qwen3NextConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        linear_num_key_heads=1,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    )
    with refused("(?i:qwen3_?next\\w*)"):
        StarsEngine(Qwen3NextForCausalLM(config), sum_reward)

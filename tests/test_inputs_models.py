"""What cannot be a policy or a reward is refused by name when the engine is made."""

import pytest
from conftest import refused, sum_reward, tiny_config, tiny_policy, tiny_reward
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from stars_fast import StarsEngine
from stars_fast.rewards import RuleReward

VOCAB = 32


def test_a_reward_model_with_more_than_one_label_is_refused(policy32):
    reward = LlamaForSequenceClassification(tiny_config(VOCAB, num_labels=2))
    with refused("reward", "2", "1"):
        StarsEngine(policy32, reward)


def test_a_causal_lm_as_the_reward_is_told_what_it_can_be(tmp_path, policy32):
    policy32.save_pretrained(tmp_path)
    for reward in (policy32, str(tmp_path)):
        with refused("reward", "JudgeReward", "ImplicitReward"):
            StarsEngine(policy32, reward)


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


@pytest.mark.parametrize("role", ["policy", "reward"])
def test_dynamic_rotary_scaling_is_refused(policy32, role):
    config = tiny_config(VOCAB, num_labels=1)
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with refused(role, ".?dynamic.?"):
        if role == "policy":
            StarsEngine(LlamaForCausalLM(config), sum_reward)
        else:
            StarsEngine(policy32, LlamaForSequenceClassification(config))


def test_a_reward_model_of_another_vocabulary_needs_its_tokenizer(policy32):
    with refused("reward_tokenizer"):
        StarsEngine(policy32, tiny_reward(VOCAB // 2)).generate([[5, 6, 7]], target_reward=1.5)

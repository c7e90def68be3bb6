"""What one token multiplies is counted from the model itself."""

import torch
from conftest import tiny_policy, tiny_reward
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from stars_fast.report.weights import Weights


def matrices(model):
    return sum(parameter.numel() for parameter in model.parameters() if parameter.ndim > 1)


def test_an_embedding_table_that_is_only_looked_up_multiplies_nothing():
    tied, untied = tiny_policy(32, tie_word_embeddings=True), tiny_policy(32, tie_word_embeddings=False)
    assert Weights.of(tied).multiplied == Weights.of(untied).multiplied == matrices(tied)
    reward = tiny_reward(32)
    assert Weights.of(reward).multiplied == matrices(reward.model.layers) + reward.score.weight.numel()
    assert Weights.of(reward).head == reward.score.weight.numel()


def test_a_token_is_multiplied_with_the_experts_it_is_routed_to():
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 1}
    with torch.device("meta"):
        found = Weights.of(MixtralForCausalLM(MixtralConfig(**sizes, **heads)))
    assert found.experts == 4 * 3 * 8 * 16
    assert found.active == found.experts / 4 + 4 * 8 * 8 + 4 * 8  # attention; the router


def test_a_module_that_is_no_language_model_is_multiplied_as_a_whole():
    probe = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    assert Weights.of(probe).multiplied == 4 * 8 + 8 * 2

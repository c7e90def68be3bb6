"""Models of real shapes with random weights, made where they run: speed does not depend on the weights."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from gpu_parts.runner import Runner
from stars_fast.roofline import ModelCost, config_named

# Short names of policy and reward model.
PAIRS = {
    "llama-2-7b": ("llama-2-7b", "llama-2-7b-reward"),
    "qwen2.5-7b": ("qwen2.5-7b", "llama-2-7b-reward"),
    "llama-3.2-1b": ("llama-3.2-1b", "llama-3.2-1b-reward"),
}


@dataclass
class Pair:
    """A policy and a reward model over the same ids, and what each costs."""

    name: str
    policy: PreTrainedModel
    reward: PreTrainedModel
    policy_cost: ModelCost
    reward_cost: ModelCost

    @property
    def vocab(self) -> int:
        return int(self.policy.config.vocab_size)

    def prompts(self, count: int, length: int) -> list[list[int]]:
        """Random prompts, the same ones whenever they are asked for."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(10, self.vocab, (count, length), generator=generator).tolist()


def pair(runner: Runner, name: str) -> Pair:
    """The models of that name; those asked for before are freed, so that two 7B models are there at most."""
    kept = runner.shared.get("pair")
    if kept is None or kept.name != name:
        free(runner)
        runner.shared["pair"] = kept = _made(name, runner.device, runner.tiny)
    return kept


def free(runner: Runner) -> None:
    """Give back the memory of models and engines."""
    for key in ("pair", "engine"):
        runner.shared.pop(key, None)
    gc.collect()
    if runner.on_gpu:
        torch.cuda.empty_cache()


def configs(name: str, tiny: bool) -> tuple[PreTrainedConfig, PreTrainedConfig]:
    """Configs of policy and reward model. The reward model's vocabulary is the policy's, as it reads its ids."""
    if tiny:
        return _tiny_config(), _tiny_config(num_labels=1)
    policy, reward = (config_named(one) for one in PAIRS[name])
    reward.vocab_size = policy.vocab_size
    return policy, reward


def built(auto: Any, config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A model with transformers' own random weights. All of it is made on the device, where 7B take a second or two;
    rotary frequencies are computed there, and tied weights are tied.
    """
    torch.manual_seed(0)
    with device:
        model = auto.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def _made(name: str, device: torch.device, tiny: bool) -> Pair:
    dtype = torch.float32 if tiny else torch.bfloat16
    policy, reward = configs(name, tiny)
    return Pair(
        name,
        built(AutoModelForCausalLM, policy, device, dtype),
        built(AutoModelForSequenceClassification, reward, device, dtype),
        ModelCost.from_config(policy, "policy", dtype),
        ModelCost.from_config(reward, "reward", dtype),
    )


def _tiny_config(**fields: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        initializer_range=0.3,
        **fields,
    )

"""Models of real shapes with random weights, made where they run: speed does not depend on the weights."""

from __future__ import annotations

import gc
from dataclasses import replace

import torch
from transformers import PreTrainedConfig

from benchmarks.gpu_parts.runner import Runner
from benchmarks.roofline import ModelCost, config_named
from stars_fast.bench.models import Pair, made_pair, random_pair

# Short names of policy and reward model.
PAIRS = {
    "llama-2-7b": ("llama-2-7b", "llama-2-7b-reward"),
    "qwen2.5-7b": ("qwen2.5-7b", "llama-2-7b-reward"),
    "llama-3.2-1b": ("llama-3.2-1b", "llama-3.2-1b-reward"),
}


def pair(runner: Runner, name: str) -> Pair:
    """The models of that name; those asked for before are freed, so that two 7B models are there at most."""
    kept = runner.shared.get("pair")
    if kept is None or kept.name != name:
        free(runner)
        if runner.tiny:
            kept = replace(random_pair("1m", torch.float32, runner.device), name=name)
        else:
            kept = made_pair(name, *configs(name), torch.bfloat16, runner.device)
        runner.shared["pair"] = kept
    return kept


def costs(models: Pair) -> tuple[ModelCost, ModelCost]:
    """What the roofline has to know of policy and reward model."""
    return ModelCost.of(models.policy), ModelCost.of(models.reward)


def free(runner: Runner) -> None:
    """Give back the memory of models and engines."""
    for key in ("pair", "pilots"):
        runner.shared.pop(key, None)
    gc.collect()
    if runner.on_gpu:
        torch.cuda.empty_cache()


def configs(name: str) -> tuple[PreTrainedConfig, PreTrainedConfig]:
    """Configs of policy and reward model. The reward model's vocabulary is the policy's, as it reads its ids."""
    policy, reward = (config_named(one) for one in PAIRS[name])
    reward.vocab_size = policy.vocab_size
    return policy, reward

"""The two models that are measured, and what a forward pass of each reads and computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from stars_fast.report.weights import Weights, stored_bytes
from stars_fast.tree.model import vocabulary

# Llamas with random weights, by their parameters: speed does not depend on the weights.
SIZES: dict[str, dict[str, int]] = {
    "27m": {
        "vocab_size": 8192,
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 7,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    },
    "1m": {
        "vocab_size": 1024,
        "hidden_size": 128,
        "intermediate_size": 344,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    },
}
_POSITIONS = 8192


@dataclass
class Pair:
    """A policy and a reward model that reads its ids, on one device."""

    name: str
    policy: PreTrainedModel
    reward: PreTrainedModel
    openings: list[list[int]] = field(default_factory=list)  # prompts of their own; without them, random ids are
    random: bool = False  # nobody has trained them

    def __post_init__(self) -> None:
        self.weights = {"policy": Weights.of(self.policy), "reward": Weights.of(self.reward)}

    @property
    def device(self) -> torch.device:
        return self.policy.device

    @property
    def vocabulary(self) -> int:
        """Ids the policy has embeddings for."""
        return vocabulary(self.policy)

    def prompts(self, count: int, length: int | None) -> list[list[int]]:
        """Prompts, the same ones whenever they are asked for: random ids, or the openings where ``length`` is None."""
        if length is None:
            return [self.openings[i % len(self.openings)] for i in range(count)]
        generator = torch.Generator().manual_seed(0)
        return torch.randint(1, self.vocabulary, (count, length), generator=generator).tolist()


def random_pair(size: str, dtype: torch.dtype, device: torch.device) -> Pair:
    """Policy and reward model of a size in :data:`SIZES`, as :func:`made_pair` makes them.

    Raises
    ------
    ValueError
        For a size that is not there.
    """
    if size not in SIZES:
        raise ValueError(f"size={size!r}: choose from {', '.join(SIZES)}")
    shape: dict[str, Any] = dict(SIZES[size])
    shape |= {"max_position_embeddings": _POSITIONS, "tie_word_embeddings": True, "pad_token_id": 0}
    configs = LlamaConfig(**shape), LlamaConfig(**shape | {"num_labels": 1})
    return made_pair(f"random Llamas of {size.upper()} parameters", *configs, dtype, device)


def made_pair(
    name: str, policy: PreTrainedConfig, reward: PreTrainedConfig, dtype: torch.dtype, device: torch.device
) -> Pair:
    """Models of these shapes with transformers' own random weights, always the same ones.

    They are made on the device, where 7B parameters take a second or two.
    """
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        causal = AutoModelForCausalLM.from_config(policy, dtype=dtype)
        classifier = AutoModelForSequenceClassification.from_config(reward, dtype=dtype)
    for model in (causal, classifier):
        model.eval().requires_grad_(False)
    return Pair(name, causal, classifier, random=True)


@dataclass
class Passes:
    """What forward passes have read of the weights, and multiplied with them. Attention is not counted."""

    bytes: int = 0
    operations: int = 0


@contextmanager
def counting(pair: Pair) -> Iterator[Passes]:
    """Count the forward passes of both models inside, whoever runs them: by hooks, which cost microseconds.

    The replay of a CUDA graph runs no module, and is not counted.
    """
    passes = Passes()

    def body(weights: Weights) -> Any:
        def hook(module: nn.Module, inputs: Any, keywords: dict[str, Any]) -> None:
            ids = keywords.get("input_ids", inputs[0] if inputs else None)
            tokens = 0 if ids is None else ids.numel()
            passes.bytes += weights.body_bytes
            passes.operations += 2 * weights.active * tokens

        return hook

    def head(module: nn.Module, inputs: Any) -> None:
        weight: torch.Tensor = module.weight  # type: ignore[assignment]
        passes.bytes += stored_bytes(weight)
        passes.operations += 2 * inputs[0].numel() * weight.shape[0]

    with ExitStack() as stack:
        for role, model in (("policy", pair.policy), ("reward", pair.reward)):
            hook = body(pair.weights[role])
            stack.callback(model.base_model.register_forward_pre_hook(hook, with_kwargs=True).remove)
        output = pair.policy.get_output_embeddings()
        stack.callback(output.register_forward_pre_hook(head).remove)
        yield passes

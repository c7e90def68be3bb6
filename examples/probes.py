"""A small network on a policy's hidden states that says whether a token does good, taught by a guide (MARA's probe)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from training import tensor
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

LENGTH = 128  # tokens read of a text
BATCH = 1024


def new_probe(hidden: int) -> torch.nn.Sequential:
    """Logits of reject and accept, in the sizes of arXiv 2505.19743."""
    layers = [torch.nn.Linear(hidden, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 256), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(256, 2))


@torch.no_grad()
def states_and_rises(
    policy: LlamaForCausalLM, guide: LlamaForSequenceClassification, docs: Sequence[np.ndarray]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The policy's last hidden state at each token ``[N, H]``, and how much it raised the guide's score ``[N]``."""
    states, rises = [], []
    for doc in docs:
        ids = tensor(doc[:LENGTH])[None]
        states.append(policy.model(ids, use_cache=False).last_hidden_state[0, 1:])
        scores = guide.score(guide.model(ids, use_cache=False).last_hidden_state)[0, :, 0]
        rises.append(scores.diff())
    return torch.cat(states), torch.cat(rises)


def probe_loss(probe: Any, states: torch.Tensor, rises: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of "the score rises"; a token counts by how much it changes the score."""
    each = F.cross_entropy(probe(states), (rises > 0).long(), reduction="none")
    return (each * rises.abs()).sum() / rises.abs().sum()


def train_probe(
    policy: LlamaForCausalLM,
    guide: LlamaForSequenceClassification,
    docs: Sequence[np.ndarray],
    held: Sequence[np.ndarray],
    epochs: int,
    seed: int,
) -> tuple[torch.nn.Sequential, dict[str, float]]:
    """The probe, and the weighted share of held tokens that it is right about."""
    torch.manual_seed(seed)
    states, rises = states_and_rises(policy, guide, docs)
    probe = new_probe(states.shape[1])
    optimizer = torch.optim.AdamW(probe.parameters(), lr=3e-4)
    for _ in range(epochs):
        for part in torch.randperm(len(states)).split(BATCH):
            probe_loss(probe, states[part], rises[part]).backward()
            optimizer.step()
            optimizer.zero_grad()
    probe.eval()
    states, rises = states_and_rises(policy, guide, held)
    with torch.no_grad():
        right = (probe(states).argmax(1) == (rises > 0)).float()
    accuracy = float((right * rises.abs()).sum() / rises.abs().sum())
    return probe, {"tokens": len(states), "held_weighted_accuracy": accuracy}

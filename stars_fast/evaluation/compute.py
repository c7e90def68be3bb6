"""How large the models are that score."""

from __future__ import annotations

from typing import Any

from torch import nn

from stars_fast.report.weights import Weights
from stars_fast.rewards import Reward


def reward_parameters(reward: Reward) -> float:
    """Weights that a reward token is multiplied with; a mean over a scorer's models, which read the same texts."""
    models: list[Any] = [tree.model for tree in reward.tree_models] or [getattr(reward, "model", None)]
    sizes = [Weights.of(model).multiplied for model in models if isinstance(model, nn.Module)]
    return sum(sizes) / len(sizes) if sizes else 0.0

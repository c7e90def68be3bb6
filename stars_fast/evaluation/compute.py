"""What a method spent, in forward passes: tokens that went through each model, and how large the models are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from stars_fast.methods import RSD, Args, Method, PersonaJudge
from stars_fast.report.weights import Weights
from stars_fast.rewards import Reward


def reward_parameters(reward: Reward) -> float:
    """Weights that a reward token is multiplied with; a mean over a scorer's models, which read the same texts."""
    models: list[Any] = [tree.model for tree in reward.tree_models] or [getattr(reward, "model", None)]
    sizes = [Weights.of(model).multiplied for model in models if isinstance(model, nn.Module)]
    return sum(sizes) / len(sizes) if sizes else 0.0


def passes(method: Method, stats: Mapping[str, Any]) -> tuple[float, float]:
    """Tokens that went through the policy and through a draft model, about, prompts left out.

    For most methods the policy's are the tokens drawn from it. ARGS looks at likely tokens without running the policy
    over them. RSD's draft model writes every segment and reads what the policy writes instead; the policy reads or
    writes what is committed. Persona-judge drafts, reads the draft under the other prompt, and catches up.
    """
    drawn, committed = stats["policy_tokens"], stats["committed_tokens"]
    if isinstance(method, Args):
        return committed, 0
    if isinstance(method, PersonaJudge):
        return 3 * drawn, 0
    if isinstance(method, RSD):
        return committed, drawn
    return drawn, 0

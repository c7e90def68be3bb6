"""What a method spent, in forward passes: tokens that went through each model, and how large the models are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from stars_fast.methods import RSD, Args, Method, PersonaJudge
from stars_fast.rewards import Reward


def multiplied_parameters(model: nn.Module) -> int:
    """Parameters that one token's forward pass multiplies: all but an input embedding table that is only looked up.

    Twice this number is the usual estimate of a forward pass's operations per token, attention left out.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    embed: Callable[[], nn.Module] | None = getattr(model, "get_input_embeddings", None)
    head: Callable[[], nn.Module | None] | None = getattr(model, "get_output_embeddings", None)
    if embed is None:
        return total
    table, projection = embed().weight, head() if head is not None else None
    tied = projection is not None and projection.weight is table
    return total if tied else total - int(table.numel())  # type: ignore[operator]


def reward_parameters(reward: Reward) -> float:
    """Parameters per reward token: a mean over the models of a scorer that has several, which read the same texts."""
    models: list[Any] = [tree.model for tree in reward.tree_models] or [getattr(reward, "model", None)]
    sizes = [multiplied_parameters(model) for model in models if isinstance(model, nn.Module)]
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

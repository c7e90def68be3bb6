"""What forward passes read of a model's weights, and multiply with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Weights:
    """Weights of a model, by when they are read. All counts are numbers, not bytes."""

    parameters: int  # all weights, tied ones once
    # All but embedding tables and head, which every forward pass reads. Of a mixture of experts all experts, an upper
    # bound that few rows do not reach.
    body: int
    active: int  # matrix weights of the body that one token is multiplied with: of the experts, those it is routed to
    experts: int  # in the body
    head: int  # read for rows that sample or are scored: a policy's output embedding, tied or not

    @classmethod
    def of(cls, model: nn.Module) -> Weights:
        """Count the weights of a model, which may lie on the ``meta`` device."""
        in_head = {id(p) for p in head_weights(model)}
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        named = list(model.named_parameters())
        body = [(name, p) for name, p in named if id(p) not in in_head | tables]
        share = _routed_share(getattr(model, "config", None))
        return cls(
            parameters=sum(p.numel() for _, p in named),
            body=sum(p.numel() for _, p in body),
            active=round(sum(p.numel() * (share if ".experts." in name else 1) for name, p in body if p.ndim > 1)),
            experts=sum(p.numel() for name, p in body if ".experts." in name),
            head=sum(p.numel() for _, p in named if id(p) in in_head),
        )

    @property
    def multiplied(self) -> int:
        """Weights that a token is multiplied with where its logits or score are wanted."""
        return self.active + self.head


def head_weights(model: nn.Module) -> list[nn.Parameter]:
    """The output embedding, tied or not, and what else lies outside the model's body."""
    outputs = getattr(model, "get_output_embeddings", lambda: None)()
    in_body = {id(p) for p in getattr(model, "base_model", model).parameters()}
    if outputs is not None:
        in_body.discard(id(outputs.weight))
    return [p for p in model.parameters() if id(p) not in in_body]


def _routed_share(config: Any) -> float:
    """Share of the experts that one token is routed to."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((value for name in names if (value := getattr(config, name, None))), None)
    routed = getattr(config, "num_experts_per_tok", None)
    return routed / experts if experts and routed else 1.0

"""What forward passes read of a model's weights, and multiply with them; quantised ones too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


@dataclass(frozen=True)
class Weights:
    """Weights of a model, by when they are read. All counts are numbers of the model, but those that say bytes.

    Quantised weights are as many numbers as they stand for. Their scales are bytes only.
    """

    parameters: int  # all weights, tied ones once
    # All but embedding tables and head, which every forward pass reads. Of a mixture of experts all experts, an upper
    # bound that few rows do not reach.
    body: int
    active: int  # matrix weights of the body that one token is multiplied with: of the experts, those it is routed to
    experts: int  # in the body
    head: int  # read for rows that sample or are scored: a policy's output embedding, tied or not
    bytes: int  # of all weights
    body_bytes: int
    head_bytes: int

    @classmethod
    def of(cls, model: nn.Module) -> Weights:
        """Count the weights of a model, which may lie on the ``meta`` device."""
        in_head = {id(p) for p in head_weights(model)}
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        found = list(_weights(model))
        body = [one for one in found if id(one.tensor) not in in_head | tables]
        head = [one for one in found if id(one.tensor) in in_head]
        share = _routed_share(getattr(model, "config", None))
        return cls(
            parameters=sum(one.numbers for one in found),
            body=sum(one.numbers for one in body),
            active=round(sum(one.numbers * (share if one.of_expert else 1) for one in body if one.tensor.ndim > 1)),
            experts=sum(one.numbers for one in body if one.of_expert),
            head=sum(one.numbers for one in head),
            bytes=sum(stored_bytes(one.tensor) for one in found),
            body_bytes=sum(stored_bytes(one.tensor) for one in body),
            head_bytes=sum(stored_bytes(one.tensor) for one in head),
        )

    @property
    def multiplied(self) -> int:
        """Weights that a token is multiplied with where its logits or score are wanted."""
        return self.active + self.head


def plain_tensors(tensor: Any) -> Iterator[torch.Tensor]:
    """The tensors in which the numbers lie: sharded and quantised weights are wrappers of several."""
    if is_traceable_wrapper_subclass(tensor):
        for part in tensor.__tensor_flatten__()[0]:
            yield from plain_tensors(getattr(tensor, part))
    elif isinstance(tensor, torch.Tensor):  # a shard's mesh is none
        yield tensor


def stored_bytes(tensor: torch.Tensor) -> int:
    """Bytes that a weight takes here, scales included where they are part of it."""
    return sum(part.nbytes for part in plain_tensors(tensor))


class _Weight(NamedTuple):
    tensor: torch.Tensor
    numbers: int  # of the model that it holds
    of_expert: bool


def _weights(model: nn.Module) -> Iterator[_Weight]:
    """All parameters, tied ones once, and the buffers in which some quantised layers keep theirs."""
    seen = set[int]()
    for name, module in model.named_modules():
        own, sizes = dict(module.named_parameters(recurse=False)), _sizes(module)
        if sizes and any(_is_packed(one) for one in module.buffers(recurse=False)):
            own |= dict(module.named_buffers(recurse=False))
        packed = any(_is_packed(one) for one in own.values())
        matrix = max((key for key, one in own.items() if one.ndim > 1), key=lambda key: own[key].nbytes, default=None)
        for key, one in own.items():
            if id(one) not in seen:
                seen.add(id(one))
                numbers = one.numel()
                if key != "bias" and sizes and matrix is not None:  # scales and zero points lie beside it
                    numbers = sizes * (key == matrix)
                elif key != "bias" and packed:
                    numbers *= _is_packed(one)
                yield _Weight(one, numbers, ".experts." in f"{name}.{key}")


def _sizes(module: nn.Module) -> int:
    """Numbers in the matrix of a linear layer, of whatever class; 0 of what is none."""
    sizes = getattr(module, "in_features", 0), getattr(module, "out_features", 0)
    return sizes[0] * sizes[1] if all(isinstance(size, int) for size in sizes) else 0


def _is_packed(tensor: torch.Tensor) -> bool:
    """Whether a matrix is stored in integers or 8 bits, plainly: a wrapper says the dtype that it stands for."""
    return tensor.ndim > 1 and (tensor.dtype.itemsize == 1 or not tensor.dtype.is_floating_point)


def head_weights(model: nn.Module) -> list[nn.Parameter]:
    """The output embedding, tied or not, and what else lies outside the model's body."""
    outputs = getattr(model, "get_output_embeddings", lambda: None)()
    in_body = {id(p) for p in getattr(model, "base_model", model).parameters()}
    if outputs is not None:
        in_body.discard(id(getattr(outputs, "weight", None)))
    return [p for p in model.parameters() if id(p) not in in_body]


def _routed_share(config: Any) -> float:
    """Share of the experts that one token is routed to."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((value for name in names if (value := getattr(config, name, None))), None)
    routed = getattr(config, "num_experts_per_tok", None)
    return routed / experts if experts and routed else 1.0

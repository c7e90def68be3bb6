"""Linear layers that read the same input, as one product: query, key and value; gate and up.

One product with all their rows reads the weights faster than two or three products (docs/findings/gpu-heartbeat.md).
The layers stay what they are: their weights become views of one tensor, which takes no more memory, and each computes
the whole product and takes its columns. Compiled code then keeps one of the products that are equal. Were such layers
given different inputs, their products would differ and stay apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import nn

# What families in transformers call layers that read the same input. Some have one layer for all (Phi-3, GPT-2).
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_ALIGNED = 16  # bytes: a view that begins elsewhere is a worse operand than a tensor of its own
_WRITES = {"setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"}


class _Part(nn.Linear):
    """Computes the product that it shares, and takes its own columns. A class: compiled code goes by classes."""

    whole: tuple[torch.Tensor, torch.Tensor | None]  # weight and bias of all siblings
    before: tuple[torch.Tensor, ...]  # weights of those before this one

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = sum(weight.shape[0] for weight in self.before)
        return F.linear(x, *self.whole)[..., first : first + self.weight.shape[0]]


class SharedProducts:
    """The siblings among the parts of some modules: plain linear layers, and no adapters, quantised or sharded weights.

    Parameters
    ----------
    modules : iterable of nn.Module
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        parents = {id(part): part for module in modules for part in module.modules()}.values()
        found = [[getattr(parent, name, None) for name in names] for parent in parents for names in _SIBLINGS]
        self._groups = [group for group in found if _are_plain(group)]
        self._parts: list[tuple[nn.Linear, dict[str, Any]]] = []  # each layer, and what it needs as a part
        self.refresh()

    def refresh(self) -> None:
        """Make siblings' weights views of one tensor, where they are not (any more)."""
        self._groups = [group for group in self._groups if _fit_together(group)]
        self._parts = []
        for group in self._groups:
            with torch.no_grad():
                whole = _joined([layer.weight for layer in group]), _bias(group)
            for place, layer in enumerate(group):
                before = tuple(one.weight for one in group[:place])
                self._parts.append((layer, {"whole": whole, "before": before}))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let the layers compute their shared products inside. Only for code that keeps one of equal products."""
        own = [layer.__class__ for layer, _ in self._parts]
        try:
            for layer, needs in self._parts:
                vars(layer).update(needs)
                layer.__class__ = _Part
            yield
        finally:
            for (layer, needs), kind in zip(self._parts, own, strict=True):
                layer.__class__ = kind
                for name in needs:
                    vars(layer).pop(name, None)


def merge_equal_products(graph: torch.fx.Graph) -> None:
    """Keep one of the linear layers with the same operands, in a graph that Dynamo has made."""
    kept: dict[Any, torch.fx.Node] = {}
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is F.linear:
            first = kept.setdefault((node.args, tuple(node.kwargs.items())), node)
            if first is not node:
                node.replace_all_uses_with(first)
                graph.erase_node(node)
        elif _may_write(node):
            kept.clear()


def _may_write(node: torch.fx.Node) -> bool:
    """Whether a node may change what an operand holds."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.op not in ("call_function", "call_method"):
        return False
    return name.endswith("_") or name in _WRITES or bool(node.kwargs.get("out") or node.kwargs.get("inplace"))


def _are_plain(group: list[Any]) -> TypeGuard[list[nn.Linear]]:
    return all(type(layer) is nn.Linear and "forward" not in vars(layer) for layer in group)


def _fit_together(group: list[nn.Linear]) -> bool:
    """Whether weights and biases are plain tensors that one tensor can hold."""
    weights, biases = [layer.weight for layer in group], [layer.bias for layer in group]
    if any(bias is None for bias in biases):
        return all(bias is None for bias in biases) and _match(weights)
    return _match(weights) and _match(biases)


def _match(parts: Sequence[torch.Tensor]) -> bool:
    kinds = {(type(part), part.dtype, part.device, part.shape[1:], part.is_inference()) for part in parts}
    if len(kinds) > 1 or type(parts[0]) is not nn.Parameter or parts[0].is_inference():
        return False
    return all(part.is_contiguous() and part.nbytes % _ALIGNED == 0 for part in parts)


def _bias(group: list[nn.Linear]) -> torch.Tensor | None:
    return None if group[0].bias is None else _joined([layer.bias for layer in group])


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """One tensor with the rows of all; the parts are views of it afterwards."""
    rows, place = sum(len(part) for part in parts), parts[0].storage_offset()
    storage = parts[0].untyped_storage().data_ptr()
    for part in parts:
        if part.untyped_storage().data_ptr() != storage or part.storage_offset() != place:
            break
        place += part.numel()
    else:
        return parts[0].data.as_strided((rows, *parts[0].shape[1:]), parts[0].stride())
    whole = torch.cat([part.data for part in parts])
    for part, view in zip(parts, whole.split([len(part) for part in parts]), strict=True):
        part.data = view
    return whole

"""Operations of a compiled decoder layer that one launch can do: rewrites of the graph that torch has traced.

Inductor joins what is pointwise, up to the products and the attention, which are not its own. What stands around those
is joined here, by pattern: where a family writes it otherwise, its layers stay as they were.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor

from stars_fast.ops._library import CHECKS, PRODUCTS, library

_ADD = (operator.add, torch.add)
_MUL = (operator.mul, torch.mul)
_NEG = (operator.neg, torch.neg)
_MOST_WEIGHTS = 3  # of one product
_IN_PLACE = {
    operator.iadd,
    operator.iand,
    operator.iconcat,
    operator.ifloordiv,
    operator.ilshift,
    operator.imatmul,
    operator.imod,
    operator.imul,
    operator.ior,
    operator.ipow,
    operator.irshift,
    operator.isub,
    operator.itruediv,
    operator.ixor,
    operator.setitem,
    operator.delitem,
}


def join(module: fx.GraphModule) -> None:
    """Rewrite the graph of a layer, in which functions and methods of torch still stand as they were called."""
    graph = module.graph
    if not CHECKS:  # the operator that rotates and appends does not check what stands in its arguments
        for node in graph.find_nodes(op="call_function", target=torch.ops.stars_fast.attend.default):
            _join_rotary(graph, node)
    (output,) = graph.find_nodes(op="output")
    for node in output.all_input_nodes:
        _join_residual(graph, node)
    if PRODUCTS:
        _join_products(graph)
    graph.lint()
    module.recompile()


def _product_onto(total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """``total += x @ weight.T`` in place, rounded once."""
    total.view(-1, total.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), weight.t())


library.define("product_onto(Tensor(a!) total, Tensor x, Tensor weight) -> ()")
library.impl("product_onto", _product_onto, "CompositeExplicitAutograd")
torch.library.register_fake("stars_fast::product_onto", lambda *_: None, lib=library)


def _join_residual(graph: fx.Graph, node: fx.Node) -> None:
    """``residual + linear(x)``, the layer's output, becomes a product that is added where the residual lies.

    Inductor joins it with no other kernel, since the norm that follows is another layer's.
    """
    residual, linear = _arguments(node, _ADD, 2)
    x, weight, bias = _arguments(linear, (F.linear,), 3)
    kinds = [_tensor(one) for one in (residual, x, weight)]
    # A sum of this layer lies in memory of its own; what came into the layer belongs to others.
    if (
        bias is not None
        or not _is(residual, _ADD)
        or residual.kwargs
        or any(one is None for one in kinds)
        or len(linear.users) != 1
    ):
        return
    total, inputs, matrix = (one for one in kinds if one is not None)
    if not total.dtype == inputs.dtype == matrix.dtype or total.shape[:-1] != inputs.shape[:-1]:
        return
    order = {one: place for place, one in enumerate(graph.nodes)}
    if total.shape[-1] != matrix.shape[0] or any(order[user] > order[node] for user in residual.users):
        return
    if _changes_between(graph, min(residual, linear, key=order.__getitem__), node):
        return
    with graph.inserting_before(node):
        # A second sum, the other way round: Inductor joins no kernel that writes what is changed later with one that
        # reads it, takes copies for the same, and makes both sums in the kernel of the norm between.
        summed = graph.call_function(operator.add, residual.args[::-1])
        graph.call_function(torch.ops.stars_fast.product_onto.default, (summed, x, weight))
    node.replace_all_uses_with(summed)
    graph.erase_node(node)
    graph.erase_node(linear)


def _join_products(graph: fx.Graph) -> None:
    """Products of the same rows are one launch, of at most three weights."""
    found: dict[tuple[fx.Node, bool], list[fx.Node]] = defaultdict(list)
    for node in graph.find_nodes(op="call_function", target=F.linear):
        x, weight, bias = _arguments(node, (F.linear,), 3)
        given = (x, weight) if bias is None else (x, weight, bias)
        plain = [kind for one in given if (kind := _tensor(one)) is not None]
        if len(plain) < len(given) or len({kind.dtype for kind in plain}) > 1:
            continue
        if plain[1].is_contiguous() and all(one.op == "placeholder" for one in given[1:]):
            found[x, bias is None].append(node)
    for (x, unbiased), nodes in found.items():
        for start in range(0, len(nodes), _MOST_WEIGHTS):
            some = nodes[start : start + _MOST_WEIGHTS]
            if _changes_between(graph, some[0], some[-1]):
                continue
            weights, biases = [node.args[1] for node in some], [] if unbiased else [node.args[2] for node in some]
            with graph.inserting_before(some[0]):
                joined = graph.call_function(torch.ops.stars_fast.skinny_product.default, (x, weights, biases))
                parts = [graph.call_function(operator.getitem, (joined, place)) for place in range(len(some))]
            for node, part in zip(some, parts, strict=True):
                part.meta = dict(node.meta)
                node.replace_all_uses_with(part)
                graph.erase_node(node)


def _join_rotary(graph: fx.Graph, attend: fx.Node) -> None:
    """Queries and keys that were rotated before the attention are rotated where the keys are appended."""
    q, k, v, *options = attend.args
    query, key = _rotated(_before_transpose(q)), _rotated(_before_transpose(k))
    if query is None or key is None or query[1:] != key[1:]:
        return
    for rotated, given in ((query[0], q), (key[0], k)):
        before, after = _tensor(rotated), _tensor(given)
        if before is None or after is None or before.dtype != after.dtype or _changes_between(graph, rotated, attend):
            return  # else what a layer computes in more bits is rounded, or not, at another place
    _, cos, sin = query
    with graph.inserting_before(attend):
        q, k = (
            graph.call_method("transpose", (graph.call_function(operator.getitem, (x, 0)), 0, 1))
            for x in (query[0], key[0])
        )
        angles = [graph.call_function(operator.getitem, (one, (0, 0))) for one in (cos, sin)]
        joined = graph.call_function(torch.ops.stars_fast.attend_rotated.default, (q, k, v, *angles, *options))
    joined.meta = dict(attend.meta)
    attend.replace_all_uses_with(joined)
    graph.erase_node(attend)


def _before_transpose(node: Any) -> Any:
    """x of ``x[0].transpose(0, 1)``, which is how the plug-in hands over queries and keys."""
    if isinstance(node, fx.Node) and node.op == "call_method" and node.target == "transpose":
        x, index = _arguments(node.args[0], (operator.getitem,), 2)
        return x if index == 0 else None
    return None


def _rotated(node: Any) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """x, cos and sin of ``x * cos + rotate_half(x) * sin``, perhaps of its first elements only."""
    while isinstance(node, fx.Node) and node.op == "call_method" and node.target == "to":
        node = node.args[0]  # what is computed in more bits is rounded in the end, to the dtype that x has
    whole = None
    if (parts := _concatenated(node)) is not None:
        node, rest = parts
        whole, _ = _arguments(rest, (operator.getitem,), 2)
    plain, turned = _arguments(node, _ADD, 2)
    x, cos = _arguments(plain, _MUL, 2)
    half, sin = _arguments(turned, _MUL, 2)
    minus, first = _concatenated(half) or (None, None)
    (second,) = _arguments(minus, _NEG, 1)
    tensors = [_tensor(one) for one in (x, cos, sin, first, second)]
    if not all(one is not None and one.dim() == 4 for one in tensors):
        return None
    turned_x, *angles, low, high = (one for one in tensors if one is not None)
    rotary = int(turned_x.shape[-1])  # where it is symbolic, the layer is compiled for this one
    if rotary % 2 or not low.shape[-1] == high.shape[-1] == rotary // 2:
        return None
    if any(one.shape[:2] != (1, 1) or one.shape[-1] != rotary for one in angles):
        return None
    if not (_is_slice(first, x, from_start=True) and _is_slice(second, x, from_start=False)):
        return None
    if whole is not None:
        if not (_is_slice(x, whole, from_start=True) and _is_slice(rest, whole, from_start=False)):
            return None
        x = whole
    return x, cos, sin


def _concatenated(node: Any) -> tuple[Any, Any] | None:
    """Two tensors side by side."""
    if not _is(node, (torch.cat,)) or node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0) != -1:
        return None
    return tuple(node.args[0]) if len(node.args[0]) == 2 else None


def _is_slice(node: Any, x: Any, *, from_start: bool) -> bool:
    """Whether it is ``x[..., :n]`` or ``x[..., n:]``; for which n its shape says."""
    of, index = _arguments(node, (operator.getitem,), 2)
    if of is not x or not isinstance(index, tuple) or len(index) != 2 or index[0] is not Ellipsis:
        return False
    last = index[1]
    open_end = isinstance(last, slice) and last.step is None and (last.start if from_start else last.stop) is None
    return open_end and (last.stop if from_start else last.start) is not None


def _changes_between(graph: fx.Graph, first: fx.Node, last: fx.Node) -> bool:
    """Whether anything between is changed in place: what is read later than it was would have other values."""
    nodes = list(graph.nodes)
    return any(map(_changes, nodes[nodes.index(first) : nodes.index(last)]))


def _changes(node: fx.Node) -> bool:
    """Whether what is called changes an argument in place, as far as can be seen."""
    target = node.target
    if node.op == "call_method":
        name = str(target)
        return (name.endswith("_") and not name.endswith("__")) or name.startswith("__i") or name == "__setitem__"
    if node.op != "call_function":
        return False
    if node.kwargs.get("out") is not None or node.kwargs.get("inplace") or isinstance(target, HigherOrderOperator):
        return True
    if isinstance(target, OpOverloadPacket):
        return any(getattr(target, name)._schema.is_mutable for name in target.overloads())
    if isinstance(target, OpOverload):
        return target._schema.is_mutable
    name, module = getattr(target, "__name__", ""), getattr(target, "__module__", "")
    if module == "_operator":
        return target in _IN_PLACE
    return name.endswith("_") or (module == F.__name__ and any(one is True for one in node.args))  # F.relu(x, True)


def _is(node: Any, targets: tuple[Any, ...]) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def _arguments(node: Any, targets: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    """Those of a call of one of these functions with so many; otherwise that many times None."""
    if _is(node, targets) and len(node.args) == count and not node.kwargs:
        return tuple(node.args)
    return (None,) * count


def _tensor(node: Any) -> FakeTensor | None:
    """What is known of a plain tensor; quantised weights are none."""
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value if type(value) is FakeTensor else None

"""Does a model compute the same on the tree as by itself? Asked of the numbers, on a few tokens."""

from __future__ import annotations

from typing import Any

import torch

from stars_fast.tree.attention import causal_probe, evaluating, plugged
from stars_fast.tree.model import TreeModel

_TRUNK = 17
_BRANCHES = (3, 8)


def max_difference(tree_model: TreeModel) -> float:
    """Greatest difference between a packed forward pass over a small tree and the untouched model's plain ones.

    A trunk of a few tokens is encoded, then two branches below it side by side; the outputs at every branch token are
    held against those of one ordinary forward pass per branch.

    Parameters
    ----------
    tree_model : TreeModel
        Its slots are allocated anew: not while an engine generates with it.

    Returns
    -------
    float
        In units of the output: logits of a policy, rewards of a reward model. Rounding alone leaves about 1e-6 in
        float32 and 1e-1 in bfloat16.
    """
    trunk, branches = _probe(tree_model)
    with torch.no_grad():
        packed = _on_tree(tree_model, trunk, branches)  # [T, V or 1]
        plain = torch.cat([_plainly(tree_model, trunk + branch)[len(trunk) :] for branch in branches])
    return float((packed - plain).abs().max())


def tolerance(dtype: torch.dtype) -> float:
    """A difference that rounding explains, roughly, for outputs of order 10: 3e-3 in float32, 0.9 in bfloat16."""
    return 10 * torch.finfo(dtype).eps ** 0.5


def _probe(tree_model: TreeModel) -> tuple[list[int], list[list[int]]]:
    """Ids of a trunk and of branches that differ from their first token on, within the model's positions."""
    trunk_length, branch_lengths = _TRUNK, _BRANCHES
    if tree_model.max_positions is not None and tree_model.max_positions < _TRUNK + max(_BRANCHES):
        trunk_length, branch_lengths = 1, (1, 1)
    ids = causal_probe(trunk_length + sum(branch_lengths), tree_model.vocab_size, torch.device("cpu")).tolist()
    trunk, rest = ids[:trunk_length], ids[trunk_length:]
    return trunk, [rest[: branch_lengths[0]], rest[branch_lengths[0] :]]


def _on_tree(tree_model: TreeModel, trunk: list[int], branches: list[list[int]]) -> torch.Tensor:
    tree_model.allocate(len(trunk) + sum(len(branch) for branch in branches))
    with plugged(tree_model.model):
        leaves, _ = tree_model.extend([-1], [trunk])
        plan = tree_model.plan(leaves, [len(branches)], [len(branch) for branch in branches])
        output, _ = tree_model.encode(plan, branches, len(branches))
        return _values(tree_model, output)


def _plainly(tree_model: TreeModel, ids: list[int]) -> torch.Tensor:
    with evaluating(tree_model.model):
        output = tree_model.body(input_ids=torch.tensor([ids], device=tree_model.device), use_cache=False)
        return _values(tree_model, output)


def _values(tree_model: TreeModel, output: Any) -> torch.Tensor:
    """Logits of a policy, rewards of a reward model, at every token: ``[T, V]`` or ``[T, 1]`` float32."""
    if tree_model.body is tree_model.model:
        return output.logits[0].float()
    head: Any = tree_model.model.score
    return head(output.last_hidden_state[0]).float()

"""Does a model compute the same on the tree as by itself? Asked of the numbers, on a few tokens."""

from __future__ import annotations

import inspect
import math
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from transformers import DynamicCache, PreTrainedModel

from stars_fast.tree.attention import evaluating, is_causal, own_dtypes, plugged
from stars_fast.tree.difference import left_out, probe, relative, relative_tolerance, values
from stars_fast.tree.model import TreeModel
from stars_fast.tree.support import unwrapped

# Models whose numbers were compared, as what (dtype, device, body and attention change what is computed, weights do
# not), and whether they must read prompts whole.
_compared: WeakKeyDictionary[PreTrainedModel, dict[tuple[str, bool, str], bool]] = WeakKeyDictionary()
_AnyTree = TypeVar("_AnyTree", bound=TreeModel)


def checked(tree_model: _AnyTree) -> _AnyTree:
    """``tree_model``, once its numbers have been compared with those of its model's plain forward passes.

    A model that reads pictures may let a prompt's tokens see later ones, of text alone too. Where a changed last token
    changes the hidden states before it, ``reads_whole`` is set, and what follows a prompt is compared with the model's
    own passes behind a cache.

    Raises
    ------
    NotImplementedError
        For families that do more with keys and values than the interface shows, by name: their numbers come out wrong.
    """
    model = tree_model.model
    seen = _compared.setdefault(model, {})
    form = (tree_model.made_for, tree_model.body is model, str(model.config._attn_implementation))
    tree_model.reads_whole = seen[form] if form in seen else _must_read_whole(tree_model)
    if form not in seen:
        error = median_difference(tree_model)
        if not error < relative_tolerance(tree_model.dtype):
            found = "mask other ids than its own" if math.isinf(error) else f"differ from its own by {error:.0%}"
            raise NotImplementedError(
                f"the {tree_model.name}: on a tree its outputs {found}, so it does more than causal attention over "
                "keys and values (or its weights are not finite)"
            )
        seen[form] = tree_model.reads_whole
    return tree_model


def _must_read_whole(tree_model: TreeModel) -> bool:
    return tree_model.from_source or (tree_model.takes_media and not _is_causal(tree_model))


@torch.no_grad()
@own_dtypes()
def _is_causal(tree_model: TreeModel) -> bool:
    with evaluating(tree_model.model):
        return is_causal(unwrapped(tree_model.model).base_model, tree_model.vocab_size, tree_model.device)


def median_difference(tree_model: TreeModel) -> float:
    """How far the body's outputs on a tree are from its own (:func:`stars_fast.tree.difference.relative`)."""
    return relative(*_outputs(tree_model))


def max_difference(tree_model: TreeModel) -> float:
    """Greatest difference between a packed forward pass over a small tree and the untouched model's plain ones.

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
    packed, plain = _outputs(tree_model)
    if tree_model.body is not tree_model.model:
        head: Any = tree_model.model.score
        with torch.no_grad(), own_dtypes():
            packed, plain = (head(hidden.to(tree_model.dtype)).float() for hidden in (packed, plain))
    ignored = left_out(packed, plain)
    return math.inf if ignored is None else float((packed - plain).masked_fill(ignored, 0.0).abs().max())


def absolute_tolerance(dtype: torch.dtype) -> float:
    """A difference that rounding explains, roughly, for outputs of order 10: 3e-3 in float32, 0.9 in bfloat16."""
    return 10 * torch.finfo(dtype).eps ** 0.5


@torch.no_grad()
@own_dtypes()
def _outputs(tree_model: TreeModel) -> tuple[torch.Tensor, torch.Tensor]:
    """What the body gives at the tokens of two branches, on the tree and by plain passes: ``[T, X]`` float32 each.

    A trunk of a few tokens is encoded, then both branches below it side by side; the plain passes encode trunk and
    branch together, one branch at a time, or go on token by token behind the trunk's cache where that is read whole. X
    is the vocabulary for a policy, the hidden size for a reward model.
    """
    trunk, branches = probe(tree_model.vocab_size, tree_model.max_positions)
    packed = _on_tree(tree_model, trunk, branches)
    plain = _translated if tree_model.from_source else _continued if tree_model.reads_whole else _plainly
    return packed, torch.cat([plain(tree_model, trunk, branch) for branch in branches])


def _on_tree(tree_model: TreeModel, trunk: list[int], branches: list[list[int]]) -> torch.Tensor:
    tree_model.allocate(len(trunk) + sum(len(branch) for branch in branches) + int(tree_model.from_source))
    with plugged(tree_model.model):
        if tree_model.reads_whole:
            leaves, _ = tree_model.read_media({"input_ids": torch.tensor([trunk])})
        else:
            leaves, _ = tree_model.extend([-1], [trunk])
        _, output, _ = tree_model.encode(leaves, [len(branches)], branches)
        return values(output)


def _plainly(tree_model: TreeModel, trunk: list[int], branch: list[int]) -> torch.Tensor:
    ids = torch.tensor([trunk + branch], device=tree_model.device)
    with evaluating(tree_model.model):
        return values(tree_model.body(input_ids=ids, use_cache=False))[len(trunk) :]


def _continued(tree_model: TreeModel, trunk: list[int], branch: list[int]) -> torch.Tensor:
    named = inspect.signature(unwrapped(tree_model.body).forward).parameters
    name = "cache" if "cache" in named else "past_key_values"  # as transformers calls it from 5.24 on, and before
    cache = {name: DynamicCache(config=tree_model.text_config)}
    with evaluating(tree_model.model):
        found = [
            values(tree_model.body(input_ids=torch.tensor([ids], device=tree_model.device), use_cache=True, **cache))
            for ids in (trunk, *([token] for token in branch))
        ]
    return torch.cat(found[1:])


def _translated(tree_model: Any, trunk: list[int], branch: list[int]) -> torch.Tensor:
    source, target = (torch.tensor([ids], device=tree_model.device) for ids in (trunk, [tree_model.start, *branch]))
    with evaluating(tree_model.model):
        return values(tree_model.body(input_ids=source, decoder_input_ids=target, use_cache=False))[1:]

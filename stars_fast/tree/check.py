"""Does a model compute the same on the tree as by itself? Asked of the numbers, on a few tokens."""

from __future__ import annotations

import inspect
import math
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from transformers import DynamicCache, PreTrainedModel

from stars_fast.tree.attention import causal_probe, evaluating, is_causal, own_dtypes, plugged
from stars_fast.tree.model import TreeModel
from stars_fast.tree.support import unwrapped

# Relative difference from a plain forward pass that rounding explains, in whatever a float32 model multiplies (TF32,
# int8 per token); half precision has more. Another computation can come to 0.17, as a mask in both directions does.
_LEAST_TOLERATED = 0.01
# Models whose numbers were compared, as what (dtype, device, body and attention change what is computed, weights do
# not), and whether they must read prompts whole.
_compared: WeakKeyDictionary[PreTrainedModel, dict[tuple[str, bool, str], bool]] = WeakKeyDictionary()
_AnyTree = TypeVar("_AnyTree", bound=TreeModel)

_TRUNK = 17
_BRANCHES = (3, 8)
# Logits of ids that a model masks lie this many times further from the others than those from each other.
_GAP = 8


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
        if not error < max(_LEAST_TOLERATED, 2.2 * torch.finfo(tree_model.dtype).eps ** 0.5):
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
    """How far the body's outputs on a tree are from its own, relative to their spread: the median over tokens.

    The median, because rounding may send a single token to other experts. Entries that the model masks have no part in
    it, and where the tree masks others the difference is infinite.
    """
    packed, plain = _outputs(tree_model)
    left_out = _left_out(packed, plain)
    if left_out is None:
        return math.inf
    left, centred = (~left_out).sum(1, keepdim=True).clamp_min(1), list[torch.Tensor]()
    for values in (packed, plain):
        mean = values.masked_fill(left_out, 0.0).sum(1, keepdim=True) / left
        centred.append((values - mean).masked_fill(left_out, 0.0))
    error = (centred[0] - centred[1]).norm(dim=1) / centred[1].norm(dim=1).clamp_min(1e-6)  # [T]
    return float(error.median())


def _left_out(packed: torch.Tensor, plain: torch.Tensor) -> torch.Tensor | None:
    """Entries ``[T, X]`` that say nothing of the others' spread: masked ones, and columns that are the same constant in
    both, such as rows that pad a vocabulary. bool; None where the two mask different entries.
    """
    lowest = _lowest(plain)
    masked = plain < lowest
    if not torch.equal(masked, packed < lowest):
        return None
    constant = (plain.amax(0) == plain.amin(0)) & (packed == plain).all(0)
    return masked | constant


def _lowest(values: torch.Tensor) -> float:
    """The least that is no mask: a model gives ids that it must not write -inf, or something far below all others."""
    highest, lowest = values.amax(0), values.amin(0)
    levels = highest[highest.isfinite() & (highest > lowest)].double().sort(descending=True).values
    least = min(_GAP, len(levels) // 2)  # so many are taken not to be masked
    finite = torch.finfo(torch.float32).min
    if not least:
        return finite
    far = _GAP * (levels[0] - levels[least - 1 : -1]) + 1.0  # below each level, given those above it
    gaps = (levels[least - 1 : -1] - levels[least:] > far).nonzero()
    return finite if not len(gaps) else float(levels[least - 1 + gaps[0]] - far[gaps[0]])


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
    left_out = _left_out(packed, plain)
    return math.inf if left_out is None else float((packed - plain).masked_fill(left_out, 0.0).abs().max())


def tolerance(dtype: torch.dtype) -> float:
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
    trunk, branches = _probe(tree_model)
    packed = _on_tree(tree_model, trunk, branches)
    plain = _translated if tree_model.from_source else _continued if tree_model.reads_whole else _plainly
    return packed, torch.cat([plain(tree_model, trunk, branch) for branch in branches])


def _probe(tree_model: TreeModel) -> tuple[list[int], list[list[int]]]:
    """Ids of a trunk and of branches that differ from their first token on, within the model's positions."""
    room = tree_model.max_positions or _TRUNK + max(_BRANCHES)
    longest = min(max(_BRANCHES), max(room // 2, 1))
    branch_lengths = [min(length, longest) for length in _BRANCHES]
    trunk_length = min(_TRUNK, max(room - longest, 1))
    ids = causal_probe(trunk_length + sum(branch_lengths), tree_model.vocab_size, torch.device("cpu")).tolist()
    trunk, rest = ids[:trunk_length], ids[trunk_length:]
    return trunk, [rest[: branch_lengths[0]], rest[branch_lengths[0] :]]


def _on_tree(tree_model: TreeModel, trunk: list[int], branches: list[list[int]]) -> torch.Tensor:
    tree_model.allocate(len(trunk) + sum(len(branch) for branch in branches) + int(tree_model.from_source))
    with plugged(tree_model.model):
        if tree_model.reads_whole:
            leaves, _ = tree_model.read_media({"input_ids": torch.tensor([trunk])})
        else:
            leaves, _ = tree_model.extend([-1], [trunk])
        _, output, _ = tree_model.encode(leaves, [len(branches)], branches)
        return _values(output)


def _plainly(tree_model: TreeModel, trunk: list[int], branch: list[int]) -> torch.Tensor:
    ids = torch.tensor([trunk + branch], device=tree_model.device)
    with evaluating(tree_model.model):
        return _values(tree_model.body(input_ids=ids, use_cache=False))[len(trunk) :]


def _continued(tree_model: TreeModel, trunk: list[int], branch: list[int]) -> torch.Tensor:
    named = inspect.signature(unwrapped(tree_model.body).forward).parameters
    name = "cache" if "cache" in named else "past_key_values"  # as transformers calls it from 5.24 on, and before
    cache = {name: DynamicCache(config=tree_model.text_config)}
    with evaluating(tree_model.model):
        values = [
            _values(tree_model.body(input_ids=torch.tensor([ids], device=tree_model.device), use_cache=True, **cache))
            for ids in (trunk, *([token] for token in branch))
        ]
    return torch.cat(values[1:])


def _translated(tree_model: Any, trunk: list[int], branch: list[int]) -> torch.Tensor:
    source, target = (torch.tensor([ids], device=tree_model.device) for ids in (trunk, [tree_model.start, *branch]))
    with evaluating(tree_model.model):
        return _values(tree_model.body(input_ids=source, decoder_input_ids=target, use_cache=False))[1:]


def _values(output: Any) -> torch.Tensor:
    """Logits or hidden states of a batch of one, ``[T, X]`` float32."""
    logits = getattr(output, "logits", None)
    values: torch.Tensor = output.last_hidden_state if logits is None else logits
    return values[0].float()

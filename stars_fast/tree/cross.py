"""Encoder-decoders on a tree: a trunk begins with the source, which cross-attention alone looks at.

A layer keeps the same shape of keys and values of the source, for its cross-attention, as of the target, for its
self-attention, so a slot holds either. Where the target begins is told by a node's offset, minus the source's tokens:
positions are counted from there on, so what a plan says of positions says how long each source is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import nn

from stars_fast.tree import media
from stars_fast.tree.attention import PromptContext, ShapeRecorder, TreeContext, Write, active, stars_attention


class Translator(media.Reader, Protocol):
    """What reads sources: :attr:`modules` are those of the decoder's self-attention."""

    cross: dict[nn.Module, int]  # modules that attend to sources, and their layers


@dataclass
class CallRecorder(PromptContext):
    """A forward pass of the model as it is, of which it is kept who attends from how many tokens to how many."""

    writes: Mapping[nn.Module, Write] = field(default_factory=dict)
    shapes: dict[nn.Module, tuple[int, int, int]] = field(default_factory=dict)  # as in ShapeRecorder
    lengths: dict[nn.Module, tuple[int, int]] = field(default_factory=dict)  # of queries, and of keys
    windows: dict[nn.Module, int] = field(default_factory=dict)
    biased: set[nn.Module] = field(default_factory=set)  # by how far a key is from a query, as T5's are
    dtype: torch.dtype = torch.float32

    def call(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **options: Any,
    ) -> Any:
        """As in :class:`PromptContext`."""
        self.dtype = key.dtype
        self.shapes[module] = (key.shape[1], key.shape[3], value.shape[3])
        self.lengths[module] = (query.shape[2], key.shape[2])
        self.windows[module] = options.get("sliding_window") or 0
        if options.get("position_bias") is not None:
            self.biased.add(module)
        return super().call(module, query, key, value, attention_mask, **options)


SOURCE, TARGET = 3, 1  # tokens of the pass that is recorded: who attends to what is told by their numbers


def recorded(recorder: CallRecorder, name: str) -> tuple[ShapeRecorder, dict[nn.Module, int]]:
    """The decoder's self-attention, and the modules of its cross-attention with their layers.

    Raises
    ------
    NotImplementedError
        For a decoder whose layers do not all reach the attention interface with both, or do more there than attend.
    """
    layers = {module: getattr(module, "layer_idx", None) for module in recorder.lengths}
    own, cross = (
        {module: layer for module, layer in layers.items() if layer is not None and recorder.lengths[module] == lengths}
        for lengths in ((TARGET, TARGET), (TARGET, SOURCE))
    )
    if not own or sorted(own.values()) != sorted(cross.values()):
        raise NotImplementedError(
            f"the {name}: {len(own)} layers of self-attention and {len(cross)} of cross-attention reach transformers' "
            "attention interface, so its keys and values cannot be kept in a tree"
        )
    if biased := [type(module).__name__ for module in (*own, *cross) if module in recorder.biased]:
        raise NotImplementedError(
            f"the {name}, whose {biased[0]} adds a bias for each query and key, which attention over a tree does not"
        )
    shapes = {layer: recorder.shapes[module] for module, layer in own.items()}
    if any(recorder.shapes[module] != shapes[layer] for module, layer in cross.items()):
        raise NotImplementedError(f"the {name} has other keys of its source than of its text, which share a pool here")
    windows = {layer: recorder.windows[module] for module, layer in own.items()}
    return ShapeRecorder(shapes, own, windows, dtype=recorder.dtype), cross


@dataclass
class _Source:
    """What cross-attention sees: keys and values that are there already, whatever the module has made of nothing."""

    context: TreeContext

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        return self.context.look(layer, q, **options)


class CrossContext:
    """A :class:`TreeContext` of trunks that begin with a source."""

    def __init__(self, context: TreeContext, cross: Collection[nn.Module]) -> None:
        plan = context.plan
        sources = plan.trunk_len - plan.trunk_position  # [G] tokens
        room = plan.trunk_slots.shape[1]
        places = torch.arange(room, device=sources.device) + sources[:, None].long()
        behind = plan.trunk_slots.gather(1, places.clamp_(max=room - 1))  # [G, P]
        self._cross = cross
        self._target = replace(
            context, plan=replace(plan, trunk_slots=behind, trunk_len=plan.trunk_position), work={}, fresh=False
        )
        nothing = torch.zeros_like(context.branch_len)
        self._source = _Source(
            replace(context, plan=replace(plan, trunk_len=sources), branch_len=nothing, work={}, fresh=False)
        )

    def call(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **options: Any,
    ) -> Any:
        """As in :class:`stars_fast.tree.attention.PromptContext`; batch size 1."""
        with active(self._source if module in self._cross else self._target):
            return stars_attention(module, query, key, value, attention_mask, **options)


def read(model: Translator, inputs: Mapping[str, Any], rows: Sequence[int]) -> tuple[list[int], Any]:
    """Read sources, and what their targets begin with (``decoder_input_ids`` ``[B, N]``), in one pass of the model.

    Parameters and results are those of :meth:`stars_fast.tree.model.TreeModel.read_media`.
    """
    batch, length = inputs["input_ids"].shape
    begun = inputs["decoder_input_ids"].shape[1]
    there = media.places(inputs, rows)
    plan = model.plan([-1] * len(rows), [1] * len(rows), [len(place) + begun for place in there])
    try:
        own, kept = torch.arange(begun, device="cpu"), list(zip(rows, there, plan.branch_slots, strict=True))
        sources = torch.cat([row * length + place for row, place, _ in kept]).to(model.device)
        targets = torch.cat([row * begun + own for row in rows]).to(model.device)
        to_sources = torch.cat([slots[: len(place)] for _, place, slots in kept])
        to_targets = torch.cat([slots[len(place) : len(place) + begun] for _, place, slots in kept])

        def write(module: nn.Module, layer: int) -> Write:
            if module in model.cross:
                return Write(model.pool, layer, (batch, length), sources, to_sources)
            return Write(model.pool, layer, (batch, begun), targets, to_targets)

        context = PromptContext({one: write(one, layer) for one, layer in (model.modules | model.cross).items()})
        with model.on_device(), active(context):
            output = model.body(**media.placed(dict(inputs), model), use_cache=False)
        media.refuse_unread(model, context)
        for node, place in zip(plan.branches, there, strict=True):
            model.tree.shift(node, -len(place))
        return plan.branches, output
    except BaseException:
        model.tree.release_all(plan.branches)
        raise

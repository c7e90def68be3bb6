"""Prompts that are read whole by the model's own forward pass: what a processor made of texts and pictures.

Whatever a family does with a picture (towers, merged embeddings, masks in both directions, positions in three parts)
lies in that pass, and is over when it is. What remains of it are keys, values and one number: how far positions after
the prompt are from its number of tokens.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from stars_fast.tree.attention import PromptContext, Write, active
from stars_fast.tree.segment_tree import SegmentTree, TreePlan
from stars_fast.tree.slots import SlotPool
from stars_fast.tree.support import unwrapped

# Fields of a config that hold ids which stand for something else than text, or enclose it.
_PLACEHOLDER = re.compile(r"((image|video|vision|visual|audio)(_\w+)?|[be]o[iva])_token_(ids?|index)")


class Reader(Protocol):
    """What reads: a model, and the tree and slots that hold what it has read."""

    model: PreTrainedModel
    body: PreTrainedModel
    name: str
    device: torch.device
    tree: SegmentTree
    pool: SlotPool
    shapes: dict[int, tuple[int, int, int]]  # of layers
    modules: dict[nn.Module, int]  # that attend, and their layers

    def plan(self, leaves: Sequence[int], rows: Sequence[int], new_slots: Sequence[int]) -> TreePlan: ...

    def on_device(self) -> AbstractContextManager[Any]: ...


def takes_media(model: PreTrainedModel) -> bool:
    """Whether the model reads anything besides text."""
    modalities = getattr(unwrapped(model), "input_modalities", "text")
    of_parts = bool(getattr(model.config, "sub_configs", None))  # text models inherit what their family reads
    return of_parts and not {"text"}.issuperset([modalities] if isinstance(modalities, str) else modalities)


def placeholder_ids(model: PreTrainedModel) -> list[int]:
    """Ids that the config names for pictures, videos and sounds, and for their beginnings and ends."""
    fields = model.config.to_dict()
    named = [fields[name] for name in fields if _PLACEHOLDER.fullmatch(name)]
    ids = {one for value in named for one in (value if isinstance(value, list) else [value]) if isinstance(one, int)}
    return sorted(ids)


def picture_ids(named: Any) -> frozenset[int]:
    """Of these, as a config or a processor names them, those that are read as pictures: not what encloses any."""
    names = (f"{kind}_token_{form}" for kind in ("image", "video") for form in ("id", "index"))
    return frozenset(one for name in names if isinstance(one := getattr(named, name, None), int))


def places(inputs: Mapping[str, Any], rows: Sequence[int]) -> list[torch.Tensor]:
    """Where the tokens of these rows are, which are no padding: int64 ``[N]`` each, on the host."""
    mask = inputs.get("attention_mask")
    present = torch.ones(inputs["input_ids"].shape, device="cpu") if mask is None else mask.cpu()
    found = [present[row].nonzero()[:, 0] for row in rows]
    for row, place in zip(rows, found, strict=True):
        if not len(place):
            raise ValueError(f"inputs: row {row} of attention_mask is all padding")
    return found


def read(
    model: Reader, inputs: Mapping[str, Any], rows: Sequence[int], lag: int, **kwargs: Any
) -> tuple[list[int], Any]:
    """:meth:`stars_fast.tree.model.TreeModel.read_media`."""
    # The shapes of layers that somebody had compiled are known, and not which modules attend in them.
    if hidden := sorted(set(model.shapes) - set(model.modules.values())):
        raise NotImplementedError(
            f"the {model.name}: layers {hidden} were compiled before the engine was made, so what they read of a "
            "prompt with pictures cannot be kept: give the model as it is"
        )
    batch, length = inputs["input_ids"].shape
    there = places(inputs, rows)
    lengths = [max(len(place) - lag, 0) for place in there]
    plan = model.plan([-1] * len(rows), [1] * len(rows), lengths)
    try:
        kept = zip(rows, there, lengths, strict=True)
        tokens = torch.cat([row * length + place[:count] for row, place, count in kept]).to(model.device)
        where = (batch, length), tokens, plan.write_slots
        writes = {module: Write(model.pool, layer, *where) for module, layer in model.modules.items()}
        context = PromptContext(writes)
        with model.on_device(), active(context), _positions(_decoder(model)) as seen:
            output = model.body(**placed(dict(inputs), model), use_cache=False, **kwargs)
        refuse_unread(model, context)
        for node, row, place in zip(plan.branches, rows, there, strict=True):
            model.tree.shift(node, _last_position(seen[-1], row, place) + 1 - len(place))
        return plan.branches, output
    except BaseException:
        model.tree.release_all(plan.branches)
        raise


def refuse_unread(model: Reader, context: PromptContext) -> None:
    """Raise NotImplementedError for layers that have written nothing in a pass over a prompt."""
    missing = sorted({write.layer for module, write in context.writes.items() if module not in context.seen})
    if missing:
        raise NotImplementedError(f"the {model.name}: layers {missing} have read nothing of a prompt")


def placed(value: Any, model: Reader) -> Any:
    """Tensors where the model lies, those of floats in its dtype; as they are nested."""
    if isinstance(value, torch.Tensor):
        return value.to(model.device, model.model.dtype if value.is_floating_point() else None)
    if isinstance(value, dict):
        return {name: placed(one, model) for name, one in value.items()}
    return [placed(one, model) for one in value] if isinstance(value, list | tuple) else value


def _decoder(model: Reader) -> nn.Module:
    """The part of the model that has its decoder layers: it is given their positions."""
    parts = dict(model.body.named_modules())
    above, path = parts[""], next(name for name, part in parts.items() if part in model.modules).split(".")
    for depth in range(1, len(path)):
        part = parts[".".join(path[:depth])]
        if isinstance(part, nn.ModuleList):
            break
        above = part
    return above


@contextmanager
def _positions(decoder: nn.Module) -> Iterator[list[torch.Tensor | None]]:
    """The ``position_ids`` that ``decoder`` is given inside, on this thread."""
    seen: list[torch.Tensor | None] = []
    here = threading.get_ident()

    # torch leaves keywords out for another thread that had begun to call hooks when this one was removed.
    def look(module: nn.Module, args: tuple[Any, ...], kwargs: Any = None) -> None:
        if threading.get_ident() == here:
            seen.append(kwargs.get("position_ids"))

    handle = decoder.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def _last_position(positions: torch.Tensor | None, row: int, place: torch.Tensor) -> int:
    """The highest position of a row's tokens, which are at ``place`` ``[N]`` of the batch's ids ``[T]``."""
    if positions is None:  # counted from the first id on, padding or not
        return int(place[-1])
    # [B, T], [3, B, T] or, behind those that masks go by, [1 + 3, B, T]; rows that are alike may be one.
    of_row = positions[-3:] if positions.dim() == 3 else positions[None]
    return int(of_row[:, row if of_row.shape[1] > 1 else 0, place.to(positions.device)].max())

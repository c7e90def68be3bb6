"""Prompts with pictures, as a processor makes them of texts and pictures together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False)
class Media:
    """What a processor made of a batch of prompts with pictures, and which row of it a prompt is.

    Prompts of one batch share the ``inputs`` object. They are read in one pass: how a family packs the pictures of a
    batch is nobody's business but its model's.
    """

    inputs: Mapping[str, Any]  # forward's arguments: input_ids and attention_mask [B, T], pixel_values, ...
    row: int = 0
    images: Sequence[Any] = ()  # the prompt's pictures, opened, where they are known: for processors of scorers

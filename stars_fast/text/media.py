"""Prompts with pictures, as a processor makes them of texts and pictures together."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch

# Of an encoding: what is read of every policy's, and what a tokenizer tells of the text besides.
ABOUT_TEXT = {"input_ids", "attention_mask", "token_type_ids", "special_tokens_mask", "offset_mapping", "length"}
ABOUT_TEXT |= {"assistant_masks", "overflow_to_sample_mapping"}
# Arguments of forward that are not a prompt's to set.
_NOT_OF_PROMPTS = {"position_ids", "past_key_values", "inputs_embeds", "labels", "use_cache", "cache_position"}
_NOT_OF_PROMPTS |= {"output_attentions", "output_hidden_states", "return_dict", "logits_to_keep", "rope_deltas"}
_NOT_OF_PROMPTS |= {"input_ids", "attention_mask", "cache", "kwargs"}


class Batch(dict[str, torch.Tensor]):
    """Forward's arguments for prompts that are read together."""

    @cached_property
    def digest(self) -> bytes:
        """Tells what is read besides ids and their mask from others, in every process alike: of all rows at once."""
        digest = hashlib.blake2b(digest_size=16)
        for name in sorted(self.keys() - {"input_ids", "attention_mask"}):
            tensor = self[name].detach().cpu().contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy().data)
        return digest.digest()


@dataclass(frozen=True, eq=False)
class Media:
    """What a processor made of a batch of prompts with pictures, and which row of it a prompt is.

    Prompts of one batch share the ``inputs`` object. They are read in one pass: how a family packs the pictures of a
    batch is nobody's business but its model's.
    """

    inputs: Mapping[str, Any]  # forward's arguments: input_ids and attention_mask [B, T], pixel_values, ...
    row: int = 0
    images: Sequence[Any] = ()  # the prompt's pictures, opened, where they are known: for processors of scorers

    @cached_property
    def digest(self) -> list[int]:
        """Tells it from others, in every process alike. Of a batch that a processor made in one piece, the batch counts
        as each row's picture, because nobody knows whose is which.
        """
        batch = self.inputs if isinstance(self.inputs, Batch) else Batch(self.inputs)
        return [self.row, *np.frombuffer(batch.digest, "<i8").tolist()]


class Read(Protocol):
    """A prompt as the policy reads it."""

    @property
    def ids(self) -> list[int]: ...
    @property
    def media(self) -> Media | None: ...


def identity(prompt: Read) -> Sequence[int]:
    """What tells prompts apart: their ids, and behind them a digest of what else is read."""
    return prompt.ids if prompt.media is None else [*prompt.ids, -1, *prompt.media.digest]


def written_before(prompt: Read) -> list[int]:
    """Ids that an answer goes on from: the prompt's or, of a source, those that its target begins with."""
    begun = None if prompt.media is None else prompt.media.inputs.get("decoder_input_ids")
    return prompt.ids if begun is None or prompt.media is None else begun[prompt.media.row].tolist()


def forward_arguments(model: Any) -> frozenset[str]:
    """What of an encoding the model reads besides ids and their mask: what its forward names."""
    return frozenset(inspect.signature(model.forward).parameters) - _NOT_OF_PROMPTS


def media_inputs(
    name: str, encoding: Mapping[str, Any], attention_mask: torch.Tensor | None, takes: Collection[str]
) -> Batch | None:
    """Forward's arguments in what a processor returns; None where that is of text alone.

    Parameters
    ----------
    name : str
        What error messages call it.
    encoding : mapping
        With ``input_ids``.
    attention_mask : torch.Tensor, optional
        ``[B, T]``, in place of the encoding's.
    takes : collection of str
        :func:`forward_arguments` of the policy.

    Raises
    ------
    ValueError
        For what the policy would not see, by name, and for what is no batch of tensors.
    """
    given = {key: value for key, value in encoding.items() if value is not None}
    if unread := [key for key in given if key not in ABOUT_TEXT and key not in takes]:
        raise ValueError(
            f"{name} holds {', '.join(map(str, unread))}, which the policy would not see: give text, chats, an "
            "encoding of text alone (input_ids, attention_mask) or, as prompts, what the policy's own processor returns"
        )
    if not given.keys() - ABOUT_TEXT:
        return None
    inputs = {key: _tensor(f"{name}[{key!r}]", value) for key, value in given.items() if key in takes}
    ids = _tensor(f"{name}['input_ids']", given["input_ids"])
    of_text = all(value.shape == ids.shape and not value.is_floating_point() for value in inputs.values())
    if of_text and "decoder_input_ids" not in inputs:
        return None  # types of tokens, of a text without pictures
    mask = given.get("attention_mask") if attention_mask is None else attention_mask
    mask = torch.ones_like(ids) if mask is None else _tensor(f"{name}['attention_mask']", mask)
    for key, value in (("input_ids", ids), ("attention_mask", mask)):
        if value.ndim != 2 or value.shape != ids.shape:
            raise ValueError(
                f"{name}[{key!r}] has shape {tuple(value.shape)}: give a batch as the processor returns it, ids and "
                "mask [batch, length]"
            )
    return Batch(input_ids=ids, attention_mask=mask, **inputs)


def text_inputs(ids: Sequence[int]) -> Batch:
    """Forward's arguments for a prompt of ids alone."""
    row = torch.tensor([ids], dtype=torch.int64, device="cpu")
    return Batch(input_ids=row, attention_mask=torch.ones_like(row))


def _tensor(name: str, value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    try:
        return torch.as_tensor(np.array(value))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name} is a {type(value).__name__} that is no tensor: call the processor with return_tensors='pt' (and "
            "padding=True)"
        ) from error

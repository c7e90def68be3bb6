"""Prompts of encoder-decoders: sources, and what is written in their place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from stars_fast.methods.base import Method
from stars_fast.policy.encoder_decoder import target_start
from stars_fast.policy.policy import Policy
from stars_fast.text.media import Media, text_inputs
from stars_fast.text.prompts import Prompt

# Of an encoding, what is read besides ids and mask.
TAKEN = frozenset({"decoder_input_ids"})


def as_sources(prompts: Sequence[Prompt], policy: Policy, method: Method, own: Any) -> list[Prompt]:
    """Prompts as an encoder-decoder reads them: behind the source's ids those that its target begins with.

    That is ``decoder_start_token_id`` and ``forced_bos_token_id``, which is a language to some, of the
    generation_config ``own``; or a prompt's own ``decoder_input_ids``.

    Raises
    ------
    ValueError
        For a source that has more tokens than the encoder has positions, and ``decoder_input_ids`` that are no ids, by
        the prompt's index; for a method that has prompts read by other models, or in other ways.
    """
    if method.draft_model is not None or method.preferences or method.guides:
        raise ValueError(
            f"method={method.name!r} has prompts read in several ways, and the policy, a "
            f"{type(policy.model).__name__}, reads them with an encoder: take a method of one model, such as 'stars'"
        )
    positions = policy.prompt_positions
    forced, read = getattr(own, "forced_bos_token_id", None), []
    for index, prompt in enumerate(prompts):
        if positions is not None and len(prompt.ids) > positions:
            raise ValueError(
                f"prompts[{index}] has {len(prompt.ids)} tokens, and the policy's encoder has {positions} positions"
            )
        begun = [target_start(policy.model, own)] if prompt.media is None else _given(index, prompt.media)
        if len(begun) == 1 and forced is not None:
            begun = [*begun, int(forced)]
        target = torch.tensor([begun], dtype=torch.int64, device="cpu")
        media = Media({**text_inputs(prompt.ids), "decoder_input_ids": target})
        read.append(Prompt(prompt.source, [*prompt.ids, *begun], media))
    return read


def _given(index: int, media: Media) -> list[int]:
    """What a prompt's target begins with, as its encoding has it."""
    begun, rows = media.inputs["decoder_input_ids"], len(media.inputs["input_ids"])
    if begun.ndim != 2 or len(begun) != rows or not begun.numel() or begun.is_floating_point():
        raise ValueError(
            f"prompts[{index}]: decoder_input_ids is a {begun.dtype} tensor of shape {tuple(begun.shape)}: give ids "
            f"[{rows}, length]"
        )
    ids: list[int] = begun[media.row].tolist()
    return ids

"""Prompts of encoder-decoders: sources, and what is written in their place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from stars_fast.methods.base import Method
from stars_fast.policy.policy import Policy
from stars_fast.text.media import Media, text_inputs
from stars_fast.text.prompts import Prompt
from stars_fast.tree.support import max_positions

# Of an encoding, what is read besides ids and mask.
TAKEN = frozenset({"decoder_input_ids"})


def as_sources(prompts: Sequence[Prompt], policy: Policy, method: Method, own: Any) -> list[Prompt]:
    """Prompts as an encoder-decoder reads them: behind the source's ids those that its target begins with.

    That is ``decoder_start_token_id`` and ``forced_bos_token_id``, which is a language to some, of the
    generation_config ``own``; or a prompt's own ``decoder_input_ids``.

    Raises
    ------
    ValueError
        For a source that has more tokens than the encoder has positions, by its index, and for a method that has
        another model read the prompt, or reads it in another way.
    """
    if method.draft_model is not None or method.preferences or method.guides:
        raise ValueError(
            f"method={method.name!r} has prompts read in several ways, and the policy, a "
            f"{type(policy.model).__name__}, reads them with an encoder: take a method of one model, such as 'stars'"
        )
    return [_as_source(index, prompt, policy, own) for index, prompt in enumerate(prompts)]


def _as_source(index: int, prompt: Prompt, policy: Any, own: Any) -> Prompt:
    positions = max_positions(policy.model.config.get_text_config(encoder=True))
    if positions is not None and len(prompt.ids) > positions:
        raise ValueError(
            f"prompts[{index}] has {len(prompt.ids)} tokens: the policy's encoder has {positions} positions"
        )
    media, start = prompt.media, [policy.start]
    if media is not None:
        start = media.inputs["decoder_input_ids"][media.row].tolist()
    forced = getattr(own, "forced_bos_token_id", None)
    if len(start) == 1 and forced is not None:
        start = [*start, int(forced)]
    inputs = {**text_inputs(prompt.ids), "decoder_input_ids": torch.tensor([start], dtype=torch.int64, device="cpu")}
    return Prompt(prompt.source, [*prompt.ids, *start], Media(inputs))

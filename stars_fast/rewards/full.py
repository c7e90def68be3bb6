"""Scoring whole rows: what every sequence classifier can do, and bidirectional ones must."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

# Tokens of one forward pass, as far as one row allows.
_MAX_TOKENS = 16384


def score_in_full(model: PreTrainedModel, rows: Sequence[list[int]]) -> list[float]:
    """The model's own value for each row of ids. Rows of one length run together: padding would move some poolings."""
    pad = model.config.get_text_config().pad_token_id
    groups: dict[tuple[int, bool], list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault((len(row), pad in row), []).append(place)
    rewards = [0.0] * len(rows)
    for (length, holds_pad), places in groups.items():
        # Without a pad id transformers' heads take one row at a time.
        step = 1 if pad is None else max(1, _MAX_TOKENS // length)
        for start in range(0, len(places), step):
            batch = places[start : start + step]
            values = _forward(model, [rows[place] for place in batch], holds_pad)
            for place, value in zip(batch, values, strict=True):
                rewards[place] = value
    return rewards


def _forward(model: PreTrainedModel, rows: Sequence[list[int]], holds_pad: bool) -> list[float]:
    """Rewards of rows of one length."""
    ids = torch.tensor(rows, device=next(model.parameters()).device)  # [B, T]
    mask = torch.ones_like(ids)
    if holds_pad:  # a pad id that was drawn is a token like others; from embeddings the model does not see which it is
        embed = model.get_input_embeddings()
        output = model(inputs_embeds=embed(ids), attention_mask=mask)
    else:
        output = model(input_ids=ids, attention_mask=mask)
    rewards: list[float] = output.logits[:, 0].float().tolist()
    return rewards


def most_tokens(model: PreTrainedModel, limit: int | None) -> int | None:
    """Longest row, given the config's limit of positions: RoBERTa's kind spends some of them on padding."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1
    return limit

"""How many tokens of keys and values a machine can hold."""

from __future__ import annotations

import os

import torch

from stars_fast.tree.model import TreeModel

# Of the memory that is free when the pool is made; the rest is for activations and for everybody else.
_SHARE_OF_FREE_MEMORY = 0.4


def free_bytes(device: torch.device) -> int:
    """Free memory of a CUDA device, what torch's allocator keeps in reserve included, or of the machine."""
    if device.type == "cuda":
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserve
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4 << 30


def default_tokens(model: TreeModel, rows: int, tokens_per_row: int) -> int:
    """Tokens that ``rows`` rows want, or as many as a share of the free memory holds if that is less."""
    wanted = rows * tokens_per_row
    held = model.pool.slots * model.bytes_per_token  # is kept, or freed before a larger pool is made
    affordable = int((free_bytes(model.device) + held) * _SHARE_OF_FREE_MEMORY / model.bytes_per_token)
    affordable = max(affordable, model.pool.slots - 1)
    return max(min(wanted, affordable), tokens_per_row)

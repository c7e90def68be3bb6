"""How far two computations of the same tokens lie apart, and of which tokens that is asked."""

from __future__ import annotations

import math
from typing import Any

import torch

from stars_fast.tree.attention import causal_probe

# Relative difference from a plain forward pass that rounding explains, in whatever a float32 model multiplies (TF32,
# int8 per token); half precision has more. Another computation can come to 0.17, as a mask in both directions does.
_LEAST_TOLERATED = 0.01
_TRUNK = 17
_BRANCHES = (3, 8)
# Logits of ids that a model masks lie this many times further from the others than those from each other.
_GAP = 8


def relative_tolerance(dtype: torch.dtype) -> float:
    """The relative difference that rounding explains in a model of that dtype."""
    return max(_LEAST_TOLERATED, 2.2 * torch.finfo(dtype).eps ** 0.5)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """How far outputs ``[T, X]`` are from those expected, relative to the spread of these: the median over tokens.

    The median, because rounding may send a single token to other experts. Entries that the model masks have no part in
    it, and where one masks others the difference is infinite.
    """
    ignored = left_out(found, expected)
    if ignored is None:
        return math.inf
    left, centred = (~ignored).sum(1, keepdim=True).clamp_min(1), list[torch.Tensor]()
    for outputs in (found, expected):
        mean = outputs.masked_fill(ignored, 0.0).sum(1, keepdim=True) / left
        centred.append((outputs - mean).masked_fill(ignored, 0.0))
    error = (centred[0] - centred[1]).norm(dim=1) / centred[1].norm(dim=1).clamp_min(1e-6)  # [T]
    return float(error.median())


def left_out(packed: torch.Tensor, plain: torch.Tensor) -> torch.Tensor | None:
    """Entries ``[T, X]`` that say nothing of the others' spread: masked ones, and columns that are the same constant in
    both, such as rows that pad a vocabulary. bool; None where the two mask different entries.
    """
    lowest = _lowest(plain)
    masked = plain < lowest
    if not torch.equal(masked, packed < lowest):
        return None
    constant = (plain.amax(0) == plain.amin(0)) & (packed == plain).all(0)
    return masked | constant


def _lowest(outputs: torch.Tensor) -> float:
    """The least that is no mask: a model gives ids that it must not write -inf, or something far below all others."""
    highest, lowest = outputs.amax(0), outputs.amin(0)
    levels = highest[highest.isfinite() & (highest > lowest)].double().sort(descending=True).values
    least = min(_GAP, len(levels) // 2)  # so many are taken not to be masked
    finite = torch.finfo(torch.float32).min
    if not least:
        return finite
    far = _GAP * (levels[0] - levels[least - 1 : -1]) + 1.0  # below each level, given those above it
    gaps = (levels[least - 1 : -1] - levels[least:] > far).nonzero()
    return finite if not len(gaps) else float(levels[least - 1 + gaps[0]] - far[gaps[0]])


def probe(vocab_size: int, max_positions: int | None) -> tuple[list[int], list[list[int]]]:
    """Ids of a trunk and of branches that differ from their first token on, within so many positions."""
    room = max_positions or _TRUNK + max(_BRANCHES)
    longest = min(max(_BRANCHES), max(room // 2, 1))
    branch_lengths = [min(length, longest) for length in _BRANCHES]
    trunk_length = min(_TRUNK, max(room - longest, 1))
    ids = causal_probe(trunk_length + sum(branch_lengths), vocab_size, torch.device("cpu")).tolist()
    trunk, rest = ids[:trunk_length], ids[trunk_length:]
    return trunk, [rest[: branch_lengths[0]], rest[branch_lengths[0] :]]


def values(output: Any) -> torch.Tensor:
    """Logits or hidden states of a batch of one, ``[T, X]`` float32."""
    logits = getattr(output, "logits", None)
    found: torch.Tensor = output.last_hidden_state if logits is None else logits
    return found[0].float()

"""Storage of keys and values: one K and one V tensor per layer, a token per slot."""

from __future__ import annotations

import torch


class SlotPool:
    """Keys and values of ``slots`` tokens, all layers.

    Parameters
    ----------
    shapes : dict
        Layer index -> (kv heads, key head size, value head size).
    slots : int
        Tokens held, slot 0 included, which absorbs padding writes and belongs to nobody.
    dtype, device
        Of the model's keys.
    """

    def __init__(
        self, shapes: dict[int, tuple[int, int, int]], slots: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.slots = slots
        # Zeros, not empty: masked slots are read under a zero weight, and zero times a stray infinity would be NaN.
        self._layers = {
            layer: (
                torch.zeros(slots, heads, key_size, dtype=dtype, device=device),  # [slots, Hkv, D]
                torch.zeros(slots, heads, value_size, dtype=dtype, device=device),  # [slots, Hkv, Dv]
            )
            for layer, (heads, key_size, value_size) in shapes.items()
        }

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K ``[slots, Hkv, D]`` and V ``[slots, Hkv, Dv]`` of one layer."""
        return self._layers[index]

    @staticmethod
    def bytes_per_slot(shapes: dict[int, tuple[int, int, int]], dtype: torch.dtype) -> int:
        """Bytes that one token takes over all layers."""
        return sum(heads * (key + value) for heads, key, value in shapes.values()) * dtype.itemsize

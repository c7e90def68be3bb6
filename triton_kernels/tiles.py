"""How the work of tree attention is cut: what one program holds, and in how many parts a list of keys is split."""

from typing import NamedTuple

import torch

LARGEST_HEAD = 256
LEAST_BLOCKS = 2  # of keys, in a part of a list
_MOST_PARTS = 32
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


class Tile(NamedTuple):
    """What one program works on, and with how many warps and pipeline stages."""

    queries: int
    keys: int
    warps: int
    stages: int
    most_head: int = LARGEST_HEAD  # elements of keys that meet the queries at a time


def check(head_size: int, value_size: int, dtype: torch.dtype) -> None:
    """Refuse keys and values that there is no tile for.

    Raises
    ------
    ValueError
        Naming the size or dtype and what is supported.
    """
    if dtype not in DTYPES:
        raise ValueError(f"tree_attention: keys and values must be float32, float16 or bfloat16, got {dtype}")
    for name, size in (("head_size", head_size), ("value_size", value_size)):
        if not 1 <= size <= LARGEST_HEAD:
            raise ValueError(f"tree_attention: {name} must be from 1 to {LARGEST_HEAD}, got {size}")


def choose_tile(head_size: int, value_size: int, dtype: torch.dtype, packed: int, *, hip: bool = False) -> Tile:
    """The tile for lists whose (query, head) pairs of one key-value head number at most ``packed``.

    Of those that ``stars-fast kernels`` finds without spilled registers, those that were fastest for 64 requests on an
    H100 (docs/findings/gpu-kernels.md). Those of float32 are small because three products of tf32 make one of float32.
    """
    queries = 16 if packed <= 16 else 32 if packed <= 32 else 64
    size = max(head_size, value_size)
    if dtype == torch.float32:
        if size <= 64:
            return Tile(min(queries, 32), 32, 4, 2)
        return Tile(16, 32, 4, 2) if size <= 128 else Tile(16, 16, 8, 2, most_head=128)
    if hip:
        return Tile(queries, 32 if size <= 128 else 16, 4, 2)
    if size > 128:
        return Tile(queries, 32, 8 if queries == 64 else 4, 2)
    return Tile(queries, 32 if queries == 64 and size > 64 else 64, 4, 3)


def fit_warps(tile: Tile, programs: int, processors: int) -> Tile:
    """The tile with fewer warps where its few queries meet many others: a processor then holds more programs."""
    many = programs >= 2 * processors and tile.queries == 16 and tile.stages == 3
    return tile._replace(warps=2) if many else tile


def choose_parts(tile: Tile, programs: int, longest: int, processors: int) -> int:
    """In how many parts lists of at most ``longest`` keys are split, so that two programs a processor have work.

    Parameters
    ----------
    tile
        Its keys: a part has at least two blocks of them.
    programs
        How many work without splitting, at least.
    longest
        Keys that a list may have.
    processors
        Of the device.
    """
    wanted = 2 * processors // max(programs, 1)
    return max(1, min(wanted, _MOST_PARTS, -(-longest // (LEAST_BLOCKS * tile.keys))))

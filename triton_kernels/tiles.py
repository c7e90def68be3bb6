"""How the work of tree attention is cut: what one program holds, and in how many parts a list of keys is split."""

from typing import NamedTuple

import torch

LARGEST_HEAD = 256
_LEAST_BLOCKS = 2  # of keys, in a part of a list that is as long as its table has room for
_LEAST_KEYS = 64  # in a part of any
_MOST_PARTS = 32
PIPELINED = 5  # stages from which on keys and values are asked for two blocks ahead, as they lie behind their slots
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


class Tile(NamedTuple):
    """What one program works on, and with how many warps and pipeline stages."""

    queries: int
    keys: int
    warps: int
    stages: int
    most_head: int = LARGEST_HEAD  # elements of keys that meet the queries at a time

    @property
    def pipelined(self) -> bool:
        """Whether keys and values of a block are under way while the one before is worked on."""
        return self.stages >= PIPELINED


# What is worth timing for heads of 128 elements in 16 bits, by queries a tile: first what was the fastest before, then
# what compiles without spills for sm_90. Docs/kernels.md says what is expected of them.
CANDIDATES = {
    16: (Tile(16, 64, 2, 3), Tile(16, 64, 2, 5), Tile(16, 32, 4, 5), Tile(16, 32, 4, 7), Tile(16, 64, 4, 5)),
    32: (Tile(32, 64, 4, 3), Tile(32, 64, 4, 5), Tile(32, 32, 4, 5)),
    64: (Tile(64, 32, 4, 3), Tile(64, 32, 4, 5)),
}


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

    Of those that ``stars-fast kernels`` finds without spilled registers, the keys and warps that were fastest for 64
    requests on an H100 (docs/findings/gpu-kernels.md), with as many stages as pipeline, since a processor holds as many
    programs as with fewer. Those of float32 are small because three products of tf32 make one of float32.
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
    if queries == 64:  # with five stages Triton 3.6 spills on sm_100, and on sm_90 where heads have 64 elements
        return Tile(queries, 32 if size > 64 else 64, 4, 3)
    return Tile(queries, 64, 4, PIPELINED)


def fit_warps(tile: Tile, programs: int, longest: int, processors: int) -> Tile:
    """The tile with fewer warps and stages for many programs, or with fewer keys for few; arguments as below.

    Where few queries meet many others a processor then holds four or five programs, which wait in turn, and not two or
    three that pipeline. Lists that are too short to be split for all processors are cut finer.
    """
    if not tile.pipelined:
        return tile
    if programs >= 2 * processors:
        return tile._replace(warps=2, stages=3) if tile.queries == 16 else tile
    short = choose_parts(tile, programs, longest, processors) < min(2 * processors // programs, _MOST_PARTS)
    return tile._replace(keys=32) if short else tile


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
    return max(1, min(wanted, _MOST_PARTS, -(-longest // (_LEAST_BLOCKS * tile.keys))))


def least_blocks(tile: Tile) -> int:
    """How many blocks of keys a part has at least, in a list of any length.

    Parts are chosen by the room that tables have, which for captured work is that of the longest text there may be.
    Where a list is far shorter, fewer blocks a part than :func:`choose_parts` counts on keep as many of them at work.
    """
    return min(_LEAST_BLOCKS, max(1, _LEAST_KEYS // tile.keys))

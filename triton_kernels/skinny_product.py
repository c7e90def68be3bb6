"""Products of few rows with up to three weights in one launch, which stay where they are.

A decode step reads every weight once for a handful of rows, so weights are the operand of 64 or 128 rows of the matrix
instruction, and the few rows its columns. The tiles of all weights lie side by side in one grid. Where they are fewer
than processors, the inner size is cut in parts, whose float32 sums a second launch adds in order: the same numbers
every time.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from .dependent import begin_dependent, dependent
from .variant import Variant

MOST_ROWS = 256  # above, a product is bound by operations, and torch's libraries take it
MOST_WEIGHTS = 3
_MOST_PARTS = 8
_LEAST_BLOCKS = 4  # of the inner size, in a part
_ALIGNED = 16  # elements: where rows do not begin with whole vectors, loads are single and registers spill
_SUM_ELEMENTS = 1024  # of one program
_DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


class Tile(NamedTuple):
    """What one program works on."""

    columns: int  # of the product, which are rows of a weight
    rows: int
    more_rows: int  # behind these, as a second matrix: 192 rows are 128 and 64, not 256
    inner: int
    warps: int
    stages: int


@triton.jit
def _weight_of(tile, a, b, c, a_tiles, b_tiles):
    """Which of three things belongs to this tile."""
    chosen = a
    if tile >= a_tiles:
        chosen = b
    if tile >= a_tiles + b_tiles:
        chosen = c
    return chosen


@triton.jit(do_not_specialize=["rows", "columns0", "columns1", "columns2"])
def skinny_product_kernel(
    x,
    weight0,
    weight1,
    weight2,
    bias0,
    bias1,
    bias2,
    out0,
    out1,
    out2,
    rows,
    columns0,
    columns1,
    columns2,
    inner,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MORE_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    SPLIT: tl.constexpr,
    WHOLE: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """One tile of one weight over one part of the inner size.

    With SPLIT, the outs are float32 ``[parts, rows, columns]``, and biases wait. WHOLE where parts are whole blocks.
    """
    begin_dependent(PDL)
    tile, part = tl.program_id(0), tl.program_id(1)
    tiles0, tiles1 = tl.cdiv(columns0, BLOCK_N), tl.cdiv(columns1, BLOCK_N)
    weight = _weight_of(tile, weight0, weight1, weight2, tiles0, tiles1)
    columns = _weight_of(tile, columns0, columns1, columns2, tiles0, tiles1)
    out = _weight_of(tile, out0, out1, out2, tiles0, tiles1)
    first = tile - _weight_of(tile, 0, tiles0, tiles0 + tiles1, tiles0, tiles1)
    n, m, k = first * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    in_columns, in_rows = n < columns, m < rows
    size = tl.cdiv(tl.cdiv(inner, BLOCK_K), tl.num_programs(1)) * BLOCK_K
    begin = part * size
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if MORE_M:
        more = BLOCK_M + tl.arange(0, MORE_M)
        in_more = more < rows
        more_total = tl.zeros((BLOCK_N, MORE_M), tl.float32)
    for start in tl.range(0, size, BLOCK_K, num_stages=STAGES):
        at = begin + start + k
        weights_there, rows_there = in_columns[:, None], in_rows[None, :]
        if not WHOLE:
            weights_there &= at[None, :] < inner
            rows_there &= at[:, None] < inner
        weights = tl.load(weight + n[:, None].to(tl.int64) * inner + at[None, :], weights_there, other=0.0)
        block = tl.load(x + m[None, :] * inner + at[:, None], rows_there, other=0.0)
        total = tl.dot(weights, block, total, input_precision=PRECISION)
        if MORE_M:
            rows_there = in_more[None, :]
            if not WHOLE:
                rows_there &= at[:, None] < inner
            block = tl.load(x + more[None, :] * inner + at[:, None], rows_there, other=0.0)
            more_total = tl.dot(weights, block, more_total, input_precision=PRECISION)
    if SPLIT:
        out += part.to(tl.int64) * rows * columns
    if BIAS:
        bias = _weight_of(tile, bias0, bias1, bias2, tiles0, tiles1)
        added = tl.load(bias + n, in_columns, other=0.0).to(tl.float32)[:, None]
        total += added
        if MORE_M:
            more_total += added
    place = out + n[:, None]
    tl.store(place + m[None, :] * columns, total.to(out.dtype.element_ty), in_columns[:, None] & in_rows[None, :])
    if MORE_M:
        there = in_columns[:, None] & in_more[None, :]
        tl.store(place + more[None, :] * columns, more_total.to(out.dtype.element_ty), there)


@triton.jit(do_not_specialize=["rows", "columns0", "columns1", "columns2", "parts"])
def sum_parts_kernel(
    parts0,
    parts1,
    parts2,
    bias0,
    bias1,
    bias2,
    out0,
    out1,
    out2,
    rows,
    columns0,
    columns1,
    columns2,
    parts,
    BLOCK: tl.constexpr,
    BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Some elements of one product: the sum of its parts, first to last, and its bias."""
    begin_dependent(PDL)
    tile = tl.program_id(0)
    tiles0, tiles1 = tl.cdiv(rows * columns0, BLOCK), tl.cdiv(rows * columns1, BLOCK)
    columns = _weight_of(tile, columns0, columns1, columns2, tiles0, tiles1)
    source = _weight_of(tile, parts0, parts1, parts2, tiles0, tiles1)
    out = _weight_of(tile, out0, out1, out2, tiles0, tiles1)
    first = tile - _weight_of(tile, 0, tiles0, tiles0 + tiles1, tiles0, tiles1)
    place = first * BLOCK + tl.arange(0, BLOCK)
    there = place < rows * columns
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(parts):
        total += tl.load(source + place, there, other=0.0)
        source += rows * columns
    if BIAS:
        bias = _weight_of(tile, bias0, bias1, bias2, tiles0, tiles1)
        total += tl.load(bias + place % columns, there, other=0.0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), there)


def choose_tile(rows: int, itemsize: int, *, hip: bool = False) -> Tile:
    """The tile for so many rows; of those that compile without spills, not yet chosen by time."""
    inner = 128 // itemsize  # 128 bytes: a line of the cache
    if rows <= 64:
        tile = Tile(64, 16 if rows <= 16 else 32 if rows <= 32 else 64, 0, 2 * inner if rows <= 32 else inner, 4, 4)
    elif rows <= 128:
        tile = Tile(128, 128, 0, inner, 8, 4)
    elif rows <= 192:
        tile = Tile(128, 128, 64, inner, 8, 3)
    else:  # with 128 columns sm_80 spills
        tile = Tile(64, 128, 128, inner, 8, 3)
    return tile._replace(stages=2) if hip else tile


def choose_parts(tiles: int, inner: int, block: int, processors: int) -> int:
    """In how many parts the inner size is cut, so that every processor has a program."""
    return max(1, min(-(-processors // tiles), _MOST_PARTS, inner // (_LEAST_BLOCKS * block)))


_HIP = torch.version.hip is not None


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def skinny_product(
    x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """:func:`stars_fast.ops.skinny_product` in Triton; more rows than :data:`MOST_ROWS`, and inner sizes that are no
    multiple of 16, are left to torch."""
    inner, rows = x.shape[-1], x.numel() // max(x.shape[-1], 1)
    if not 1 <= len(weights) <= MOST_WEIGHTS or len(biases) not in (0, len(weights)):
        raise ValueError(
            f"skinny_product: there must be 1 to {MOST_WEIGHTS} weights, and as many biases or none, got "
            f"{len(weights)} and {len(biases)}"
        )
    for weight in weights:
        if weight.shape[1:] != (inner,) or not weight.is_contiguous() or weight.dtype != x.dtype:
            raise ValueError(
                f"skinny_product: a weight must be contiguous [columns, {inner}] of {x.dtype}, as x is, got "
                f"{list(weight.shape)} of {weight.dtype} with strides {weight.stride()}"
            )
    if not 1 <= rows <= MOST_ROWS or inner % _ALIGNED or x.dtype not in _DTYPES:
        return [F.linear(x, weight, *biases[i : i + 1]) for i, weight in enumerate(weights)]
    x, biases = x.contiguous(), [bias.contiguous() for bias in biases]
    columns = [weight.shape[0] for weight in weights]
    outs = [x.new_empty(*x.shape[:-1], count) for count in columns]
    tile = choose_tile(rows, x.element_size(), hip=_HIP)
    tiles = sum(triton.cdiv(count, tile.columns) for count in columns)
    parts = choose_parts(tiles, inner, tile.inner, _processors(x.device))
    split = parts > 1
    sums = [x.new_empty(parts, rows, count, dtype=torch.float32) for count in columns] if split else outs
    counts = [*columns, 0, 0][:MOST_WEIGHTS]
    skinny_product_kernel[(tiles, parts)](
        x,
        *_three(weights),
        *_three(biases or weights),
        *_three(sums),
        rows,
        *counts,
        inner,
        **_constants(tile, inner, parts, bias=bool(biases) and not split),
        **dependent(x.device),
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )
    if split:
        blocks = sum(triton.cdiv(rows * count, _SUM_ELEMENTS) for count in columns)
        sum_parts_kernel[(blocks,)](
            *_three(sums),
            *_three(biases or weights),
            *_three(outs),
            rows,
            *counts,
            parts,
            BLOCK=_SUM_ELEMENTS,
            BIAS=bool(biases),
            **dependent(x.device),
            num_warps=4,
            enable_fp_fusion=False,
        )
    return outs


def _three(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The last stands in for what is not there."""
    return [*tensors, *[tensors[-1]] * (MOST_WEIGHTS - len(tensors))]


def _constants(tile: Tile, inner: int, parts: int, *, bias: bool) -> dict[str, Any]:
    return {
        "BLOCK_N": tile.columns,
        "BLOCK_M": tile.rows,
        "MORE_M": tile.more_rows,
        "BLOCK_K": tile.inner,
        "STAGES": tile.stages,
        "SPLIT": parts > 1,
        "WHOLE": inner % (tile.inner * parts) == 0,
        "BIAS": bias,
        "PRECISION": "ieee" if _HIP else "tf32x3",
    }


def variants(target: GPUTarget) -> list[Variant]:
    """Every tile in bfloat16, whole and split, one with parts that end within a block, and biases."""
    pointers = [name for name in skinny_product_kernel.arg_names if name[:-1] in ("weight", "bias", "out")]
    counts = dict.fromkeys(("rows", "columns0", "columns1", "columns2"), "i32")
    found = []
    wanted = [(rows, parts, False) for rows, parts in ((16, 1), (16, 4), (64, 2), (128, 2), (192, 1), (256, 2))]
    for rows, parts, odd in (*wanted, (32, 1, True)):
        tile, inner = choose_tile(rows, 2, hip=target.backend == "hip"), 4096 + 16 * odd
        types = dict.fromkeys(("x", *pointers), "*bf16") | counts | {"inner": "i32:16"}
        if parts > 1:
            types |= {name: "*fp32" for name in pointers if name.startswith("out")}
        constants = _constants(tile, inner, parts, bias=odd) | {"PRECISION": "ieee", "PDL": False}
        name = f"skinny_product[m{rows},bf16{',split' if parts > 1 else ''}{',odd' if odd else ''}]"
        found.append(
            Variant(
                name,
                skinny_product_kernel,
                types,
                constants,
                num_warps=tile.warps,
                num_stages=tile.stages,
                fp_fusion=True,
                needs_matrix=True,
            )
        )
    types = {name: "*bf16" for name in sum_parts_kernel.arg_names if name[:-1] in ("bias", "out")}
    types |= dict.fromkeys(("parts0", "parts1", "parts2"), "*fp32") | counts | {"parts": "i32"}
    constants = {"BLOCK": _SUM_ELEMENTS, "BIAS": True, "PDL": False}
    return [*found, Variant("skinny_product.sum", sum_parts_kernel, types, constants)]

"""Attention over a tree of slots: one loop over one list of keys for all candidates of a request.

A work item is (request and query tile, key-value head, part of the list). The queries of all rows of a request lie side
by side, so they are packed as (token, head) pairs into tiles of 16, 32 or 64: a trunk's keys are read once for all
candidates and all query heads that share them. The list is the trunk and then the branches of the tile's own rows, each
given as much room as the longest of them needs; a mask lets a query see its own branch only, and nothing after itself.

A list is split where whole ones would leave processors idle; a second launch then merges the float32 parts. Which tile
has which queries and what list is found by a launch before, whose table serves all layers of a pass.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from stars_fast.ops._library import address

from .dependent import begin_dependent, dependent
from .tiles import CANDIDATES, DTYPES, Tile, check, choose_parts, choose_tile, fit_warps, least_blocks
from .variant import Variant


@triton.jit
def _group_of(tile, group_indptr, query_indptr, groups, fold, BLOCK_M: tl.constexpr):
    """The group that ``tile`` belongs to, and its first tile.

    Group g's first tile is ``first_token * fold // BLOCK_M + g``: never more tiles than that leave room for, and known
    without a sum over the groups before.
    """
    group = -1
    for first in range(0, groups, 128):
        g = first + tl.arange(0, 128)
        token = tl.load(query_indptr + tl.load(group_indptr + g, g < groups, other=0))
        group += tl.sum(((token * fold // BLOCK_M + g <= tile) & (g < groups)).to(tl.int32))
    return group, tl.load(query_indptr + tl.load(group_indptr + group)) * fold // BLOCK_M + group


@triton.jit
def _row_of(token, query_indptr, first_row, last_row):
    """The row of each token: ``first_row`` plus the rows that end before it."""
    row = tl.zeros_like(token) + first_row
    for first in range(first_row, last_row, 32):
        r = first + tl.arange(0, 32)
        end = tl.load(query_indptr + r + 1, r < last_row, other=2147483647)
        row += tl.sum((end[None, :] <= token[:, None]).to(tl.int32), 1)
    return row


@triton.jit(do_not_specialize=["tokens", "groups", "fold"])
def tree_work_kernel(
    work,
    trunk_len,
    branch_len,
    group_indptr,
    query_indptr,
    tokens,
    groups,
    fold,
    BLOCK_M: tl.constexpr,
):
    """What one tile works on, and where its tokens are, for the kernels of all layers; see :func:`tree_work`."""
    tile, places = tl.program_id(0), work + 8 * tl.num_programs(0)
    if tile == 0:
        tl.store(places + 2 * tokens, tl.load(query_indptr + tl.load(group_indptr + groups)))
    group, first_tile = _group_of(tile, group_indptr, query_indptr, groups, fold, BLOCK_M)
    first_row, last_row = tl.load(group_indptr + group), tl.load(group_indptr + group + 1)
    first_token, last_token = tl.load(query_indptr + first_row), tl.load(query_indptr + last_row)
    first_pair = first_token * fold + (tile - first_tile) * BLOCK_M
    entry = work + 8 * tile
    if first_pair >= last_token * fold:
        tl.store(entry, -1)
        return
    token = (first_pair + tl.arange(0, BLOCK_M)) // fold
    valid = token < last_token
    row = _row_of(token, query_indptr, first_row, last_row)
    end, length = tl.load(query_indptr + row + 1, valid, other=0), tl.load(branch_len + row, valid, other=0)
    index = length - end + token  # in the branch
    tl.store(places + 2 * token, row, valid)
    tl.store(places + 2 * token + 1, index, valid)
    tl.store(entry, group)
    tl.store(entry + 1, first_pair)
    tl.store(entry + 2, last_token)
    tl.store(entry + 3, tl.min(tl.where(valid, row, last_row)))
    tl.store(entry + 4, tl.max(tl.where(valid, row, first_row)))
    tl.store(entry + 5, tl.load(trunk_len + group))
    tl.store(entry + 6, tl.max(tl.where(valid, index, -1)) + 1)
    tl.store(entry + 7, tl.min(tl.where(valid, index, 2147483647)))


@triton.jit
def _attend(
    q,
    k_pool,
    v_pool,
    q_offset,
    valid,
    queries,
    slot,
    exists,
    seen,
    maximum,
    total,
    values,
    scale,
    softcap,
    HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PIECE_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of keys: the running maximum, sum and weighted values with it.

    ``slot`` int64 ``[BLOCK_N]`` counts keys of one head; ``seen`` ``[BLOCK_M, BLOCK_N]`` or ``[1, BLOCK_N]``.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    dv = tl.arange(0, BLOCK_DV)
    scores = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for piece in tl.static_range(BLOCK_D // PIECE_D):
        part_d = piece * PIECE_D + tl.arange(0, PIECE_D)
        if PIECE_D < BLOCK_D:  # queries that are held for the whole loop would fill the registers
            queries = tl.load(q + q_offset[:, None] + part_d, valid[:, None] & (part_d < HEAD_SIZE), other=0.0)
        keys = tl.load(
            k_pool + slot[None, :] * HEAD_SIZE + part_d[:, None],
            exists[None, :] & (part_d[:, None] < HEAD_SIZE),
            other=0.0,
        )
        scores = tl.dot(queries, keys, scores, input_precision=PRECISION)
    if SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1), which ends at 1 where the exponential overflows.
        raised = tl.exp2(scores * (scale * 2.0 * LOG2E / softcap))
        scores = (softcap * LOG2E) * (1.0 - 2.0 / (raised + 1.0))
    else:
        scores = scores * (scale * LOG2E)
    scores = tl.where(seen, scores, float("-inf"))

    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    weights = tl.exp2(scores - shift[:, None])
    factor = tl.exp2(maximum - shift)
    total = total * factor + tl.sum(weights, 1)
    block = tl.load(
        v_pool + slot[:, None] * VALUE_SIZE + dv[None, :], exists[:, None] & (dv[None, :] < VALUE_SIZE), other=0.0
    )
    values = tl.dot(weights.to(block.dtype), block, values * factor[:, None], input_precision=PRECISION)
    return new_maximum, total, values


@triton.jit(do_not_specialize=["tokens", "trunk_width", "branch_width", "window", "fold", "kv_heads"])
def tree_attention_kernel(
    q,
    k_pool,
    v_pool,
    out,
    part_max,
    part_sum,
    sinks,
    trunk_slots,
    branch_slots,
    branch_len,
    work,
    q_token_stride,
    q_head_stride,
    tokens,
    trunk_width,
    branch_width,
    kv_heads,
    fold,
    window,
    scale,
    softcap,
    HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PIECE_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    SPLIT: tl.constexpr,
    LEAST_BLOCKS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """Weighted values of one tile of queries over one part of its list, divided by their sum unless SPLIT.

    With SPLIT, ``out`` is float32 ``[parts, T, Hq, Dv]``, and ``part_max`` (base 2) and ``part_sum`` ``[parts, T, Hq]``
    tell how to put the parts together.
    """
    begin_dependent(PDL)
    LOG2E: tl.constexpr = 1.4426950408889634
    tile, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = kv_heads * fold
    dv = tl.arange(0, BLOCK_DV)
    entry, places = work + 8 * tile, work + 8 * tl.num_programs(0)
    group, first_pair, last_token = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    tile_row, tile_last_row = tl.load(entry + 3), tl.load(entry + 4)
    trunk, branch_end, oldest_index = tl.load(entry + 5), tl.load(entry + 6), tl.load(entry + 7)
    if not SPLIT:  # padding after the last group's queries
        used = tl.load(places + 2 * tokens)
        for token in range(used + tile, tokens, tl.num_programs(0)):
            for head in range(kv_head * fold, (kv_head + 1) * fold):
                offset = token * heads.to(tl.int64) * VALUE_SIZE + head * VALUE_SIZE
                tl.store(out + offset + dv, tl.zeros((BLOCK_DV,), out.dtype.element_ty), dv < VALUE_SIZE)
    if group < 0:
        return
    pair = first_pair + tl.arange(0, BLOCK_M)
    token, head = pair // fold, kv_head * fold + pair % fold
    valid = token < last_token
    row = tl.load(places + 2 * token, valid, other=-1)
    index = tl.load(places + 2 * token + 1, valid, other=-1)  # in the branch
    position = trunk + index

    # The list: keys of the trunk from trunk_start on, then of every branch those from branch_start to branch_end.
    trunk_start, branch_start = 0, 0
    if WINDOW:
        oldest = trunk + oldest_index - window + 1
        trunk_start, branch_start = tl.minimum(tl.maximum(oldest, 0), trunk), tl.maximum(oldest - trunk, 0)
    in_trunk_count = trunk - trunk_start
    width = branch_end - branch_start
    listed = in_trunk_count + (tile_last_row - tile_row + 1) * width
    begin, stop = 0, listed
    if SPLIT:
        blocks = tl.maximum(tl.cdiv(tl.cdiv(listed, BLOCK_N), tl.num_programs(2)), LEAST_BLOCKS)
        begin = part * blocks * BLOCK_N
        stop = tl.minimum(begin + blocks * BLOCK_N, listed)

    q_offset = token.to(tl.int64) * q_token_stride + head.to(tl.int64) * q_head_stride
    d = tl.arange(0, PIECE_D)
    queries = tl.load(q + q_offset[:, None] + d, valid[:, None] & (d < HEAD_SIZE), other=0.0)
    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    values = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    if SINKS:
        if part == 0:
            maximum = tl.load(sinks + head, valid, other=0.0).to(tl.float32) * LOG2E
            total = tl.full((BLOCK_M,), 1.0, tl.float32)

    # Both loops from 0: a lower bound that is not a constant hides from Triton that their loads are contiguous.
    trunk_stop = tl.minimum(stop, in_trunk_count)
    for start in tl.range(0, trunk_stop - begin, BLOCK_N, num_stages=STAGES):
        n = begin + start + tl.arange(0, BLOCK_N)
        exists = n < trunk_stop
        slot = tl.load(trunk_slots + group * trunk_width + trunk_start + n, exists, other=0).to(tl.int64)
        seen = exists[None, :]
        if WINDOW:
            seen &= (trunk_start + n)[None, :] > position[:, None] - window
        maximum, total, values = _attend(
            q, k_pool, v_pool, q_offset, valid, queries, slot * kv_heads + kv_head, exists, seen,
            maximum, total, values, scale, softcap,
            HEAD_SIZE, VALUE_SIZE, BLOCK_D, PIECE_D, BLOCK_DV, BLOCK_M, BLOCK_N, SOFTCAP, PRECISION,
        )  # fmt: skip
    branch_begin = tl.maximum(begin, in_trunk_count)
    for start in tl.range(0, stop - branch_begin, BLOCK_N, num_stages=STAGES):
        n = branch_begin + start + tl.arange(0, BLOCK_N)
        branch = n - in_trunk_count
        key_row = tile_row + branch // tl.maximum(width, 1)
        key_index = branch_start + branch % tl.maximum(width, 1)
        # A branch that is shorter than the longest ends before this, and what its table holds behind that may be
        # anything. Read all the same: a load behind one that is behind another would not be asked for as early.
        listed_here = n < stop
        slot = tl.load(branch_slots + key_row * branch_width + key_index, listed_here, other=0).to(tl.int64)
        exists = listed_here & (key_index < tl.load(branch_len + key_row, listed_here, other=0))
        seen = exists[None, :] & (key_row[None, :] == row[:, None]) & (key_index[None, :] <= index[:, None])
        if WINDOW:
            seen &= key_index[None, :] > index[:, None] - window
        maximum, total, values = _attend(
            q, k_pool, v_pool, q_offset, valid, queries, slot * kv_heads + kv_head, exists, seen,
            maximum, total, values, scale, softcap,
            HEAD_SIZE, VALUE_SIZE, BLOCK_D, PIECE_D, BLOCK_DV, BLOCK_M, BLOCK_N, SOFTCAP, PRECISION,
        )  # fmt: skip

    place = token.to(tl.int64) * heads + head
    if SPLIT:
        place += part.to(tl.int64) * tokens * heads
        tl.store(part_max + place, maximum, valid)
        tl.store(part_sum + place, total, valid)
    else:
        values = values / tl.where(total != 0, total, 1.0)[:, None]
    if (begin < stop) | (part == 0):  # part 0 may have a sum without keys, of the sink
        tl.store(
            out + place[:, None] * VALUE_SIZE + dv[None, :],
            values.to(out.dtype.element_ty),
            valid[:, None] & (dv[None, :] < VALUE_SIZE),
        )


@triton.jit(do_not_specialize=["tokens", "tiles", "heads", "parts"])
def merge_parts_kernel(
    values,
    part_max,
    part_sum,
    out,
    work,
    tokens,
    tiles,
    heads,
    parts,
    VALUE_SIZE: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One query's parts ``[parts, T, Hq, Dv]`` put together; 0 for padding."""
    begin_dependent(PDL)
    token, head = tl.program_id(0), tl.program_id(1)
    part, dv = tl.arange(0, BLOCK_PARTS), tl.arange(0, BLOCK_DV)
    used = tl.load(work + 8 * tiles + 2 * tokens)
    place = (part.to(tl.int64) * tokens + token) * heads + head
    present = part < tl.where(token < used, parts, 0)
    total = tl.load(part_sum + place, present, other=0.0)
    maximum = tl.load(part_max + place, present, other=float("-inf"))
    top = tl.max(maximum)
    factor = tl.where(total != 0, tl.exp2(maximum - tl.where(top == float("-inf"), 0.0, top)), 0.0)  # NaN stays
    weighted = tl.load(  # parts without keys have stored nothing
        values + place[:, None] * VALUE_SIZE + dv[None, :],
        (total != 0)[:, None] & (dv[None, :] < VALUE_SIZE),
        other=0.0,
    )
    result = tl.sum(weighted * factor[:, None], 0)
    total = tl.sum(total * factor)
    result = result / tl.where(total != 0, total, 1.0)
    offset = (token.to(tl.int64) * heads + head) * VALUE_SIZE
    tl.store(out + offset + dv, result.to(out.dtype.element_ty), dv < VALUE_SIZE)


def _constants(
    tile: Tile, head_size: int, value_size: int, *, hip: bool, split: bool, window: bool, softcap: bool, sinks: bool
) -> dict[str, Any]:
    block_d = max(16, triton.next_power_of_2(head_size))
    return {
        "HEAD_SIZE": head_size,
        "VALUE_SIZE": value_size,
        "BLOCK_D": block_d,
        "PIECE_D": min(block_d, tile.most_head),
        "BLOCK_DV": max(16, triton.next_power_of_2(value_size)),
        "BLOCK_M": tile.queries,
        "BLOCK_N": tile.keys,
        "STAGES": tile.stages,
        "SPLIT": split,
        "LEAST_BLOCKS": least_blocks(tile),
        "WINDOW": window,
        "SOFTCAP": softcap,
        "SINKS": sinks,
        "PRECISION": "ieee" if hip else "tf32x3",  # three products of tf32 have float32's accuracy
    }


_HIP = torch.version.hip is not None


def _tiles(q: torch.Tensor, v_pool: torch.Tensor, groups: int, max_rows: int, max_queries: int) -> tuple[Tile, int]:
    """The tile, and how many: since they start at first_token * fold // queries + group, enough for any lengths."""
    (tokens, heads, head_size), (_, kv_heads, value_size) = q.shape, v_pool.shape
    fold = heads // kv_heads
    tile = choose_tile(head_size, value_size, q.dtype, min(max_rows * max_queries, tokens) * fold, hip=_HIP)
    return tile, tokens * fold // tile.queries + groups


def tree_work(
    q: torch.Tensor,
    v_pool: torch.Tensor,
    trunk_len: torch.Tensor,
    branch_len: torch.Tensor,
    group_indptr: torch.Tensor,
    query_indptr: torch.Tensor,
    max_rows: int,
    max_queries: int,
) -> torch.Tensor:
    """:func:`stars_fast.ops.tree_attention.tree_work` in Triton.

    Returns
    -------
    torch.Tensor
        int32 ``[8 * tiles + 2 * T + 1]``. Of each tile the group (-1 where there is no work), the first (token, head)
        pair, the token behind the group's last, the first row and the last, the trunk's length, where the furthest
        branch ends, and the earliest index in a branch; of each token the row and the index in its branch; and how many
        tokens are no padding.
    """
    (tokens, heads, _), kv_heads, groups = q.shape, v_pool.shape[1], trunk_len.shape[0]
    tile, tiles = _tiles(q, v_pool, groups, max_rows, max_queries)
    work = torch.empty(8 * tiles + 2 * tokens + 1, dtype=torch.int32, device=q.device)
    tree_work_kernel[(tiles,)](
        work,
        trunk_len,
        branch_len,
        group_indptr,
        query_indptr,
        tokens,
        groups,
        heads // kv_heads,
        BLOCK_M=tile.queries,
        num_warps=1,
    )
    return work


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def tree_attention(
    q: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    out: torch.Tensor,
    trunk_slots: torch.Tensor,
    trunk_len: torch.Tensor,
    branch_slots: torch.Tensor,
    branch_len: torch.Tensor,
    group_indptr: torch.Tensor,
    query_indptr: torch.Tensor,
    max_rows: int,
    max_queries: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    work: torch.Tensor | None = None,
    *,
    parts: int | None = None,
) -> None:
    """:func:`stars_fast.ops.tree_attention` in Triton; ``parts`` overrides in how many parts lists are split."""
    (tokens, heads, head_size), (_, kv_heads, value_size) = q.shape, v_pool.shape
    check(head_size, value_size, q.dtype)
    if heads % kv_heads:
        raise ValueError(f"tree_attention: {heads} query heads cannot share {kv_heads} key-value heads evenly")
    for name, tensor in (("k_pool", k_pool), ("v_pool", v_pool)):
        if tensor.dtype != q.dtype:
            raise ValueError(f"tree_attention: {name} must have the dtype of q, {q.dtype}, got {tensor.dtype}")
        if not tensor.is_contiguous():
            raise ValueError(f"tree_attention: {name} must be contiguous, got strides {tensor.stride()}")
    if not out.is_contiguous():
        raise ValueError(f"tree_attention: out must be contiguous, got strides {out.stride()}")
    groups, rows = trunk_len.shape[0], branch_len.shape[0]
    for name, table, shape in (
        ("trunk_slots", trunk_slots, (groups, trunk_slots.shape[1])),
        ("trunk_len", trunk_len, (groups,)),
        ("branch_slots", branch_slots, (rows, branch_slots.shape[1])),
        ("branch_len", branch_len, (rows,)),
        ("group_indptr", group_indptr, (groups + 1,)),
        ("query_indptr", query_indptr, (rows + 1,)),
    ):
        address(table, name, torch.int32, shape)
    if q.stride(-1) != 1:
        q = q.contiguous()
    fold = heads // kv_heads
    if tokens == 0:
        return
    tile, tiles = _tiles(q, v_pool, groups, max_rows, max_queries)
    if work is None:
        work = tree_work(q, v_pool, trunk_len, branch_len, group_indptr, query_indptr, max_rows, max_queries)
    address(work, "work", torch.int32, (8 * tiles + 2 * tokens + 1,))
    programs, processors = max(groups, triton.cdiv(tokens * fold, tile.queries)) * kv_heads, _processors(q.device)
    longest = trunk_slots.shape[1] + min(max_rows, tile.queries) * branch_slots.shape[1]
    tile = fit_warps(tile, programs, longest, processors)
    if parts is None:
        parts = choose_parts(tile, programs, longest, processors)
    split = parts > 1
    values, part_max, part_sum = out, out, out
    if split:
        values = q.new_empty(parts, tokens, heads, value_size, dtype=torch.float32)
        part_max, part_sum = q.new_empty(2, parts, tokens, heads, dtype=torch.float32)
    constants = _constants(
        tile,
        head_size,
        value_size,
        hip=_HIP,
        split=split,
        window=window > 0,
        softcap=softcap > 0,
        sinks=sinks is not None,
    )
    tree_attention_kernel[(tiles, kv_heads, parts)](
        q,
        k_pool,
        v_pool,
        values,
        part_max,
        part_sum,
        q if sinks is None else sinks,
        trunk_slots,
        branch_slots,
        branch_len,
        work,
        q.stride(0),
        q.stride(1),
        tokens,
        trunk_slots.shape[1],
        branch_slots.shape[1],
        kv_heads,
        fold,
        window,
        scale,
        softcap,
        **constants,
        **dependent(q.device),
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,  # Triton's default changes from release to release
    )
    if split:
        merge_parts_kernel[(tokens, heads)](
            values,
            part_max,
            part_sum,
            out,
            work,
            tokens,
            tiles,
            heads,
            parts,
            VALUE_SIZE=value_size,
            BLOCK_DV=constants["BLOCK_DV"],
            BLOCK_PARTS=triton.next_power_of_2(parts),
            **dependent(q.device),
            num_warps=4,
            enable_fp_fusion=True,
        )


def variants(target: GPUTarget) -> list[Variant]:
    """Head sizes of real models, decode steps and scoring, few and many programs at a time.

    float16 at one size only, as its code differs from bfloat16's by a conversion.

    Query heads that share a key-value head are packed as further queries, so that their number is no constant.
    """
    hip, found = target.backend == "hip", {}
    sizes = ((64, 64), (96, 96), (128, 128), (192, 128), (256, 256))
    bf16 = torch.bfloat16
    padded = (torch.float32, (96, 96))  # to 128 elements, which are compiled
    kinds = [(dtype, size) for dtype in (torch.float32, bf16) for size in sizes if (dtype, size) != padded]
    wanted = [(size, dtype, packed, packed < 64, False) for dtype, size in kinds for packed in (16, 64)]
    wanted += [((128, 128), torch.float16, 16, True, False)]
    wanted += [((128, 128), bf16, 32, True, False), ((128, 128), bf16, 64, True, False)]
    wanted += [(size, bf16, packed, packed < 64, True) for size in ((128, 128), (256, 256)) for packed in (16, 64)]
    wanted += [((size, size), bf16, 16, False, False) for size in (64, 96, 128)]
    for size, dtype, packed, split, options in wanted:
        one = _variant(size, dtype, packed, hip=hip, split=split, options=options)
        found[one.name] = one
    for packed in () if hip else (16, 32):
        tile = choose_tile(128, 128, bf16, packed)._replace(keys=32)
        one = _variant((128, 128), bf16, packed, hip=hip, split=True, options=False, tile=tile)
        found[one.name] = one
    if target.arch == 90:
        for tile in (tile for tiles in CANDIDATES.values() for tile in tiles if tile.pipelined):
            one = _variant((128, 128), bf16, tile.queries, hip=hip, split=False, options=False, tile=tile)
            found[one.name] = one
    merge = {name: "i32" if name.islower() else "constexpr" for name in merge_parts_kernel.arg_names}
    merge |= dict.fromkeys(("values", "part_max", "part_sum"), "*fp32") | {"out": "*bf16", "work": "*i32"}
    constants = {"VALUE_SIZE": 128, "BLOCK_DV": 128, "BLOCK_PARTS": 16, "PDL": False}
    types = {name: kind for name, kind in merge.items() if kind != "constexpr"}
    tables = ("work", "trunk_len", "branch_len", "group_indptr", "query_indptr")
    work = dict.fromkeys(tables, "*i32") | dict.fromkeys(("tokens", "groups", "fold"), "i32")
    return [
        *found.values(),
        Variant("tree_attention.merge", merge_parts_kernel, types, constants),
        Variant("tree_attention.work", tree_work_kernel, work, {"BLOCK_M": 64}, num_warps=1),
    ]


def _variant(
    sizes: tuple[int, int],
    dtype: torch.dtype,
    packed: int,
    *,
    hip: bool,
    split: bool,
    options: bool,
    tile: Tile | None = None,
) -> Variant:
    """As a call would compile it, or with another tile than it would choose."""
    chosen = choose_tile(*sizes, dtype, packed, hip=hip)
    if not split:  # there are many programs
        chosen = fit_warps(chosen, 2, 0, 1)
    tile = tile or chosen
    name, float_type = DTYPES[dtype], f"*{DTYPES[dtype]}"
    tables = ("trunk_slots", "branch_slots", "branch_len", "work")
    types = {name: "i32" for name in tree_attention_kernel.arg_names if name.islower()}
    types |= dict.fromkeys(("q", "k_pool", "v_pool", "sinks"), float_type) | dict.fromkeys(tables, "*i32")
    types |= dict.fromkeys(("out", "part_max", "part_sum"), "*fp32" if split else float_type)
    types |= dict.fromkeys(("q_token_stride", "q_head_stride"), "i32:16") | dict.fromkeys(("scale", "softcap"), "fp32")
    size = "d{}".format(sizes[0] if sizes[0] == sizes[1] else "{}/{}".format(*sizes))
    parts = [size, f"m{tile.queries}", name, *(["split"] if split else []), *(["options"] if options else [])]
    if tile != chosen:
        parts.append(f"{tile.keys}x{tile.warps}x{tile.stages}")
    constants = _constants(tile, *sizes, hip=hip, split=split, window=options, softcap=options, sinks=options)
    return Variant(
        f"tree_attention[{','.join(parts)}]",
        tree_attention_kernel,
        types,
        constants | {"PDL": False},
        num_warps=tile.warps,
        num_stages=tile.stages,
        fp_fusion=True,
        needs_matrix=True,
        pipelined=tile.pipelined,
    )

"""Attention over a tree: every query sees its request's trunk and the past of its own branch."""

from __future__ import annotations

from collections.abc import Callable

import torch

from stars_fast.ops._library import CHECKS, FLOAT_CODES, address, define, on, operators, triton_kernel


def check_supported(key_size: int, value_size: int, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse keys and values that the kernel of this device does not support, before any work is planned.

    Raises
    ------
    ValueError
        Naming the head size or dtype, and what is supported.
    RuntimeError
        If the device's kernels need Triton and it cannot be imported.
    """
    if operators["tree_attention"].kernel(device.type).startswith("Triton"):
        triton_kernel("tree_attention").check(key_size, value_size, dtype)
    elif dtype not in FLOAT_CODES:
        raise ValueError(f"tree_attention: keys and values must be float32, float16 or bfloat16, got {dtype}")


def works_on_padding(device: torch.device) -> bool:
    """Whether the kernel of this device takes time and memory for all that tables have room for, and not only for what
    the lengths say: torch's reference, which does not read them on a GPU.
    """
    return device.type != "cpu" and operators["tree_attention"].kernel(device.type) == "torch reference"


def tree_work(
    q: torch.Tensor,
    v_pool: torch.Tensor,
    trunk_len: torch.Tensor,
    branch_len: torch.Tensor,
    group_indptr: torch.Tensor,
    query_indptr: torch.Tensor,
    max_rows: int,
    max_queries: int,
) -> torch.Tensor | None:
    """Which program of :func:`tree_attention` has which queries and keys, for all layers of a pass.

    The arguments are those of the operator; of ``q`` and ``v_pool`` only sizes and dtype matter. None where the kernel
    of this device has no use for it, and where arguments are still to be checked.
    """
    if CHECKS or not operators["tree_attention"].kernel(q.device.type).startswith("Triton"):
        return None
    make, tables = triton_kernel("tree_attention").tree_work, (trunk_len, branch_len, group_indptr, query_indptr)
    with on(q.device):
        work: torch.Tensor = make(q, v_pool, *tables, max_rows, max_queries)
    return work


def tree_attention_reference(
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
) -> None:
    """Attend from packed queries to slots of a tree, accumulating in float32.

    Groups (requests) share a trunk, rows (candidates) have a branch each. Row b's queries are
    ``query_indptr[b]:query_indptr[b + 1]``, and they are the last n tokens of its branch: query j is branch token
    ``i = branch_len[b] - n + j`` at position ``trunk_len[g] + i``, and sees the whole trunk and branch tokens 0 to i.
    One query a row is a decode step, a few are the scoring of a segment, an empty trunk is a prefill. Where the branch
    has fewer tokens than queries, those too many see the trunk alone: in cross-attention all of them do.

    Parameters
    ----------
    q
        ``[T, Hq, D]``, any strides.
    k_pool, v_pool
        ``[N, Hkv, D]`` and ``[N, Hkv, Dv]``, contiguous: one layer's slots, new tokens already appended. Query head h
        reads key-value head ``h // (Hq // Hkv)``. Slot 0, which absorbs padding, may hold anything.
    out
        ``[T, Hq, Dv]``, contiguous, of the dtype of q, written; 0 for queries after those of the last group (padding)
        and those that see nothing.
    trunk_slots, trunk_len
        int32 ``[G, P]`` and ``[G]``.
    branch_slots, branch_len
        int32 ``[B, S]`` and ``[B]``, the new tokens included; S is at least 1.
    group_indptr
        int32 ``[G + 1]``: group g has rows ``group_indptr[g]:group_indptr[g + 1]``. Rows after the last group are
        padding.
    query_indptr
        int32 ``[B + 1]``.
    max_rows, max_queries
        No group has more rows and no row more queries; so that nothing waits for the device.
    scale
        Multiplies the scores.
    window
        Sliding window: keys at ``position > query position - window`` are seen. 0 for none.
    softcap
        Scores become ``softcap * tanh(score / softcap)`` after scaling (Gemma 2). 0 for none.
    sinks
        ``[Hq]`` or None: one more logit per head in the softmax's denominator (gpt-oss).
    work
        What :func:`tree_work` made of the same tables, for queries and pools of the same sizes; None: it is made here.

    Raises
    ------
    ValueError
        For a dtype, shape or strides that a kernel would misread, and where ``_library`` says that contents are
        checked, for a slot that the pools do not have, a length that its table does not have, row pointers that fall
        or pass their end, and where ``out`` shares memory with another argument.
    """
    # The queries of all rows of a group make one matrix for the trunk; the branches are a batched product of their own.
    # Each part has a softmax of its own, and the two are merged by their maxima and sums. Nothing waits for a GPU.
    tokens, heads, head_size = q.shape
    rows, groups, kv_heads = branch_len.shape[0], trunk_len.shape[0], k_pool.shape[1]
    device, folded_heads = q.device, heads // kv_heads
    counts = query_indptr.diff()  # [B]
    if device.type == "cpu":  # lengths cost nothing to read here, so everything is cut to what is used
        max_rows, max_queries = int(group_indptr.diff().max()), int(counts.max())
        trunk_slots = trunk_slots[:, : int(trunk_len.max())]
        branch_slots = branch_slots[:, : max(1, int(branch_len.max()))]
        if max_queries == 0:
            out.zero_()
            return
    row, query = torch.arange(rows, device=device), torch.arange(max_queries, device=device)
    group = torch.bucketize(row, group_indptr[1:], right=True).clamp(max=groups - 1)  # [B]
    index = (branch_len - counts)[:, None] + query  # [B, Q], of the query in its branch

    # Queries of one row and key-value head are ordered by (query, head).
    packed = (query_indptr[:-1, None] + query).clamp(max=tokens - 1)
    queries = (q[packed].float() * scale).view(rows, max_queries, kv_heads, folded_heads, head_size)
    queries = queries.transpose(1, 2).reshape(rows, kv_heads, max_queries * folded_heads, head_size)
    index = index.repeat_interleave(folded_heads, 1)[:, None, :, None]  # [B, 1, Q * F, 1]

    key = torch.arange(branch_slots.shape[1], device=device)
    seen = key <= index
    if window:
        seen &= key > index - window
    parts = [_attend(queries, *_gather(k_pool, v_pool, branch_slots, branch_len), seen, softcap)]

    if trunk_slots.shape[1]:
        padded = (group_indptr[:-1, None] + torch.arange(max_rows, device=device)).clamp(max=rows - 1)  # [G, R]
        key = torch.arange(trunk_slots.shape[1], device=device)
        seen = (key < trunk_len[:, None])[:, None, None]  # [G, 1, 1, P]
        if window:
            oldest = index + trunk_len[group][:, None, None, None] - window
            seen = seen & (key > oldest[padded].transpose(1, 2).flatten(2, 3))  # [G, 1, R * Q * F, P]
        folded = queries[padded].transpose(1, 2).flatten(2, 3)  # [G, Hkv, R * Q * F, D]
        part = _attend(folded, *_gather(k_pool, v_pool, trunk_slots, trunk_len), seen, softcap)
        place = (group * max_rows + row - group_indptr[group]).clamp(max=groups * max_rows - 1)
        parts.append(tuple(_rows(x, max_rows)[place] for x in part))
    if sinks is not None:
        sink = sinks.float().view(kv_heads, 1, folded_heads).expand(-1, max_queries, -1).reshape(1, kv_heads, -1, 1)
        parts.append((torch.zeros_like(sink), sink, torch.ones_like(sink)))

    merged = _merge(parts).view(rows, kv_heads, max_queries, folded_heads, -1).transpose(1, 2).flatten(2, 3)
    token = torch.arange(tokens, device=device)
    owner = torch.bucketize(token, query_indptr[1:], right=True).clamp(max=rows - 1)  # [T]
    merged = merged[owner, (token - query_indptr[owner]).clamp(max=max_queries - 1)]  # [T, Hq, Dv]
    padding = token >= query_indptr.index_select(0, group_indptr[-1:])
    out.copy_(merged.masked_fill_(padding[:, None, None], 0))


_Part = tuple[torch.Tensor, ...]  # weighted values, maximum of the scores, sum of the weights


def _gather(
    k_pool: torch.Tensor, v_pool: torch.Tensor, slots: torch.Tensor, lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values float32 ``[N, Hkv, L, D]`` of slots ``[N, L]``; past each length slot 0, and a value of 0."""
    kv_heads = k_pool.shape[1]
    unused = torch.arange(slots.shape[1], device=slots.device) >= lengths[:, None]  # [N, L]
    slots = slots.masked_fill(unused, 0).long()
    head = torch.arange(kv_heads, device=slots.device)
    index = slots[:, None] * kv_heads + head[:, None]  # [N, Hkv, L]: gathered in the order the products want
    flat = index.flatten()
    keys, values = k_pool.flatten(0, 1).index_select(0, flat), v_pool.flatten(0, 1).index_select(0, flat)
    values = values.float().view(*index.shape, -1)
    # Slot 0 absorbs what rows that ended write, a NaN perhaps, which a weight of zero would pass on.
    return keys.float().view(*index.shape, -1), values.masked_fill(unused[:, None, :, None], 0)


def _attend(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor, softcap: float
) -> _Part:
    """Softmax attention that is not yet divided by its sum; a query that sees nothing weighs nothing."""
    scores = queries @ keys.transpose(-1, -2)
    if softcap:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    scores.masked_fill_(~seen, -torch.inf)
    maximum = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).min)
    weights = scores.sub_(maximum).exp_()
    return weights @ values, maximum, weights.sum(-1, keepdim=True)


def _rows(part: torch.Tensor, max_rows: int) -> torch.Tensor:
    """``[G, Hkv, R * M, X]`` of the trunk -> ``[G * R, Hkv, M, X]``, as the branches have it."""
    return part.unflatten(2, (max_rows, -1)).transpose(1, 2).flatten(0, 1)


def _merge(parts: list[_Part]) -> torch.Tensor:
    """One softmax out of several over disjoint keys."""
    maximum = parts[0][1]
    for _, other, _ in parts[1:]:
        maximum = torch.maximum(maximum, other)
    factors = [(part_maximum - maximum).exp_() for _, part_maximum, _ in parts]
    values, total = parts[0][0] * factors[0], parts[0][2] * factors[0]
    for (part_values, _, part_total), factor in zip(parts[1:], factors[1:], strict=True):
        values, total = values + part_values * factor, total + part_total * factor
    return values / total.clamp(min=torch.finfo(torch.float32).tiny)


def _call(
    function: Callable[..., None],
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
) -> None:
    (tokens, heads, head_size), (slots, kv_heads, value_size) = q.shape, v_pool.shape
    (groups, trunk_width), (rows, branch_width) = trunk_slots.shape, branch_slots.shape
    if q.dtype not in FLOAT_CODES:
        raise ValueError(f"q must be float32, float16 or bfloat16, got {q.dtype}")
    if q.stride(-1) != 1:
        q = q.contiguous()
    sinks = None if sinks is None else sinks.float().contiguous()
    int32 = torch.int32
    function(
        q.data_ptr(),
        q.stride(0),
        q.stride(1),
        address(k_pool, "k_pool", q.dtype, (slots, kv_heads, head_size)),
        address(v_pool, "v_pool", q.dtype, (slots, kv_heads, value_size)),
        address(out, "out", q.dtype, (tokens, heads, value_size)),
        FLOAT_CODES[q.dtype],
        tokens,
        heads,
        kv_heads,
        head_size,
        value_size,
        slots,
        address(trunk_slots, "trunk_slots", int32, (groups, trunk_width)),
        address(trunk_len, "trunk_len", int32, (groups,)),
        groups,
        trunk_width,
        address(branch_slots, "branch_slots", int32, (rows, branch_width)),
        address(branch_len, "branch_len", int32, (rows,)),
        rows,
        branch_width,
        address(group_indptr, "group_indptr", int32, (groups + 1,)),
        address(query_indptr, "query_indptr", int32, (rows + 1,)),
        scale,
        window,
        softcap,
        0 if sinks is None else address(sinks, "sinks", torch.float32, (heads,)),
        torch.get_num_threads(),
    )


tree_attention = define(
    "tree_attention", reference=tree_attention_reference, call=_call, fake=lambda *_: None, written=("out",)
)

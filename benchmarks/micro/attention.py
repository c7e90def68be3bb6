"""Cases of ``tree_attention``: decode steps and the scoring of segments, beside attention on a cache per row."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from stars_fast.ops import tree_attention
from stars_fast.ops.tree_attention import tree_attention_reference, tree_work

from .refcheck import OURS, REFERENCE, Absent, Case, Prepared, copies, short

PER_ROW, FLASH, CASCADE = "SDPA per row", "flash-attn per row", "FlashInfer cascade"
_MOST_EXPANDED = 24 * 2**30  # bytes of caches per row
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}

HEADS = {  # query heads, key-value heads, head size
    "llama-3.2-1b": (32, 8, 64),
    "qwen2.5-7b": (28, 4, 128),
    "llama-2-7b": (32, 32, 128),
}


class Tree(NamedTuple):
    """``groups`` requests of ``rows`` candidates; ``queries`` tokens of each candidate attend, its last ones."""

    model: str
    groups: int
    rows: int
    trunk: int
    branch: int
    queries: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        work = "decode" if self.queries == 1 else f"score{self.queries}"
        return f"{self.model}/{self.groups}x{self.rows}/trunk{self.trunk}/{work}/{short(self.dtype)}"


def _around(center: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    """Groups, rows and trunk: each varied alone, and the corners where splitting and packing matter most."""
    groups, rows, trunk = center
    varied = [center, *((g, rows, trunk) for g in (1, 64)), *((groups, r, trunk) for r in (1, 4, 16))]
    varied += [(groups, rows, t) for t in (256, 4096)]
    return [*varied, (1, 1, 4096), (1, 16, 4096), (64, 1, 256), (64, 4, 256), (64, 16, 4096)]


SHAPES = {
    "cuda": [
        Tree(model, groups, rows, trunk, branch, queries)
        for model in HEADS
        for branch, queries in ((8, 1), (16, 16))
        for groups, rows, trunk in _around((16, 8, 1024))
    ],
    "cpu": [
        Tree("llama-3.2-1b", 2, rows, 256, branch, queries, dtype)
        for dtype in (torch.float32, torch.bfloat16)
        for rows, branch, queries in ((1, 8, 1), (8, 8, 1), (4, 16, 16))
    ],
}


class Inputs(NamedTuple):
    """Arguments of ``tree_attention`` but for the pools, and a pair of pools per layer."""

    q: torch.Tensor  # [T, Hq, D]
    out: torch.Tensor
    layers: list[tuple[torch.Tensor, torch.Tensor]]  # [N, Hkv, D] each
    tables: tuple[torch.Tensor, ...]
    rest: tuple[int, int, float]


def build(tree: Tree, device: torch.device) -> Case:
    """Trees of equal lengths in slots in random order, the least favourable to a kernel; tables have some room left."""
    heads, kv_heads, size = HEADS[tree.model]
    rows, generator = tree.groups * tree.rows, torch.Generator(device).manual_seed(0)
    used = tree.groups * tree.trunk + rows * tree.branch
    options = {"device": device, "dtype": tree.dtype, "generator": generator}

    slots = torch.randperm(used, device=device, generator=generator).int() + 1
    trunk_slots = torch.zeros(tree.groups, tree.trunk + 32, dtype=torch.int32, device=device)
    branch_slots = torch.zeros(rows, tree.branch + 8, dtype=torch.int32, device=device)
    trunk_slots[:, : tree.trunk] = slots[: tree.groups * tree.trunk].view(tree.groups, -1)
    branch_slots[:, : tree.branch] = slots[tree.groups * tree.trunk :].view(rows, -1)
    trunk_len = torch.full((tree.groups,), tree.trunk, dtype=torch.int32, device=device)
    branch_len = torch.full((rows,), tree.branch, dtype=torch.int32, device=device)
    group_indptr = torch.arange(tree.groups + 1, dtype=torch.int32, device=device) * tree.rows
    query_indptr = torch.arange(rows + 1, dtype=torch.int32, device=device) * tree.queries

    tokens, width = rows * tree.queries, tree.dtype.itemsize
    cache_bytes = 2 * used * kv_heads * size * width
    pool = (used + 1, kv_heads, size)
    q = torch.randn(tokens, heads, size, **options)
    inputs = Inputs(
        q,
        torch.empty_like(q),
        [(torch.randn(pool, **options), torch.randn(pool, **options)) for _ in range(copies(cache_bytes, device))],
        (trunk_slots, trunk_len, branch_slots, branch_len, group_indptr, query_indptr),
        (tree.rows, tree.queries, size**-0.5),
    )
    expected = torch.empty_like(q)
    tree_attention_reference(q, *inputs.layers[0], expected, *inputs.tables, *inputs.rest)
    seen = sum(tree.trunk + tree.branch - j for j in range(tree.queries)) * rows
    contenders: dict[str, Callable[[], Prepared]] = {
        OURS[device.type]: lambda: _on_tree(tree_attention, inputs),
        REFERENCE: lambda: _on_tree(tree_attention_reference, inputs),
        PER_ROW: lambda: _per_row(tree, inputs),
    }
    if device.type == "cuda":
        contenders[FLASH] = lambda: _flash(tree, inputs)
        contenders[CASCADE] = lambda: _cascade(tree, inputs)
    return Case(
        "tree_attention",
        tree.name,
        device,
        bytes=cache_bytes + 2 * tokens * heads * size * width + 4 * used,
        operations=4 * seen * heads * size,
        contenders=contenders,
        expected={"out": expected},
        tolerance={"out": _TOLERANCE[tree.dtype]},
    )


def _on_tree(attention: Callable[..., None], inputs: Inputs) -> Prepared:
    q, out, layers, tables, rest = inputs
    work = tree_work(q, layers[0][1], tables[1], *tables[3:], *rest[:2])  # made once for all layers, so not timed

    def call(i: int) -> None:
        attention(q, *layers[i % len(layers)], out, *tables, *rest, work=work)

    return Prepared(call, lambda _: {"out": out}, len(layers))


def _expanded(tree: Tree, inputs: Inputs) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values ``[B, L, Hkv, D]``: the trunk copied to each row, then its branch, as a row's cache has it."""
    layers, tables = inputs.layers, inputs.tables
    rows, length = tree.groups * tree.rows, tree.trunk + tree.branch
    size = 2 * rows * length * layers[0][0][0].numel() * tree.dtype.itemsize
    if size > _MOST_EXPANDED:
        raise Absent(f"a cache per row over {_MOST_EXPANDED / 2**30:.0f} GiB")
    trunk = tables[0][:, : tree.trunk].repeat_interleave(tree.rows, 0)
    slots = torch.cat((trunk, tables[2][:, : tree.branch]), 1).flatten()
    sets = min(len(layers), copies(size, inputs.q.device))
    return [tuple(x.index_select(0, slots).unflatten(0, (rows, length)) for x in layers[i]) for i in range(sets)]


def _per_row(tree: Tree, inputs: Inputs) -> Prepared:
    """As transformers lays its caches out: ``[B, Hkv, L, D]``, contiguous."""
    caches = [tuple(x.transpose(1, 2).contiguous() for x in pair) for pair in _expanded(tree, inputs)]
    q = inputs.q.unflatten(0, (-1, tree.queries)).transpose(1, 2)  # [B, Hq, Q, D]
    length, scale, mask = tree.trunk + tree.branch, inputs.rest[2], None
    shared = q.shape[1] != caches[0][0].shape[1]
    if tree.queries > 1:
        mask = causal_lower_right(tree.queries, length)
        if q.device.type == "cpu":
            mask = mask._materialize(q.device)

    def call(i: int) -> torch.Tensor:
        keys, values = caches[i % len(caches)]
        return F.scaled_dot_product_attention(q, keys, values, mask, scale=scale, enable_gqa=shared)

    return Prepared(call, lambda out: {"out": out.transpose(1, 2).flatten(0, 1)}, len(caches))


def _flash(tree: Tree, inputs: Inputs) -> Prepared:
    attend = _imported("flash_attn").flash_attn_with_kvcache
    caches = _expanded(tree, inputs)
    q = inputs.q.unflatten(0, (-1, tree.queries))  # [B, Q, Hq, D]

    def call(i: int) -> torch.Tensor:
        return attend(q, *caches[i % len(caches)], softmax_scale=inputs.rest[2], causal=True)

    return Prepared(call, lambda out: {"out": out.flatten(0, 1)}, len(caches))


def _cascade(tree: Tree, inputs: Inputs) -> Prepared:
    """Two levels over the same pools, pages of one slot: groups over trunks, rows over branches."""
    flashinfer = _imported("flashinfer")
    q, _, layers, (trunk_slots, _, branch_slots, _, group_indptr, query_indptr), _ = inputs
    workspace = torch.empty(512 * 2**20, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, workspace, "NHD")
    slots = (trunk_slots[:, : tree.trunk], branch_slots[:, : tree.branch])
    wrapper.plan(
        [group_indptr * tree.queries, query_indptr],
        [torch.arange(len(x) + 1, dtype=torch.int32, device=q.device) * x.shape[1] for x in slots],
        [x.flatten() for x in slots],
        [torch.ones(len(x), dtype=torch.int32, device=q.device) for x in slots],
        q.shape[1],
        layers[0][0].shape[1],
        q.shape[2],
        1,
        causal=True,
        sm_scale=inputs.rest[2],
        q_data_type=q.dtype,
    )
    paged = [tuple(pool[:, None] for pool in pair) for pair in layers]  # [N, 1, Hkv, D]
    return Prepared(lambda i: wrapper.run(q, paged[i % len(paged)]), lambda out: {"out": out}, len(paged))


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Absent(f"{name} is not installed" if error.name == name else f"{name}: {error}") from error

"""Attention of fresh prompts: our kernel, which finds keys by their slots, against libraries' for packed rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.gpu_parts.products import timed
from benchmarks.gpu_parts.runner import Runner
from benchmarks.micro.attention import HEADS
from benchmarks.micro.refcheck import deviation
from stars_fast.ops import tree_attention
from stars_fast.ops.tree_attention import tree_work
from stars_fast.tree.prefill import OURS, Library, Shape, libraries, refused

LENGTHS, BATCHES = (2048, 512, 128), (16, 1, 64)  # the telling ones first
STAND_IN = "SDPA row by row"  # for where there is no library
_TOLERANCE = 3e-2  # of 16-bit attention


def measure_prefill(runner: Runner) -> None:
    """Our kernel against flash-attn and torch's varlen_attn, by prompt length and batch; what a library gains."""
    heads, kv_heads, size = (4, 2, 8) if runner.tiny else HEADS.get(runner.pair, HEADS["llama-2-7b"])
    dtype = torch.bfloat16 if runner.on_gpu else torch.float32
    shape = Shape(heads, kv_heads, size, size, dtype)
    serving = [one for one in libraries(runner.device) if not refused(one, shape)]
    for one in libraries(runner.device):
        if refused(one, shape):
            runner.add("not_served", library=one.name, reason=refused(one, shape))
    if runner.on_gpu and not serving:
        runner.add("absent", what="a library for packed rows")
        return
    for length in (8, 4) if runner.tiny else LENGTHS:
        for batch in (1, 2) if runner.tiny else BATCHES:
            if not runner.time_for(0.5):
                return
            _compare(runner, _contenders(runner, shape, serving, batch, length), batch, length, heads * size)


def _contenders(
    runner: Runner, shape: Shape, serving: list[Library], batch: int, length: int
) -> dict[str, Callable[[], torch.Tensor]]:
    """By name, what attends in one layer to a batch of prompts of that length."""
    size, device = shape.key_size, runner.device
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(batch * length, heads, size, device=device, generator=generator).to(shape.dtype)
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    )
    rows = torch.arange(batch + 1, dtype=torch.int32, device=device) * length
    found: dict[str, Callable[[], torch.Tensor]] = {OURS: _ours(q, k, v, rows, length)}
    found |= {one.name: partial(one.attend, q, k, v, rows, length, size**-0.5, 0, 0.0) for one in serving}
    return found if serving else found | {STAND_IN: partial(_by_rows, q, k, v, length)}


def _compare(runner: Runner, calls: dict[str, Callable[[], torch.Tensor]], batch: int, length: int, width: int) -> None:
    operations = 2 * batch * length * (length + 1) * width  # of keys and of values, half the square each
    expected, found = calls[OURS]().float(), dict[str, list[float]]()
    for contender, call in calls.items():
        with runner.guarded(f"prefill {batch} x {length}, {contender}"):
            error = deviation(call().float(), expected)
            if not error <= _TOLERANCE:
                raise AssertionError(f"{contender} deviates by {error:.2g}, more than {_TOLERANCE:g}")
            spent = found[contender] = timed(runner, call, 1)
            mean = sum(spent) / len(spent)
            fields = {"batch": batch, "length": length, "contender": contender}
            runner.add("prefill", **fields, microseconds=[x * 1e6 for x in spent], teraflops=operations / mean / 1e12)
    ours = found.pop(OURS, None)
    if ours and found:
        best = min(found, key=lambda name: sum(found[name]))
        gain = [own / other for own, other in zip(ours, found[best], strict=True)]
        runner.add("prefill_gain", batch=batch, length=length, library=best, gain=gain)


def _ours(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor, length: int
) -> Callable[[], torch.Tensor]:
    """Our kernel on pools that hold the same keys and values, in slots side by side, as a fresh tree hands them out."""
    batch, device = len(rows) - 1, q.device
    pools = [F.pad(x, (0, 0, 0, 0, 1, 0)) for x in (k, v)]
    slots = torch.arange(1, batch * length + 1, dtype=torch.int32, device=device).view(batch, length)
    trunk, nothing = (torch.zeros(batch, *more, dtype=torch.int32, device=device) for more in ((1,), ()))
    lengths = torch.full((batch,), length, dtype=torch.int32, device=device)
    groups, out = torch.arange(batch + 1, dtype=torch.int32, device=device), torch.empty_like(q)
    work = tree_work(q, pools[1], nothing, lengths, groups, rows, 1, length)  # made once a pass, for all layers
    tables = trunk, nothing, slots, lengths, groups, rows

    def call() -> torch.Tensor:
        tree_attention(q, *pools, out, *tables, 1, length, q.shape[2] ** -0.5, work=work)
        return out

    return call


def _by_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, length: int) -> torch.Tensor:
    q, k, v = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(0, 1)

"""Acceptance, fallback and commit of every group in one launch."""

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from stars_fast.ops._library import address
from stars_fast.ops.philox import ACCEPT
from stars_fast.ops.select_and_commit import EARLIER, INVALID, NONE

from .philox import acceptance_uniform
from .variant import Variant

_WARPS = 1  # the tables a group's program reads it also writes, so all of it must move in step
_BLOCK = 32  # rows and slots at a time

_Result = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@triton.jit
def _threshold(length, ended, committed, max_new_tokens, base, target, FINISHED_AT_TARGET: tl.constexpr):
    """float64 thresholds of candidates of ``length`` tokens."""
    n = (committed + length).to(tl.float64)
    ramp = base + (target - base) * n / max_new_tokens
    tau = tl.where(ramp > target, target, ramp)
    if FINISHED_AT_TARGET:
        tau = tl.where(ended, target, tau)
    return tl.where(tl.abs(target) == float("inf"), target, tau)  # the ramp may be inf - inf


@triton.jit(do_not_specialize=["rows", "groups", "branch_capacity", "trunk_capacity"])
def select_and_commit_kernel(
    reward,
    length,
    ended,
    group_indptr,
    keys,
    segment,
    attempts,
    committed,
    max_new_tokens,
    max_attempts,
    base,
    target,
    beta,
    best_reward,
    best_attempt,
    best_slots,
    best_len,
    trunk_slots,
    trunk_len,
    branch_slots,
    branch_len,
    keep,
    winner,
    accepted,
    threshold,
    rows,
    groups,
    branch_capacity,
    trunk_capacity,
    FINISHED_AT_TARGET: tl.constexpr,
    ACCEPT: tl.constexpr,
    NONE: tl.constexpr,
    EARLIER: tl.constexpr,
    INVALID: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One group, and a share of the thresholds of padding rows."""
    NEVER: tl.constexpr = 2147483647
    group, block = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    grouped = tl.load(group_indptr + groups)
    for first_row in range(grouped + tl.program_id(0) * BLOCK, rows, tl.num_programs(0) * BLOCK):
        tl.store(threshold + first_row + block, tl.zeros((BLOCK,), tl.float32), first_row + block < rows)
    if group >= groups:  # the only program of a call without groups
        return

    start = tl.load(group_indptr + group)
    here = tl.load(group_indptr + group + 1) - start
    key, segment_index, drawn = tl.load(keys + group), tl.load(segment + group), tl.load(attempts + group)
    committed_here, new_tokens = tl.load(committed + group), tl.load(max_new_tokens + group)
    first_target, last_target, softness = tl.load(base + group), tl.load(target + group), tl.load(beta + group)
    best, best_from = tl.load(best_reward + group), tl.load(best_attempt + group)
    best_length, trunk_length = tl.load(best_len + group), tl.load(trunk_len + group)
    left = tl.maximum(tl.load(max_attempts + group) - drawn, 0)
    count = tl.minimum(here, left)

    first_stop = tl.full((), NEVER, tl.int32)  # accepted or bad
    first_bad = tl.full((), NEVER, tl.int32)
    best_offset = tl.full((), -1, tl.int32)
    for first in range(0, here, BLOCK):
        i = first + block
        exists = i < here
        r = tl.load(reward + start + i, exists, other=0.0)
        candidate_length = tl.load(length + start + i, exists, other=0)
        candidate_ended = tl.load(ended + start + i, exists, other=0) != 0
        tau = _threshold(
            candidate_length, candidate_ended, committed_here, new_tokens, first_target, last_target, FINISHED_AT_TARGET
        )
        tl.store(threshold + start + i, tau.to(tl.float32), exists)
        tl.store(branch_len + start + i, tl.zeros((BLOCK,), tl.int32), exists)

        exponent = (r.to(tl.float64) - tau) / softness
        chance = tl.exp(tl.where(exponent > 0, 0.0, exponent))
        uniform = acceptance_uniform(key, segment_index, drawn + i, ACCEPT)
        accept = (r.to(tl.float64) >= tau) | ((r != float("-inf")) & (uniform < chance))
        bad = (r != r) | (r == float("inf"))
        first_stop = tl.minimum(first_stop, tl.min(tl.where((accept | bad) & (i < count), i, NEVER)))
        first_bad = tl.minimum(first_bad, tl.min(tl.where(bad & (i < count), i, NEVER)))

        candidate = (i < count) & (i <= first_stop) & (i < first_bad)  # never NaN: maxima may pass over it
        block_best = tl.max(tl.where(candidate, r, float("-inf")))
        offset = tl.min(tl.where(candidate & (r == block_best), i, NEVER))
        if (offset != NEVER) & ((best_from < 0) | (block_best > best)):
            best, best_from, best_offset = block_best, drawn + offset, offset

    stopped, invalid = first_stop != NEVER, (first_stop == first_bad) & (first_stop != NEVER)
    is_accepted = stopped & (first_stop != first_bad)
    exhausted = (stopped == 0) & (count > 0) & (count == left)
    improved = best_offset >= 0
    best_row = start + tl.maximum(best_offset, 0)
    source_row = tl.where(is_accepted, start + first_stop, best_row)
    winning_row = tl.where(is_accepted | (exhausted & improved), source_row, tl.where(exhausted, EARLIER, NONE))
    best_length = tl.load(keep + best_row, improved, other=best_length)
    won = tl.load(keep + source_row, is_accepted, other=best_length)
    won = tl.where(is_accepted | exhausted, won, 0)
    source = branch_slots + source_row.to(tl.int64) * branch_capacity
    if winning_row == EARLIER:
        source = best_slots + group * branch_capacity
    replaced = tl.where(improved, best_length, 0)
    trunk = trunk_slots + group * trunk_capacity + trunk_length
    for first in range(0, branch_capacity, BLOCK):
        j = first + block
        moved = tl.load(source + j, (j < won) & (j < branch_capacity), other=0)
        tl.store(trunk + j, moved, (j < won) & (j < branch_capacity) & (trunk_length + j < trunk_capacity))
        better = (j < replaced) & (j < branch_capacity)
        slots = tl.load(branch_slots + best_row.to(tl.int64) * branch_capacity + j, better, other=0)
        tl.store(best_slots + group * branch_capacity + j, slots, better)

    tl.store(trunk_len + group, tl.minimum(trunk_length + won, trunk_capacity))
    tl.store(best_reward + group, best)
    tl.store(best_attempt + group, best_from)
    tl.store(best_len + group, best_length)
    tl.store(attempts + group, drawn + tl.where(stopped, first_stop + 1, count))
    tl.store(winner + group, tl.where(invalid, INVALID, winning_row))
    tl.store(accepted + group, is_accepted)


def select_and_commit(
    reward: torch.Tensor,
    length: torch.Tensor,
    ended: torch.Tensor,
    group_indptr: torch.Tensor,
    keys: torch.Tensor,
    segment: torch.Tensor,
    attempts: torch.Tensor,
    committed: torch.Tensor,
    max_new_tokens: torch.Tensor,
    max_attempts: torch.Tensor,
    base: torch.Tensor,
    target: torch.Tensor,
    beta: torch.Tensor,
    finished_at_target: bool,
    best_reward: torch.Tensor,
    best_attempt: torch.Tensor,
    best_slots: torch.Tensor,
    best_len: torch.Tensor,
    trunk_slots: torch.Tensor,
    trunk_len: torch.Tensor,
    branch_slots: torch.Tensor,
    branch_len: torch.Tensor,
    keep: torch.Tensor,
) -> _Result:
    """:func:`stars_fast.ops.select_and_commit` in Triton. A trunk that would outgrow its table is cut off there."""
    rows, groups = reward.shape[0], keys.shape[0]
    branch_capacity, trunk_capacity = branch_slots.shape[1], trunk_slots.shape[1]
    row, group, i32, f64 = (rows,), (groups,), torch.int32, torch.float64
    tensors = {
        "reward": (reward, torch.float32, row),
        "length": (length, i32, row),
        "ended": (ended, torch.bool, row),
        "group_indptr": (group_indptr, i32, (groups + 1,)),
        "keys": (keys, torch.int64, group),
        "segment": (segment, i32, group),
        "attempts": (attempts, i32, group),
        "committed": (committed, i32, group),
        "max_new_tokens": (max_new_tokens, i32, group),
        "max_attempts": (max_attempts, i32, group),
        "base": (base, f64, group),
        "target": (target, f64, group),
        "beta": (beta, f64, group),
        "best_reward": (best_reward, torch.float32, group),
        "best_attempt": (best_attempt, i32, group),
        "best_slots": (best_slots, i32, (groups, branch_capacity)),
        "best_len": (best_len, i32, group),
        "trunk_slots": (trunk_slots, i32, (groups, trunk_capacity)),
        "trunk_len": (trunk_len, i32, group),
        "branch_slots": (branch_slots, i32, (rows, branch_capacity)),
        "branch_len": (branch_len, i32, row),
        "keep": (keep, i32, row),
    }
    for name, (tensor, dtype, shape) in tensors.items():
        address(tensor, name, dtype, shape)
    winner = reward.new_empty(groups, dtype=i32)
    accepted = reward.new_empty(groups, dtype=torch.bool)
    threshold = reward.new_empty(rows)
    if rows or groups:
        select_and_commit_kernel[(max(groups, 1),)](
            *(tensor for tensor, _, _ in tensors.values()),
            winner,
            accepted,
            threshold,
            rows,
            groups,
            branch_capacity,
            trunk_capacity,
            FINISHED_AT_TARGET=bool(finished_at_target),
            **_CONSTANTS,
            num_warps=_WARPS,
            enable_fp_fusion=False,  # thresholds round as those of C++ do
        )
    return winner, accepted, threshold


_CONSTANTS = dict(ACCEPT=ACCEPT, NONE=NONE, EARLIER=EARLIER, INVALID=INVALID, BLOCK=_BLOCK)


def variants(target: GPUTarget) -> list[Variant]:
    """What ``stars-fast kernels`` compiles."""
    types = {name: "*i32" for name in select_and_commit_kernel.arg_names if name.islower()}
    types |= dict.fromkeys(("reward", "best_reward", "threshold"), "*fp32")
    types |= dict.fromkeys(("base", "target", "beta"), "*fp64")
    types |= dict.fromkeys(("ended", "accepted"), "*i1") | {"keys": "*i64"}
    types |= dict.fromkeys(("rows", "groups", "branch_capacity", "trunk_capacity"), "i32")
    constants = _CONSTANTS | {"FINISHED_AT_TARGET": True}
    return [Variant("select_and_commit", select_and_commit_kernel, types, constants, num_warps=_WARPS)]

"""Acceptance and fallback of every group in one launch."""

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from stars_fast.ops.philox import Stream
from stars_fast.ops.select_and_commit import (
    EARLIER,
    GOES_ON,
    INVALID,
    LENGTH,
    NONE,
    STOP,
    argument_addresses,
    results,
)

from .philox import acceptance_uniform
from .variant import Variant

_WARPS = 1  # a group has few candidates
_BLOCK = 32  # of them at a time
_CONSTANTS = dict(
    ACCEPT=int(Stream.ACCEPT),
    NONE=NONE,
    EARLIER=EARLIER,
    INVALID=INVALID,
    GOES_ON=GOES_ON,
    STOP=STOP,
    LENGTH=LENGTH,
    BLOCK=_BLOCK,
)


@triton.jit
def _threshold(length, ended, committed, max_new_tokens, base, target, ramp):
    """float64 thresholds of candidates of ``length`` tokens."""
    n = (committed + length).to(tl.float64)
    tau = base + (target - base) * n / max_new_tokens
    tau = tl.where(tau > target, target, tau)
    tau = tl.where(ended & (ramp == 0), target, tau)
    return tl.where(tl.abs(target) == float("inf"), target, tau)  # the ramp may be inf - inf


@triton.jit(do_not_specialize=["rows", "groups"])
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
    ramp,
    best_reward,
    best_attempt,
    best_length,
    best_ended,
    winner,
    accepted,
    threshold,
    finish,
    rows,
    groups,
    ACCEPT: tl.constexpr,
    NONE: tl.constexpr,
    EARLIER: tl.constexpr,
    INVALID: tl.constexpr,
    GOES_ON: tl.constexpr,
    STOP: tl.constexpr,
    LENGTH: tl.constexpr,
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
    ramps = tl.load(ramp + group)
    best, best_from = tl.load(best_reward + group), tl.load(best_attempt + group)
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
            candidate_length, candidate_ended, committed_here, new_tokens, first_target, last_target, ramps
        )
        tl.store(threshold + start + i, tau.to(tl.float32), exists)

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
    best_tokens = tl.load(length + best_row, improved, other=tl.load(best_length + group))
    best_ends = tl.where(improved, tl.load(ended + best_row, improved, other=0), tl.load(best_ended + group)) != 0
    tl.store(best_reward + group, best)
    tl.store(best_attempt + group, best_from)
    tl.store(best_length + group, best_tokens)
    tl.store(best_ended + group, best_ends)
    tl.store(attempts + group, drawn + tl.where(stopped, first_stop + 1, count))

    accepted_row = start + tl.where(is_accepted, first_stop, 0)
    fallback = tl.where(improved, best_row, EARLIER)
    winning_row = tl.where(is_accepted, accepted_row, tl.where(exhausted, fallback, NONE))
    tl.store(winner + group, tl.where(invalid, INVALID, winning_row))
    tl.store(accepted + group, is_accepted)
    tokens = tl.load(length + accepted_row, is_accepted, other=best_tokens)
    ends = tl.where(is_accepted, tl.load(ended + accepted_row, is_accepted, other=0) != 0, best_ends)
    at_end = tl.where(ends, STOP, tl.where(committed_here + tokens >= new_tokens, LENGTH, GOES_ON))
    tl.store(finish + group, tl.where(is_accepted | exhausted, at_end, GOES_ON))


def select_and_commit(*arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """:func:`stars_fast.ops.select_and_commit` in Triton.

    Raises
    ------
    ValueError
        If an argument has a dtype, a shape or strides that the kernel does not read.
    """
    found = results(*arguments)
    winner, _, threshold, _ = found
    rows, groups = threshold.shape[0], winner.shape[0]
    argument_addresses(rows, groups, arguments)
    if rows or groups:
        select_and_commit_kernel[(max(groups, 1),)](
            *arguments,
            *found,
            rows,
            groups,
            **_CONSTANTS,
            num_warps=_WARPS,
            enable_fp_fusion=False,  # thresholds round as those of C++ do
        )
    return found


def variants(target: GPUTarget) -> list[Variant]:
    """What ``stars-fast kernels`` compiles."""
    types = {name: "*i32" for name in select_and_commit_kernel.arg_names if name.islower()}
    types |= dict.fromkeys(("reward", "best_reward", "threshold"), "*fp32")
    types |= dict.fromkeys(("base", "target", "beta"), "*fp64")
    types |= dict.fromkeys(("ended", "ramp", "best_ended", "accepted"), "*i1") | {"keys": "*i64"}
    types |= dict.fromkeys(("rows", "groups"), "i32")
    return [Variant("select_and_commit", select_and_commit_kernel, types, _CONSTANTS, num_warps=_WARPS)]

"""Which candidate of each request is committed, and what that does to the tables."""

from __future__ import annotations

import torch

from stars_fast.ops._library import address, define, native
from stars_fast.ops.philox import acceptance_uniform

NONE, EARLIER, INVALID = -1, -2, -3  # winners that are no row of this call

_native = native("select_and_commit")
_Result = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


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
    """Accept or reject the scored candidates of every group (one request each) and commit the winners.

    The rows of a group are looked at in index order, as if they had been drawn one after another. With n tokens
    committed if the candidate wins, its threshold is ``min(base + (target - base) * n / max_new_tokens, target)``
    (STARS, arXiv 2511.03827), or ``target`` if that is infinite, or if the candidate ended and ``finished_at_target``.
    It is accepted with probability ``min(1, exp((reward - threshold) / beta))``, in float64; a reward of -inf only
    where the threshold is -inf too. The first accepted one is committed. When the attempts are used up, the best one of
    all of them is (ties to the earliest). A NaN or +inf reward that is reached before an acceptance makes the group
    invalid: nothing is committed.

    Parameters
    ----------
    reward
        float32 ``[B]``.
    length
        int32 ``[B]``: tokens of the candidate.
    ended
        bool ``[B]``: the candidate ended with an EOS or a stop string.
    group_indptr
        int32 ``[G + 1]``: group g has the rows from ``group_indptr[g]`` to ``group_indptr[g + 1]``. Rows after the
        last group are padding.
    keys
        int64 ``[G]``, from :func:`stars_fast.ops.philox_key`.
    segment
        int32 ``[G]``: index of the segment, part of the counter of the random numbers.
    attempts
        int32 ``[G]``, written: candidates looked at for this segment; the i-th row's attempt index is the old value
        plus i. Rows past ``max_attempts`` are not looked at.
    committed
        int32 ``[G]``: tokens of the response so far.
    max_new_tokens, max_attempts
        int32 ``[G]``.
    base, target, beta
        float64 ``[G]``: rewards where the threshold starts and ends, and the softness of the rule.
    finished_at_target
        Whether candidates that ended must reach ``target``.
    best_reward, best_attempt, best_slots, best_len
        float32 ``[G]``, int32 ``[G]``, ``[G, S]``, ``[G]``, written: the best candidate looked at so far for this
        segment; ``best_attempt`` is -1 where there is none, and the caller resets it for a new segment.
    trunk_slots, trunk_len
        int32 ``[G, P]`` and ``[G]``, written: a winner's slots are appended. P must suffice.
    branch_slots
        int32 ``[B, S]``.
    branch_len
        int32 ``[B]``, written: 0 afterwards in every row of every group.
    keep
        int32 ``[B]``: how many of the row's branch slots are committed if it wins.

    Returns
    -------
    winner : torch.Tensor
        int32 ``[G]``: row, ``NONE`` (all rejected, attempts left), ``EARLIER`` (the best one was drawn in an earlier
        call) or ``INVALID``.
    accepted : torch.Tensor
        bool ``[G]``: False for the fallback to the best.
    threshold : torch.Tensor
        float32 ``[B]``; 0 for padding.

    Raises
    ------
    ValueError
        On the CPU, if a trunk would outgrow P; nothing has been written then.
    """
    return _operator(
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
        finished_at_target,
        best_reward,
        best_attempt,
        best_slots,
        best_len,
        trunk_slots,
        trunk_len,
        branch_slots,
        branch_len,
        keep,
    )


def select_and_commit_reference(
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
    """:func:`select_and_commit` in plain torch, without a wait for the device: groups are padded to B rows."""
    rows, groups, device = reward.shape[0], keys.shape[0], reward.device
    index = torch.arange(rows, device=device)
    group = torch.bucketize(index, group_indptr[1:], right=True)  # [B]; groups for padding
    in_group = group < groups
    group = group.clamp(max=groups - 1)

    n = committed[group] + length
    tau = base[group] + (target - base)[group] * n / max_new_tokens[group]
    tau = torch.minimum(tau, target[group])
    at_target = target.isinf()[group] | (ended if finished_at_target else torch.zeros_like(ended))
    tau = torch.where(at_target, target[group], tau)
    attempt = attempts[group] + index - group_indptr[group]
    r = reward.double()
    chance = ((r - tau) / beta[group]).clamp(max=0).exp()
    accept = (r >= tau) | (~r.isneginf() & (acceptance_uniform(keys[group], segment[group], attempt) < chance))
    bad = r.isnan() | r.isposinf()

    start, count = group_indptr[:-1, None], group_indptr[1:] - group_indptr[:-1]  # [G, 1], [G]
    count = torch.minimum(count, max_attempts - attempts).clamp(min=0)
    padded = (start + index).clamp(max=rows - 1)  # [G, B]
    stops = (accept | bad)[padded] & (index < count[:, None])
    stopped = stops.any(1)
    first = stops.int().argmax(1)  # [G], relative to the group
    stop_row = padded.gather(1, first[:, None])[:, 0]
    invalid = stopped & bad[stop_row]
    looked = torch.where(stopped, first + 1, count)

    # -inf stands for rows that are no candidates; the first row is one if any is, so argmax cannot pick a stranger.
    candidates = looked - invalid.int()
    scores = torch.where(index < candidates[:, None], reward[padded], -torch.inf)
    best_score, offset = scores.max(1)[0], scores.argmax(1)
    improves = (candidates > 0) & ((best_attempt < 0) | (best_score > best_reward))
    best_row = padded.gather(1, offset[:, None])[:, 0]
    new_reward = torch.where(improves, best_score, best_reward)
    new_attempt = torch.where(improves, attempts + offset, best_attempt)
    new_len = torch.where(improves, keep[best_row], best_len)
    inside = torch.arange(branch_slots.shape[1], device=device) < keep[best_row][:, None]  # [G, S]
    new_slots = torch.where(improves[:, None] & inside, branch_slots[best_row], best_slots)

    accepted = stopped & ~invalid
    exhausted = (count > 0) & ~stopped & (attempts + looked >= max_attempts)
    winner = torch.where(exhausted, torch.where(improves, best_row, EARLIER), NONE)
    winner = torch.where(stopped, torch.where(invalid, INVALID, stop_row), winner)

    wins = accepted | exhausted
    won_len = torch.where(accepted, keep[stop_row], new_len)
    won_slots = torch.where(accepted[:, None], branch_slots[stop_row], new_slots)  # [G, S]
    new_trunk_len = trunk_len + torch.where(wins, won_len, 0)
    capacity = trunk_slots.shape[1]
    if device.type == "cpu":  # elsewhere the question would wait for the device
        _check_capacity(new_trunk_len, capacity)
    source = torch.arange(capacity, device=device) - trunk_len[:, None]  # [G, P]
    appended = (source >= 0) & (source < (new_trunk_len - trunk_len)[:, None])
    moved = won_slots.gather(1, source.clamp(0, won_slots.shape[1] - 1))

    trunk_slots.copy_(torch.where(appended, moved, trunk_slots))
    trunk_len.copy_(new_trunk_len.clamp(max=capacity))
    best_reward.copy_(new_reward)
    best_attempt.copy_(new_attempt)
    best_slots.copy_(new_slots)
    best_len.copy_(new_len)
    attempts.add_(looked)
    branch_len.masked_fill_(in_group, 0)
    return winner.int(), accepted, torch.where(in_group, tau, 0).float()


def _check_capacity(trunk_len: torch.Tensor, capacity: int) -> None:
    for group, needed in enumerate(trunk_len.tolist()):
        if needed > capacity:
            raise ValueError(
                f"trunk_slots holds {capacity} slots, but group {group} would need {needed} after the commit"
            )


def _cpu(
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
    rows, groups = reward.shape[0], keys.shape[0]
    branch_capacity, trunk_capacity = branch_slots.shape[1], trunk_slots.shape[1]
    winner, accepted = keys.new_empty(groups, dtype=torch.int32), keys.new_empty(groups, dtype=torch.bool)
    threshold = reward.new_zeros(rows, dtype=torch.float32)
    i32, f32, f64, row, group = torch.int32, torch.float32, torch.float64, (rows,), (groups,)
    _native(
        rows,
        groups,
        branch_capacity,
        trunk_capacity,
        address(reward, "reward", f32, row),
        address(length, "length", i32, row),
        address(ended, "ended", torch.bool, row),
        address(group_indptr, "group_indptr", i32, (groups + 1,)),
        address(keys, "keys", torch.int64, group),
        address(segment, "segment", i32, group),
        address(attempts, "attempts", i32, group),
        address(committed, "committed", i32, group),
        address(max_new_tokens, "max_new_tokens", i32, group),
        address(max_attempts, "max_attempts", i32, group),
        address(base, "base", f64, group),
        address(target, "target", f64, group),
        address(beta, "beta", f64, group),
        finished_at_target,
        address(best_reward, "best_reward", f32, group),
        address(best_attempt, "best_attempt", i32, group),
        address(best_slots, "best_slots", i32, (groups, branch_capacity)),
        address(best_len, "best_len", i32, group),
        address(trunk_slots, "trunk_slots", i32, (groups, trunk_capacity)),
        address(trunk_len, "trunk_len", i32, group),
        address(branch_slots, "branch_slots", i32, (rows, branch_capacity)),
        address(branch_len, "branch_len", i32, row),
        address(keep, "keep", i32, row),
        winner.data_ptr(),
        accepted.data_ptr(),
        threshold.data_ptr(),
    )
    return winner, accepted, threshold


def _fake(
    reward: torch.Tensor,
    length: torch.Tensor,
    ended: torch.Tensor,
    group_indptr: torch.Tensor,
    keys: torch.Tensor,
    *rest: torch.Tensor | bool,
) -> _Result:
    groups = keys.shape[0]
    winner = reward.new_empty(groups, dtype=torch.int32)
    accepted = reward.new_empty(groups, dtype=torch.bool)
    return winner, accepted, reward.new_empty(reward.shape[0])


_operator = define(
    "select_and_commit",
    "(Tensor reward, Tensor length, Tensor ended, Tensor group_indptr, Tensor keys, Tensor segment,"
    " Tensor(a!) attempts, Tensor committed, Tensor max_new_tokens, Tensor max_attempts, Tensor base, Tensor target,"
    " Tensor beta, bool finished_at_target, Tensor(b!) best_reward, Tensor(c!) best_attempt, Tensor(d!) best_slots,"
    " Tensor(e!) best_len, Tensor(f!) trunk_slots, Tensor(g!) trunk_len, Tensor branch_slots, Tensor(h!) branch_len,"
    " Tensor keep) -> (Tensor, Tensor, Tensor)",
    reference=select_and_commit_reference,
    cpu=_cpu,
    fake=_fake,
)

"""Which candidate of each request is committed, and whether that finishes the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from stars_fast.ops._library import Layout, addresses, define
from stars_fast.ops.philox import uniform

NONE, EARLIER, INVALID = -1, -2, -3  # winners that are no row of this call
GOES_ON, STOP, LENGTH = 0, 1, 2  # how a group's answer finishes

_Result = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


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
    ramp: torch.Tensor,
    best_reward: torch.Tensor,
    best_attempt: torch.Tensor,
    best_length: torch.Tensor,
    best_ended: torch.Tensor,
) -> _Result:
    """Accept or reject the scored candidates of every group (one request each), and say whom to commit.

    The rows of a group are looked at in index order, as if they had been drawn one after another. With n tokens
    committed if the candidate wins, its threshold is ``min(base + (target - base) * n / max_new_tokens, target)``
    (STARS, arXiv 2511.03827), or ``target`` if that is infinite, or if the candidate ended and the group has no
    ``ramp``. It is accepted with probability ``min(1, exp((reward - threshold) / beta))``, in float64; a reward of -inf
    only where the threshold is -inf too. The first accepted one is to be committed. When the attempts are used up, the
    best one of all of them is (ties to the earliest). A NaN or +inf reward that is reached before an acceptance makes
    the group invalid: nothing is to be committed.

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
        int32 ``[G]``: tokens of the answer so far.
    max_new_tokens, max_attempts
        int32 ``[G]``.
    base, target, beta
        float64 ``[G]``: rewards where the threshold starts and ends, and the softness of the rule.
    ramp
        bool ``[G]``: whether candidates that ended are held against the ramp, as the others are, and not against
        ``target``.
    best_reward, best_attempt, best_length, best_ended
        float32, int32, int32 and bool ``[G]``, written: the best candidate looked at so far for this segment;
        ``best_attempt`` is -1 where there is none, and the caller resets it for a new segment.

    Returns
    -------
    winner : torch.Tensor
        int32 ``[G]``: row, ``NONE`` (all rejected, attempts left), ``EARLIER`` (the best one was drawn in an earlier
        call) or ``INVALID``.
    accepted : torch.Tensor
        bool ``[G]``: False for the fallback to the best.
    threshold : torch.Tensor
        float32 ``[B]``; 0 for padding.
    finish : torch.Tensor
        int32 ``[G]``: ``STOP`` (the winner ended the answer), ``LENGTH`` (it did not, and the answer has
        ``max_new_tokens`` with it), ``GOES_ON`` (neither, or there is no winner).

    Raises
    ------
    ValueError
        For a dtype, shape or strides that a kernel would misread, and where ``_library`` says that contents are
        checked, for row pointers that fall or pass B, and for an argument that is written and shares memory with
        another.
    """
    # Groups are padded to B rows, so that nothing waits for a GPU.
    rows, groups, device = reward.shape[0], keys.shape[0], reward.device
    index = torch.arange(rows, device=device)
    group = torch.bucketize(index, group_indptr[1:], right=True)  # [B]; groups for padding
    in_group = group < groups
    group = group.clamp(max=groups - 1)

    n = committed[group] + length
    tau = base[group] + (target - base)[group] * n / max_new_tokens[group]
    tau = torch.minimum(tau, target[group])
    tau = torch.where(target.isinf()[group] | (ended & ~ramp[group]), target[group], tau)
    attempt = attempts[group] + index - group_indptr[group]
    r = reward.double()
    chance = ((r - tau) / beta[group]).clamp(max=0).exp()
    accept = (r >= tau) | (~r.isneginf() & (uniform(keys[group], segment[group], attempt) < chance))
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

    accepted = stopped & ~invalid
    exhausted = (count > 0) & ~stopped & (attempts + looked >= max_attempts)
    winner = torch.where(exhausted, torch.where(improves, best_row, EARLIER), NONE)
    winner = torch.where(stopped, torch.where(invalid, INVALID, stop_row), winner)

    best_reward.copy_(torch.where(improves, best_score, best_reward))
    best_attempt.copy_(torch.where(improves, attempts + offset, best_attempt))
    best_length.copy_(torch.where(improves, length[best_row], best_length))
    best_ended.copy_(torch.where(improves, ended[best_row], best_ended))
    attempts.add_(looked)

    full = committed + torch.where(accepted, length[stop_row], best_length) >= max_new_tokens
    finish = torch.where(torch.where(accepted, ended[stop_row], best_ended), STOP, torch.where(full, LENGTH, GOES_ON))
    finish = torch.where(accepted | exhausted, finish, GOES_ON)
    return winner.int(), accepted, torch.where(in_group, tau, 0).float(), finish.int()


ARGUMENTS: Layout = (
    ("reward", torch.float32, "B"),
    ("length", torch.int32, "B"),
    ("ended", torch.bool, "B"),
    ("group_indptr", torch.int32, "G+1"),
    ("keys", torch.int64, "G"),
    ("segment", torch.int32, "G"),
    ("attempts", torch.int32, "G"),
    ("committed", torch.int32, "G"),
    ("max_new_tokens", torch.int32, "G"),
    ("max_attempts", torch.int32, "G"),
    ("base", torch.float64, "G"),
    ("target", torch.float64, "G"),
    ("beta", torch.float64, "G"),
    ("ramp", torch.bool, "G"),
    ("best_reward", torch.float32, "G"),
    ("best_attempt", torch.int32, "G"),
    ("best_length", torch.int32, "G"),
    ("best_ended", torch.bool, "G"),
)


def argument_addresses(rows: int, groups: int, arguments: Sequence[torch.Tensor]) -> list[int]:
    """Where the arguments lie, in their order.

    Raises
    ------
    ValueError
        For a dtype, shape or strides that a kernel would misread.
    """
    return addresses(arguments, ARGUMENTS, {"B": (rows,), "G": (groups,), "G+1": (groups + 1,)})


def _call(function: Callable[..., None], *arguments: torch.Tensor) -> _Result:
    found = results(*arguments)
    rows, groups = len(arguments[0]), len(arguments[-1])
    function(rows, groups, *argument_addresses(rows, groups, arguments), *(out.data_ptr() for out in found))
    return found


def results(reward: torch.Tensor, *arguments: torch.Tensor) -> _Result:
    """What is returned, before anything has been written to it."""
    groups = arguments[-1].shape[0]
    winner, finish = (reward.new_empty(groups, dtype=torch.int32) for _ in range(2))
    accepted = reward.new_empty(groups, dtype=torch.bool)
    return winner, accepted, reward.new_empty(reward.shape[0], dtype=torch.float32), finish


select_and_commit = define(
    "select_and_commit",
    reference=select_and_commit_reference,
    call=_call,
    fake=results,
    written=("attempts", "best_reward", "best_attempt", "best_length", "best_ended"),
)

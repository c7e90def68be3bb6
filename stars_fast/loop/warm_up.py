"""Graphs made before the first call: of the decode steps and small passes that calls of a kind come to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from stars_fast.config import StarsConfig
from stars_fast.loop.scheduler import Scheduler
from stars_fast.loop.shares import share_evenly
from stars_fast.ops.select_and_commit import ARGUMENTS, select_and_commit
from stars_fast.policy.leaf import Sampling
from stars_fast.policy.policy import Policy
from stars_fast.policy.steps import Shape
from stars_fast.tree.attention import own_dtypes
from stars_fast.tree.lack import is_lack_of_memory
from stars_fast.tree.model import PREFILL_CHUNK, TreeModel
from stars_fast.tree.passes import MOST_TOKENS, PassShape

# P(accept) of candidates that requests may turn out to have: the number of rows follows from it.
_ACCEPTANCES = (0.15, 0.3, 0.5, 0.75)


class WarmUp(NamedTuple):
    """What :meth:`stars_fast.StarsEngine.warm_up` has done."""

    graphs: int  # captured now, and kept; those that were there are not made again
    seconds: float
    remark: str = ""  # why there are none, or not all


class Kind(NamedTuple):
    """What calls have in common whose decode steps share their tensors."""

    config: StarsConfig  # with what its method decides itself
    sampling: Sampling
    requests: int  # most that run side by side
    uncertain: bool  # whether segments end where entropy is high


def proposals(kind: Kind, scheduler: Scheduler) -> Iterator[Shape]:
    """Sizes of the proposals of so many requests and of fewer, as they end: of pilots, and with equal acceptance."""
    config, sampling, most = kind.config, kind.sampling, scheduler.max_rows
    eos, penalised = len(sampling.eos_token_ids), sampling.repetition_penalty != 1.0
    for requests in range(1, min(kind.requests, most) + 1):
        if config.candidates == "auto":
            limits, together = [config.max_attempts] * requests, scheduler.looked_at_at_once(config.segment_length)
            ways = [scheduler.shares([a] * requests, limits, most, together) for a in _ACCEPTANCES]
        else:
            ways = [share_evenly([min(int(config.candidates), config.max_attempts)] * requests, most)]
        for shares in (*ways, [1] * requests):
            yield Shape(sum(shares), requests, max(shares), 1, 1, eos, penalised, kind.uncertain)


@torch.no_grad()
@own_dtypes()
def capture(policy: Policy, rewards: Sequence[TreeModel], kind: Kind, scheduler: Scheduler, show: bool) -> str:
    """Have all of these captured, in the room that both models' trees have been given, and compiled what larger passes
    run. Returns what torch said where memory was short of some; empty where it was not.
    """
    from rich.console import Console
    from rich.progress import track

    steps = dict.fromkeys(shape.padded(policy.trunk_room, policy.length_room) for shape in proposals(kind, scheduler))
    work: list[tuple[TreeModel, Shape | PassShape | None]] = [(model, None) for model in (policy, *rewards)]
    work += [(policy, shape) for shape in steps]
    for model in (policy, *rewards):
        single = min(kind.requests, scheduler.max_rows) if model is policy else 0
        logits = model.body is model.model
        work += [(model, shape) for shape in PassShape.usual(model.trunk_room, logits, single)]
    work = [(model, shape) for model, shape in work if model.graphs.enabled]
    # The largest first, so that what its graph leaves of the pool serves the next; passes over many tokens before all.
    work.sort(key=lambda one: -math.inf if one[1] is None else -one[1][0])
    for device in {model.device for model in rewards if model.graphs.enabled}:
        _select(device)
    short = ""
    for model, shape in track(work, "capturing", console=Console(stderr=True), disable=not show):
        try:
            if shape is None:
                _encode_many(model)
            elif isinstance(shape, Shape):
                policy.steps(shape)
            else:
                model.small_pass(shape)
            short = short or model.graphs.unaffordable.get(shape, "")
        except RuntimeError as error:  # even the tensors, or a pass that is only launched
            if not is_lack_of_memory(error):
                raise
            short = short or str(error)
    return short


def _select(device: torch.device) -> None:
    """Compile the selection, which rewards on a device are judged by."""
    sizes = {"B": 1, "G": 1, "G+1": 2}
    select_and_commit(*(torch.zeros(sizes[size], dtype=dtype, device=device) for _, dtype, size in ARGUMENTS))


def _encode_many(model: TreeModel) -> None:
    """A pass of more tokens than are captured, where the tree has room for it."""
    length = min(PREFILL_CHUNK, model.max_positions or PREFILL_CHUNK)
    rows, logits = 2 * MOST_TOKENS // length, {"logits_to_keep": 0} if model.body is model.model else {}
    if model.tree.free_slots < rows * length:
        return
    nodes, _ = model.extend([-1] * rows, [[0] * length] * rows, **logits)
    for node in nodes:
        model.release(node)

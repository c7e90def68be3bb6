"""What the roofline says of a steady heartbeat on a device with measured rates: its floor, and what is expected."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from benchmarks.roofline import (
    GPUS,
    Achievable,
    Gpu,
    ModelCost,
    Stage,
    Workload,
    best_candidates,
    gpu_called,
    heartbeat,
)

# Of a copy's bandwidth and a large product's rate, as measured. On an H200 these are the 0.85 of its data sheet's
# bandwidth and the 600 TFLOP/s that the roofline takes for achievable. The floor takes all of both, and no launches.
REACHABLE = Achievable(bandwidth=0.95, matrix=0.77)


def device(name: str, copy: float, matrix: float) -> Gpu:
    """The GPU of that name with these rates, in bytes and operations a second; an H200 by its memory where unknown."""
    return replace(gpu_called(name) or GPUS["h200"], bandwidth=copy, matrix_rate=matrix, achievable=REACHABLE)


def expectation(
    costs: tuple[ModelCost, ModelCost],
    gpu: Gpu,
    batch: int,
    segment: int,
    acceptance: float,
    context: float,
    candidates: float | None = None,
    response: int | None = None,
    in_order: bool = False,
) -> dict[str, Any]:
    """A heartbeat of policy and reward model with so many candidates a request in the mean; with the best number of
    them where none is given. A prompt is let in for each answer of ``response`` tokens; none where that is not given.
    ``in_order`` says whether candidates behind an accepted one are left out of scoring.
    """
    context = max(context, 2.0)
    order = {"in_order": True} if in_order else {}
    share = min(max(acceptance, 0.01), 1.0)
    work = Workload(batch, segment, share, context, response=response or int(context), **order)
    if candidates is None:
        candidates = best_candidates(*costs, work, gpu).candidates
    least = max(math.floor(candidates), 1)
    around = [(least + 1 - candidates, least), (candidates - least, least + 1)]
    beats = [(weight, heartbeat(*costs, work, m, gpu)) for weight, m in around if weight > 0]
    stages = [
        Stage.total(same[0].name, zip((weight for weight, _ in beats), same, strict=True))
        for same in zip(*(beat.stages for _, beat in beats), strict=True)
        if response or same[0].name != "refill"
    ]
    seconds = sum(stage.achievable_s for stage in stages)
    return {
        "candidates": candidates,
        "tokens_per_second": sum(weight * beat.committed_tokens for weight, beat in beats) / seconds,
        "milliseconds": seconds * 1e3,
        "floor_milliseconds": sum(stage.floor_s for stage in stages) * 1e3,
        "stages_milliseconds": {stage.name: stage.achievable_s * 1e3 for stage in stages},
        "stages_floor_milliseconds": {stage.name: stage.floor_s * 1e3 for stage in stages},
    }

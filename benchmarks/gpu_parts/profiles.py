"""Where the time of a forward pass goes on the device: decode steps, scoring and prefill by kernel."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.gpu_parts.kernels import (
    LARGE,
    Kernel,
    Product,
    busy,
    by_class,
    profiled,
)
from benchmarks.gpu_parts.models import costs, machine, pilots
from benchmarks.gpu_parts.runner import Runner
from benchmarks.roofline import ModelCost, Stage, decode_step, prefill, score_pass
from stars_fast.bench.yardsticks import seconds
from stars_fast.policy.leaf import Leaf, Sampling
from stars_fast.policy.policy import Policy
from stars_fast.policy.steps import Steps
from stars_fast.tree.attention import plugged
from stars_fast.tree.model import TreeModel

SHAPES = ((64, 3), (64, 2), (64, 1), (16, 6), (1, 11))  # requests and candidates of each
_CONTEXT, _SEGMENT, _PREFILL = 256, 16, (32, 128)
_REPEATS = 3


def profile_steps(runner: Runner) -> None:
    """Decode steps by kernel: products with their rates, attention, small kernels, and gaps."""
    policy, cost = pilots(runner).engine.policy, costs(runner)[0]
    for groups, candidates in ((2, 2), (1, 3)) if runner.tiny else SHAPES:
        if not runner.time_for(4):
            return
        with runner.guarded(f"step {groups} x {candidates}"), plugged(policy.model), torch.no_grad():
            context, segment = (8, 6) if runner.tiny else (_CONTEXT, _SEGMENT)
            steps = prepared_steps(runner, policy, groups, candidates, context, segment)
            middle = segment // 2

            def rewind(to: int = middle, steps: Steps = steps) -> None:
                steps.step.fill_(to)
                steps.alive.fill_(True)
                steps.position.fill_(to)

            def several(steps: Steps = steps, rewind: Callable[[int], None] = rewind, count: int = middle) -> None:
                rewind(count // 2)
                for _ in range(count):
                    steps.run()

            taken = [seconds(several, runner.device, 3) / middle for _ in range(_REPEATS)]
            ideal = decode_step(cost, groups * candidates, groups, context, middle, machine(runner))

            shape = {"what": "step", "groups": groups, "candidates": candidates}
            _add_profile(runner, shape, cost, taken, ideal, steps.run, steps.work, rewind)
    policy.clear()


def prepared_steps(
    runner: Runner, policy: Policy, groups: int, candidates: int, context: int, segment: int, beside: int = 0
) -> Steps:
    """The tensors of decode steps as the engine runs them, with trunks and branches that are filled. The tree has room
    for so many tokens ``beside`` them.
    """
    policy.begin(groups * context + groups * candidates * segment + beside, context, segment)
    nodes, logits = policy.prefill([-1] * groups, pilots(runner).pair.prompts(groups, context), 4096)
    leaves = [
        Leaf(node, row, Sampling(), i, segment=0, first_attempt=0, candidates=candidates, length=segment)
        for i, (node, row) in enumerate(zip(nodes, logits, strict=True))
    ]
    prepared: list[Steps] = []
    original = policy._prepared

    def kept(*arguments: Any) -> Steps:
        prepared.append(original(*arguments))
        return prepared[-1]

    with patch.object(policy, "_prepared", kept):
        policy.propose(leaves)  # compiles and captures; its branches stay, and so do their slots
    return prepared[0]


def scoring(model: TreeModel, nodes: list[int], branches: list[list[int]], candidates: int) -> Callable[[], None]:
    """Encodes these branches, so many below each node, and gives them back."""

    def score() -> None:
        model.tree.release_all(model.encode(nodes, [candidates] * len(nodes), branches)[0])

    return score


def reading(model: TreeModel, prompts: list[list[int]]) -> Callable[[], None]:
    """Encodes these prompts, and gives them back."""
    logits = {"logits_to_keep": 0} if model.body is model.model else {}

    def read() -> None:
        model.tree.release_all(model.extend([-1] * len(prompts), prompts, **logits)[0])

    return read


def profile_passes(runner: Runner) -> None:
    """Scoring and prefill by kernel, with the rates of their products."""
    driven = pilots(runner)
    (model,) = driven.engine.reward.tree_models
    context, segment = (8, 4) if runner.tiny else (_CONTEXT, _SEGMENT)
    groups, (prompts, length) = (2, (2, 8)) if runner.tiny else (64, _PREFILL)
    gpu = machine(runner)
    with plugged(model.model), torch.no_grad():
        model.allocate(groups * context + 3 * groups * segment)
        nodes, _ = model.extend([-1] * groups, driven.pair.prompts(groups, context), 4096)
        for candidates in (2,) if runner.tiny else (3, 2, 1):
            rows = groups * candidates
            score = scoring(model, nodes, driven.pair.prompts(rows, segment), candidates)
            if runner.time_for(3):
                ideal = score_pass(costs(runner)[1], rows, groups, context, segment, gpu)
                _profile_pass(runner, {"what": "score", "tokens": rows * segment}, score, ideal)
        model.allocate(prompts * length)
        if runner.time_for(3):
            ideal = prefill(costs(runner)[1], prompts, length, gpu)
            encode = reading(model, driven.pair.prompts(prompts, length))
            _profile_pass(runner, {"what": "prefill", "tokens": prompts * length}, encode, ideal)
    model.clear()


def _profile_pass(runner: Runner, fields: dict[str, Any], run: Callable[[], None], ideal: Stage) -> None:
    with runner.guarded(f"{fields['what']} {fields['tokens']}"):
        for _ in range(5):  # compiles, and captures what is small
            run()
        taken = [seconds(run, runner.device, 3) for _ in range(_REPEATS)]
        _add_profile(runner, fields, costs(runner)[1], taken, ideal, run, run, lambda: None)


def _add_profile(
    runner: Runner,
    fields: dict[str, Any],
    cost: ModelCost,
    taken: list[float],
    ideal: Stage,
    run: Callable[[], Any],
    launched: Callable[[], Any],
    rewind: Callable[[], Any],
) -> None:
    """Profile a pass a few times, and once more, launched, with the shapes of its products."""
    layers, found = len(cost.layers), list[list[Kernel]]()
    for _ in range(_REPEATS):
        rewind()
        found.append(profiled(run, runner.device).kernels)
    summed = [by_class((one.name, one.duration / 1e3, 1) for one in kernels) for kernels in found]
    classes = {}
    for name in summed[0]:
        spent = [classed.get(name, (0.0, 0))[0] for classed in summed]
        count = summed[0][name][1]
        classes[name] = {
            "milliseconds": spent,
            "count": count,
            "microseconds_a_layer": [ms * 1e3 / layers for ms in spent],
        }
    rewind()
    products = profiled(launched, runner.device, shapes=True).products
    working = [busy(kernels)[0] / 1e3 for kernels in found]
    wall = [one * 1e3 for one in taken]
    top: dict[str, list[float]] = defaultdict(list)
    for one in found[0]:
        top[one.name[:120]].append(one.duration / 1e3)
    row = {
        **fields,
        "pair": runner.pair,
        "milliseconds": wall,
        "floor_milliseconds": ideal.floor_s * 1e3,
        "expected_milliseconds": ideal.achievable_s * 1e3,
        "busy_milliseconds": working,
        "gap_milliseconds": [whole - part for whole, part in zip(wall, working, strict=True)],
        "small_milliseconds": [sum(ms for name, (ms, _) in classed.items() if name not in LARGE) for classed in summed],
        "kernels_a_layer": [len(kernels) / layers for kernels in found],
        "classes": classes,
        "products": _rates_of(products, cost.dtype.itemsize),
        "top": [
            {"name": name, "milliseconds": sum(runs), "count": len(runs)}
            for name, runs in sorted(top.items(), key=lambda item: -sum(item[1]))[:25]
        ],
    }
    seconds_of_products = sum(one.duration for one in products) / 1e6
    if seconds_of_products:
        row["product_teraflops"] = sum(2 * p.rows * p.inner * p.columns for p in products) / seconds_of_products / 1e12
    runner.add("profile", **row)


def _rates_of(products: list[Product], itemsize: int) -> list[dict[str, Any]]:
    """By shape: how many, and the bandwidth and rate of the median one."""
    shapes: dict[tuple[int, int, int], list[float]] = defaultdict(list)
    for one in products:
        shapes[one[:3]].append(one.duration)
    told = []
    for (rows, inner, columns), spent in shapes.items():
        median = statistics.median(spent)
        moved = itemsize * (rows * inner + inner * columns + rows * columns)
        told.append(
            {
                "rows": rows,
                "inner": inner,
                "columns": columns,
                "count": len(spent),
                "microseconds": median,
                "terabytes_per_second": moved / median / 1e6 if median else None,
                "teraflops": 2 * rows * inner * columns / median / 1e6 if median else None,
            }
        )
    return told

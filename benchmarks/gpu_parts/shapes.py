"""Graphs: how many a call still asks for once the engine is warmed up, and what padding to few shapes costs."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.gpu_parts.heartbeats import REPEATS, watching, workload
from benchmarks.gpu_parts.models import pilots
from benchmarks.gpu_parts.profiles import prepared_steps
from benchmarks.gpu_parts.runner import Runner
from stars_fast.bench.yardsticks import seconds
from stars_fast.policy.steps import Shape, Steps
from stars_fast.tree.attention import plugged
from stars_fast.tree.passes import PassShape

_CONTEXT, _SEGMENT = 256, 16


def measure_shapes(runner: Runner) -> None:
    """Passes launched and graphs made after warm_up, and padded against exact sizes."""
    _count(runner)
    if runner.time_for(3):
        with runner.guarded("a padded scoring pass"):
            _score(runner)
    if runner.time_for(3):
        with runner.guarded("a padded decode step"):
            _decode(runner)
    if runner.time_for(3):
        with runner.guarded("a decode step with padded trunks"):
            _long(runner)


def _count(runner: Runner) -> None:
    """Whole calls of 64 requests, from the first one on, of an engine that was warmed up for them."""
    engine, load = pilots(runner).engine, workload(runner, 4 if runner.tiny else 64, 0.3, response=96)
    prompts, config = pilots(runner).pair.prompts(load.batch, load.prompt_length), pilots(runner).config(load)
    told = engine.warm_up(config, requests=load.batch, max_model_len=load.prompt_length + load.max_new_tokens)
    runner.add("warm_up", **told._asdict())
    models, launched, large, graphs = (engine.policy, *engine.reward.tree_models), list[int](), list[int](), list[int]()
    for seed in range(REPEATS):
        if runner.time_for(2):
            before = sum(model.graphs.tried for model in models)
            with watching(engine, prompts) as watch:
                engine.generate(prompts, config, seed=seed, on_error="raise")
            launched.append(watch.passes["launched"])
            large.append(watch.passes["large"])
            graphs.append(sum(model.graphs.tried for model in models) - before)
    runner.add("graphs", requests=load.batch, launched=launched, large=large, graphs=graphs)


def _score(runner: Runner) -> None:
    """A segment each of 64 requests, padded as the engine does and to its own sizes."""
    (model,) = pilots(runner).engine.reward.tree_models
    groups, context, segment = (3, 8, 4) if runner.tiny else (64, _CONTEXT, _SEGMENT)
    pair, tokens = pilots(runner).pair, groups * segment
    with plugged(model.model), torch.no_grad():
        model.allocate(groups * (context + segment), context)
        nodes, _ = model.extend([-1] * groups, pair.prompts(groups, context), 4096)
        branches = pair.prompts(groups, segment)
        plan = model.plan(nodes, [1] * groups, [segment] * groups, np.array(branches).reshape(-1))
        padded = PassShape.padded([segment] * groups, groups, 1, model.trunk_room, logits=False)
        assert padded is not None
        exact = padded._replace(tokens=tokens, rows=groups, groups=groups, most_rows=1, most_queries=segment)
        ways = {}
        for way, shape in (("padded", padded), ("exact", exact)):
            small = model.small_pass(shape)
            small.plan.load(plan)
            ways[way] = small.run
        _add(runner, "score", ways)
    model.clear()


def _decode(runner: Runner) -> None:
    """A decode step of few requests with many rows each, padded as the engine does and to so few requests."""
    policy = pilots(runner).engine.policy
    groups, candidates, context, segment = (3, 2, 8, 6) if runner.tiny else (17, 11, _CONTEXT, _SEGMENT)
    pad = Shape.padded
    with plugged(policy.model), torch.no_grad():
        ways = {}
        for way, groups_of in (("padded", lambda shape: shape.groups), ("exact", lambda _: groups)):

            def padded(shape: Shape, *room: int, groups_of: Callable[[Shape], int] = groups_of) -> Shape:
                shape = pad(shape, *room)
                return shape._replace(groups=groups_of(shape))

            with patch.object(Shape, "padded", padded):
                ways[way] = _middle(prepared_steps(runner, policy, groups, candidates, context, segment), segment)
        _add(runner, "decode", ways)
    policy.clear()


def _long(runner: Runner) -> None:
    """A decode step of 64 x 3 on trunks of 256 tokens, with room for 8,192 as a session may ask for, and for 256."""
    policy = pilots(runner).engine.policy
    groups, candidates, context, segment, room = (2, 2, 8, 6, 64) if runner.tiny else (64, 3, _CONTEXT, _SEGMENT, 8192)
    pad = Shape.padded
    with plugged(policy.model), torch.no_grad():
        ways = {}
        for way, trunk in (("padded", room), ("exact", context)):

            def padded(shape: Shape, _: int, length: int, trunk: int = trunk) -> Shape:
                return pad(shape, trunk, length)

            with patch.object(Shape, "padded", padded):
                ways[way] = _middle(prepared_steps(runner, policy, groups, candidates, context, segment), segment)
        _add(runner, "trunk", ways)
    policy.clear()


def _middle(steps: Steps, segment: int) -> Callable[[], None]:
    """Takes a decode step in the middle of a segment, again and again."""

    def step() -> None:
        steps.step.fill_(segment // 2)
        steps.alive.fill_(True)
        steps.position.fill_(segment // 2)
        steps.run()

    return step


def _add(runner: Runner, what: str, ways: dict[str, Callable[[], None]]) -> None:
    """Alternating, so that both see the same clock and temperature."""
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(REPEATS):
        for way, run in ways.items():
            taken[way].append(seconds(run, runner.device, 3))
    ratios = [padded / exact for padded, exact in zip(taken["padded"], taken["exact"], strict=True)]
    runner.add("padding", what=what, over_exact=ratios, **{f"{way}_seconds": took for way, took in taken.items()})

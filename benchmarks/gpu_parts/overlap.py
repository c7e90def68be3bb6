"""Passes on a second stream beside decode steps: how much of them is hidden. That decides whether it is built.

The two streams share what both only read (weights, keys and values of other slots) and slot 0, which nobody reads. All
else is kept apart: kernels take their scratch memory from torch, which gives each stream blocks of its own, and so are
cuBLAS's workspaces. A graph's memory is fixed, and all graphs of a model have one pool, since one of them runs at a
time: the policy's pass beside its own captured steps is launched. The reward model's graphs have another pool.
"""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

import torch

from benchmarks.gpu_parts.models import pilots
from benchmarks.gpu_parts.profiles import prepared_steps, reading, scoring
from benchmarks.gpu_parts.runner import Runner
from stars_fast.bench.yardsticks import seconds
from stars_fast.policy.policy import Policy
from stars_fast.tree.attention import plugged

_REPEATS, _ROUNDS = 3, 2


def measure_overlap(runner: Runner) -> None:
    """Decode steps of 64 x 3 with prompts or scoring beside them, against one after the other."""
    driven = pilots(runner)
    policy, (model,), pair = driven.engine.policy, driven.engine.reward.tree_models, driven.pair
    groups, candidates, context, segment = (2, 2, 8, 6) if runner.tiny else (64, 3, 256, 16)
    (few, many), length = ((1, 2), 8) if runner.tiny else ((8, 32), 128)
    rows = groups * candidates
    with plugged(policy.model), plugged(model.model), torch.no_grad():
        steps = prepared_steps(runner, policy, groups, candidates, context, segment, beside=many * length)
        model.allocate(groups * context + rows * segment + few * length, context)
        nodes, _ = model.extend([-1] * groups, pair.prompts(groups, context), 4096)
        prompts, more = pair.prompts(few, length), pair.prompts(many, length)
        half, whole = (scoring(model, nodes, pair.prompts(rows, size), candidates) for size in (segment // 2, segment))
        of_policy, of_reward = reading(policy, prompts), reading(model, prompts)

        def segments() -> None:
            steps.step.fill_(1)
            steps.position.fill_(1)
            steps.alive.fill_(True)
            for _ in range(segment - 1):
                steps.run()

        def of_both() -> None:
            of_policy()
            of_reward()

        segments()
        expected = steps.tokens.clone()

        def changed() -> int:
            return int((steps.tokens != expected).sum())

        scored = [seconds(whole, runner.device, _ROUNDS) for _ in range(_REPEATS)]
        passes = (
            ("prompts of both models", 2 * few * length, of_both),
            ("half of scoring", rows * (segment // 2), half),
            ("prompts", many * length, reading(policy, more)),
            ("prompts", few * length, of_policy),
        )
        for what, tokens, run in passes:
            if not runner.time_for(5):
                break
            with runner.guarded(f"{what} beside steps"):
                _measure(runner, what, tokens, segments, run, policy, changed, scored)
    policy.clear()
    model.clear()


def _measure(
    runner: Runner,
    what: str,
    tokens: int,
    steps: Callable[[], None],
    run: Callable[[], None],
    policy: Policy,
    changed: Callable[[], int],
    scored: list[float],
) -> None:
    """In turns: steps, the pass as the engine runs it behind them, and both at once. A heartbeat is taken to be steps
    and scoring, and prompts where it has them: what else it does is a few per cent.
    """
    side = torch.cuda.Stream(runner.device) if runner.on_gpu else None

    def both() -> None:
        if side is not None:
            side.wait_stream(torch.cuda.current_stream())
        steps()  # their replays are short to launch; a pass's kernels are not
        with torch.cuda.stream(side), patch.object(policy.graphs, "enabled", False):
            run()
        if side is not None:
            torch.cuda.current_stream().wait_stream(side)

    spent: dict[str, list[float]] = {"steps": [], "alone": [], "both": []}
    differ = list[int]()
    for _ in range(_REPEATS):
        for way, work in (("steps", steps), ("alone", run), ("both", both)):
            spent[way].append(seconds(work, runner.device, _ROUNDS) * 1e3)
        differ.append(changed())
    each = list(zip(*spent.values(), strict=True))
    saved = [one + other - both for one, other, both in each]
    beats = [
        one + 1e3 * score + (0.0 if what == "half of scoring" else other)
        for (one, other, _), score in zip(each, scored, strict=True)
    ]
    runner.add(
        "overlap",
        what=what,
        tokens=tokens,
        **{f"{way}_milliseconds": taken for way, taken in spent.items()},
        saved_milliseconds=saved,
        of_shorter=[ms / min(one, other) for ms, (one, other, _) in zip(saved, each, strict=True)],
        of_heartbeat=[ms / beat for ms, beat in zip(saved, beats, strict=True)],
        changed_tokens=differ,
    )

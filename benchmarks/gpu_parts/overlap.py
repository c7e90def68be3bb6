"""Scoring beside decoding, on a second stream: measured before it is built, so that it is built only if it pays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu_parts.heartbeats import PROMPT
from benchmarks.gpu_parts.models import pair
from benchmarks.gpu_parts.runner import Runner
from stars_fast.bench.models import Pair
from stars_fast.bench.yardsticks import seconds
from stars_fast.policy.leaf import Leaf, Sampling
from stars_fast.policy.policy import Policy
from stars_fast.tree.attention import plugged
from stars_fast.tree.model import TreeModel

_ROUNDS = 7


def overlapped_scoring(runner: Runner) -> None:
    """Score the first half of a segment on a second stream while the second half is drawn: on one stream, and on two.

    The saving is what a heartbeat could gain at most: the second half of the segment is scored afterwards either way.
    """
    models = pair(runner, "llama-2-7b")
    batch, candidates, segment = (4, 2, 4) if runner.tiny else (64, 3, 16)
    runner.shared.pop("pilots", None)
    length, half = 8 if runner.tiny else PROMPT, segment // 2
    prompts, rows = models.prompts(batch, length), batch * candidates
    with plugged(models.policy), plugged(models.reward), torch.no_grad():
        policy = Policy(models.policy)  # its decode steps refer to it weakly
        decode = _decode_steps(policy, prompts, candidates, segment, half)
        score = _scoring_pass(models, prompts, candidates, half)
        score()
        side = torch.cuda.Stream() if runner.on_gpu else None

        def one_after_the_other() -> None:
            decode()
            score()

        def at_once() -> None:
            if side is None:
                one_after_the_other()
                return
            side.wait_stream(torch.cuda.current_stream())
            decode()  # graphs are replayed at once, so that the launches below go beside them
            with torch.cuda.stream(side):
                score()
            torch.cuda.current_stream().wait_stream(side)

        calls = {"decode": decode, "score": score, "serial": one_after_the_other, "concurrent": at_once}
        taken = {what: seconds(call, runner.device, _ROUNDS) * 1e3 for what, call in calls.items()}
    runner.add(
        "overlap",
        pair=models.name,
        rows=rows,
        tokens=half,
        **{f"{what}_milliseconds": value for what, value in taken.items()},
        saved_milliseconds=taken["serial"] - taken["concurrent"],
    )


def _decode_steps(
    policy: Policy, prompts: list[list[int]], candidates: int, segment: int, half: int
) -> Callable[[], None]:
    """Half a segment's decode steps, as the engine runs them."""
    batch, length = len(prompts), len(prompts[0])
    policy.begin(batch * length + batch * candidates * segment, length, segment)
    nodes, logits = policy.prefill([-1] * batch, prompts)
    leaves = [
        Leaf(node, row, Sampling(), i, segment=0, first_attempt=0, candidates=candidates, length=segment)
        for i, (node, row) in enumerate(zip(nodes, logits, strict=True))
    ]
    prepared: list[Any] = []
    original = policy._prepared
    policy._prepared = lambda *args: prepared.append(original(*args)) or prepared[-1]  # type: ignore[method-assign]
    policy.propose(leaves)  # compiles and captures; its branches stay, and so do their slots
    steps = prepared[0]

    def run() -> None:
        steps.step.fill_(1)
        steps.alive.fill_(True)
        steps.position.fill_(1)
        for _ in range(half):
            steps.run()

    return run


def _scoring_pass(models: Pair, prompts: list[list[int]], candidates: int, half: int) -> Callable[[], None]:
    """One pass of the reward model over half a segment of every row."""
    body = getattr(models.reward, models.reward.base_model_prefix)
    model = TreeModel(models.reward, body, "reward")
    model.accelerate(False, True)
    batch, length, rows = len(prompts), len(prompts[0]), len(prompts) * candidates
    model.allocate(batch * length + rows * half)
    nodes, _ = model.extend([-1] * batch, prompts)
    branches = models.prompts(rows, half)

    def run() -> None:
        plan = model.plan(nodes, [candidates] * batch, [half] * rows)
        model.encode(plan, branches, candidates)
        for branch in plan.branches:
            model.tree.release(branch)

    return run

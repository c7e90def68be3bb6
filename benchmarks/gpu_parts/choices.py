"""What would be worth building on this GPU: measured before it is built, so that it is built only if it pays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from micro.timing import captured

from gpu_parts.heartbeats import PROMPT
from gpu_parts.models import Pair, configs, free, pair
from gpu_parts.runner import Runner
from stars_fast.bench.yardsticks import seconds
from stars_fast.decode import Leaf, Sampling
from stars_fast.policy import Policy
from stars_fast.tree.attention import plugged
from stars_fast.tree.model import TreeModel

_WEIGHT_SETS = 8  # layers in turn, so that no weights stay in the cache
_ROUNDS = 7


def fused_weights(runner: Runner, name: str, rows: tuple[int, ...]) -> None:
    """Query, key and value in one product, gate and up in another, against five: what a layer's products take."""
    config = configs(name, runner.tiny)[0]
    heads, keys = config.num_attention_heads, config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    groups = [[heads * size, keys * size, keys * size], [config.intermediate_size] * 2]
    dtype = torch.bfloat16 if runner.on_gpu else torch.float32
    free(runner)
    layers = [
        [torch.randn(sum(parts), config.hidden_size, device=runner.device, dtype=dtype) for parts in groups]
        for _ in range(_WEIGHT_SETS)
    ]
    for count in rows:
        x = torch.randn(count, config.hidden_size, device=runner.device, dtype=dtype)

        def fused(i: int, x: torch.Tensor = x) -> None:
            for weight in layers[i]:
                F.linear(x, weight)

        def separate(i: int, x: torch.Tensor = x) -> None:
            for weight, parts in zip(layers[i], groups, strict=True):
                for part in weight.split(parts):
                    F.linear(x, part)

        apart, together = (_per_layer(runner, call) for call in (separate, fused))
        runner.add(
            "fused_weights",
            pair=name,
            rows=count,
            separate_microseconds=apart * 1e6,
            fused_microseconds=together * 1e6,
            gain=apart / together,
            gigabytes_per_second=sum(weight.nbytes for weight in layers[0]) / together / 1e9,
        )


def _per_layer(runner: Runner, call: Callable[[int], None]) -> float:
    """Seconds of one layer's products; a graph holds them on a GPU, as it does in a decode step."""
    for i in range(_WEIGHT_SETS):
        call(i)
    if runner.on_gpu:
        run = captured(call, _WEIGHT_SETS)
    else:

        def run() -> None:
            for i in range(_WEIGHT_SETS):
                call(i)

    return seconds(run, runner.device, _ROUNDS) / _WEIGHT_SETS


def overlapped_scoring(runner: Runner, name: str, batch: int, candidates: int, segment: int) -> None:
    """Score the first half of a segment on a second stream while the second half is drawn: on one stream, and on two.

    The saving is what a heartbeat could gain at most: the second half of the segment is scored afterwards either way.
    """
    models = pair(runner, name)
    runner.shared.pop("engine", None)
    length, half = 8 if runner.tiny else PROMPT, segment // 2
    prompts, rows = models.prompts(batch, length), batch * candidates
    with plugged(models.policy), plugged(models.reward), torch.no_grad():
        decode = _decode_steps(models, prompts, candidates, segment, half)
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
        pair=name,
        rows=rows,
        tokens=half,
        **{f"{what}_milliseconds": value for what, value in taken.items()},
        saved_milliseconds=taken["serial"] - taken["concurrent"],
    )


def _decode_steps(
    models: Pair, prompts: list[list[int]], candidates: int, segment: int, half: int
) -> Callable[[], None]:
    """Half a segment's decode steps, as the engine runs them."""
    policy = Policy(models.policy, torch_compile=False)
    batch, length = len(prompts), len(prompts[0])
    policy.begin(batch * length + batch * candidates * segment, length, segment)
    nodes, logits = policy.prefill([-1] * batch, prompts)
    leaves = [
        Leaf(node, row, i, segment=0, first_attempt=0, candidates=candidates, length=segment)
        for i, (node, row) in enumerate(zip(nodes, logits, strict=True))
    ]
    prepared: list[Any] = []
    original = policy._prepared
    policy._prepared = lambda *args: prepared.append(original(*args)) or prepared[-1]  # type: ignore[method-assign]
    policy.propose(leaves, Sampling())  # compiles and captures; its branches stay, and so do their slots
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
    model = TreeModel(models.reward, getattr(models.reward, models.reward.base_model_prefix), "reward")
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

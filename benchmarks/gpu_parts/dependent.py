"""Decode steps with programmatic dependent launch and without, in turns on the same tensors."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

from benchmarks.gpu_parts.models import pilots
from benchmarks.gpu_parts.profiles import prepared_steps
from benchmarks.gpu_parts.runner import Runner
from stars_fast.bench.yardsticks import seconds
from stars_fast.policy.steps import Steps
from stars_fast.tree.attention import plugged

_REPEATS = 3


def compare_dependent_launches(runner: Runner) -> None:
    """Decode steps of 64 x 3 and 1 x 11, each captured once with our kernels' dependent launches and once without.

    Inductor's own kernels are as they were compiled: ``TORCHINDUCTOR_ENABLE_PDL=1`` for the whole program changes them.
    """
    policy = pilots(runner).engine.policy
    switch = importlib.import_module("stars_fast.kernels.dependent") if runner.on_gpu else None
    for groups, candidates in ((2, 2),) if runner.tiny else ((64, 3), (1, 11)):
        if not runner.time_for(4):
            return
        with runner.guarded(f"dependent {groups} x {candidates}"), plugged(policy.model), torch.no_grad():
            context, segment = (8, 6) if runner.tiny else (256, 16)
            spent: dict[bool, list[float]] = {False: [], True: []}
            ways: dict[bool, Callable[[], None]] = {}
            before = switch is not None and switch.enabled
            try:
                for dependent in (False, True):
                    if switch is not None:
                        switch.enabled = dependent
                    policy.graphs.drop()  # each way has a graph of its own, over the same pool
                    steps = prepared_steps(runner, policy, groups, candidates, context, segment)

                    def several(steps: Steps = steps, segment: int = segment) -> None:
                        steps.step.fill_(1)
                        steps.alive.fill_(True)
                        for _ in range(segment - 2):
                            steps.run()

                    ways[dependent] = several
                for _ in range(_REPEATS):  # in turns, so that both see the same clock and temperature
                    for dependent, several in ways.items():
                        spent[dependent].append(seconds(several, runner.device, 3) / (segment - 2))
            finally:
                if switch is not None:
                    switch.enabled = before
                policy.graphs.drop()
            saved = [(off - on) * 1e6 for off, on in zip(*spent.values(), strict=True)]
            runner.add("dependent", groups=groups, candidates=candidates, saved_microseconds=saved)
    policy.clear()

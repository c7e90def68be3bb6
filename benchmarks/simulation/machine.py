"""How long a simulated heartbeat takes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from benchmarks.roofline import Gpu, ModelCost, Workload, prefill, proposal, score_pass
from stars_fast.tree.passes import bucket


class Seconds(NamedTuple):
    """The two parts of a heartbeat that the engine can tell apart."""

    propose: float
    score: float


class Machine(Protocol):
    """A pair of models on a device."""

    padded: bool  # whether decode steps run in buckets of rows

    def heartbeat(
        self, rows: int, requests: int, steps: int, prompts: int, scored: Sequence[tuple[int, int]]
    ) -> Seconds:
        """With so many candidates of so many requests, ``steps`` tokens each, and prompts encoded before them.

        ``scored`` are candidates and requests of each scoring pass.
        """
        ...


@dataclass(frozen=True)
class LinearMachine:
    """``fixed + row * rows`` seconds, whatever else.

    Raises
    ------
    ValueError
        For costs that are not above 0 (``fixed``) or negative (``row``).
    """

    fixed: float
    row: float
    padded = False

    def __post_init__(self) -> None:
        if not (self.fixed > 0 and self.row >= 0):
            raise ValueError(f"fixed={self.fixed}, row={self.row}: the first above 0, the second not negative")

    def heartbeat(
        self, rows: int, requests: int, steps: int, prompts: int, scored: Sequence[tuple[int, int]]
    ) -> Seconds:
        return Seconds(self.fixed + self.row * rows, 0.0)


class RooflineMachine:
    """What :mod:`benchmarks.roofline` says is achievable. Decode steps run in buckets, as captured ones do.

    Of the workload, context, response and tail are used.
    """

    padded = True

    def __init__(self, policy: ModelCost, reward: ModelCost, workload: Workload, gpu: Gpu) -> None:
        self.policy, self.reward, self.workload, self.gpu = policy, reward, workload, gpu
        # Heartbeats of the same few sizes recur by the thousand.
        self.propose = functools.cache(self._propose)
        self.score = functools.cache(self._score)
        self.prefill = functools.cache(self._prefill)

    def heartbeat(
        self, rows: int, requests: int, steps: int, prompts: int, scored: Sequence[tuple[int, int]]
    ) -> Seconds:
        propose, score = self.propose(bucket(rows), requests, steps), sum(self.score(*one, steps) for one in scored)
        if not prompts:
            return Seconds(propose, score)
        return Seconds(propose + self.prefill(self.policy, prompts), score + self.prefill(self.reward, prompts))

    def _propose(self, rows: int, requests: int, steps: int) -> float:
        work = (requests, self.workload.context, steps)
        stage = proposal(self.policy, rows, *work, self.gpu, behind=requests)
        return stage.achievable_s + self.gpu.achievable.host_s

    def _score(self, rows: int, requests: int, steps: int) -> float:
        context, tail = self.workload.context, self.workload.tail
        return score_pass(self.reward, rows, requests, context, steps, self.gpu, tail).achievable_s

    def _prefill(self, cost: ModelCost, prompts: int) -> float:
        return prefill(cost, prompts, self.workload.prompt, self.gpu).achievable_s

"""How long a simulated heartbeat takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from stars_fast.roofline import Achievable, Gpu, ModelCost, Workload, decode_step, prefill, score_pass
from stars_fast.roofline.stages import draw
from stars_fast.tree.passes import bucket


class Seconds(NamedTuple):
    """The two parts of a heartbeat that the engine can tell apart."""

    propose: float
    score: float


class Machine(Protocol):
    """A pair of models on a device."""

    @property
    def padded(self) -> bool:
        """Whether decode steps run in buckets of rows."""
        ...

    def heartbeat(self, rows: int, requests: int, steps: int, prompts: int) -> Seconds:
        """With so many candidates of so many requests, ``steps`` tokens each, and prompts encoded before them."""
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
    padded: bool = False

    def __post_init__(self) -> None:
        if not (self.fixed > 0 and self.row >= 0):
            raise ValueError(f"fixed={self.fixed}, row={self.row}: the first above 0, the second not negative")

    def heartbeat(self, rows: int, requests: int, steps: int, prompts: int) -> Seconds:
        return Seconds(self.fixed + self.row * rows, 0.0)


@dataclass(frozen=True)
class RooflineMachine:
    """What :mod:`stars_fast.roofline` says is achievable. Decode steps run in buckets, as captured ones do.

    Parameters
    ----------
    policy, reward : ModelCost
    workload : Workload
        Its segment, context, response and tail are used.
    gpu : Gpu
    achievable : Achievable
    """

    policy: ModelCost
    reward: ModelCost
    workload: Workload
    gpu: Gpu
    achievable: Achievable = field(default_factory=Achievable)
    padded: bool = True
    _known: dict[tuple[int, ...], float] = field(default_factory=dict, repr=False)

    def heartbeat(self, rows: int, requests: int, steps: int, prompts: int) -> Seconds:
        return Seconds(
            self._propose(bucket(rows), requests, steps) + self._prefill(0, prompts),
            self._score(rows, requests, steps) + self._prefill(1, prompts),
        )

    def _propose(self, rows: int, requests: int, steps: int) -> float:
        key = (0, rows, requests, steps)
        if key not in self._known:
            context, gpu, achievable = self.workload.context, self.gpu, self.achievable
            step = decode_step(self.policy, rows, requests, context, max(steps / 2 - 1, 0), gpu, achievable)
            # Last tokens of segments just committed, so that their leaves have logits.
            extension = decode_step(self.policy, requests, requests, context - 1, 0, gpu, achievable)
            first = draw(self.policy, rows, gpu, achievable)
            seconds = (steps - 1) * step.achievable_s + extension.achievable_s + first.achievable_s
            self._known[key] = seconds + achievable.host_s
        return self._known[key]

    def _score(self, rows: int, requests: int, steps: int) -> float:
        key = (1, rows, requests, steps)
        if key not in self._known:
            work = self.workload
            stage = score_pass(
                self.reward, rows, requests, work.context, steps, self.gpu, self.achievable, tail=work.tail
            )
            self._known[key] = stage.achievable_s
        return self._known[key]

    def _prefill(self, model: int, prompts: int) -> float:
        if not prompts:
            return 0.0
        key = (2, model, prompts)
        if key not in self._known:
            cost = (self.policy, self.reward)[model]
            self._known[key] = prefill(cost, prompts, self.workload.prompt, self.gpu, self.achievable).achievable_s
        return self._known[key]

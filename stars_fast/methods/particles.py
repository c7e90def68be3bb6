"""Methods with several answers at once: which of them go on, as pure functions of rewards."""

from __future__ import annotations

import math
import sys
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

from stars_fast.methods.base import Population, Segments, SettingsT
from stars_fast.methods.numbers import MOST, MOST_ANSWERS, truth


@dataclass(frozen=True)
class ParticleFilter(Population):
    """A particle filter over partial answers (arXiv 2502.01618), or sequential Monte Carlo on increments of the reward.

    In each round every particle grows by a segment and is weighted by ``softmax(r / temperature)`` of its reward (a
    process reward model's); ``particles`` of them are drawn again with these weights, with replacement (multinomial).
    Finished particles keep their reward and take part. The answer is the particle with the highest reward at the end.
    It is a search: as particles become many, those of the last round follow ``pi(y) prod_k exp(r_k / temperature)``
    (k over all rounds; a finished answer keeps its r), and the best of them is returned.

    With ``increments``, a particle's weight is multiplied by ``exp((r_k - r_(k-1)) / temperature)`` in each round, so
    by 1 once it has finished; r_0 counts as 0, since it is the same for all. Where the effective sample size
    ``(sum w)^2 / sum w^2`` falls below half of ``particles``, as many are drawn again by systematic resampling and have
    equal weights; else weights are carried on. The answer is one particle drawn by its weight. As particles become
    many its law tends to ``pi(y) exp(r(y) / temperature)`` over whole texts, whatever the partial rewards, which decide
    how many that takes. A reward of -inf must be final: what is not drawn again does not come back.

    ``delimiter`` ends a step, as the paper's blank line does; None for steps of ``segment_length`` tokens, which is
    also the longest a step may be. At most 65,536 particles, whose slots are set aside together;
    ``temperature`` lies in [1e-6, 1e30].
    """

    name: ClassVar[str] = "particle_filter"
    particles: int = 8
    temperature: float = 1.0
    delimiter: str | None = None
    increments: bool = False

    def __post_init__(self) -> None:
        self._check_integer("particles", MOST_ANSWERS)
        self._check_real("temperature", 1e-6, 1e30)
        self._check_delimiter()
        object.__setattr__(self, "increments", truth(f"{self.name}: increments", self.increments))

    def segments(self) -> Segments:
        return Segments(delimiter=self.delimiter)

    @property
    def width(self) -> int:
        return self.particles

    @property
    def children(self) -> int:
        return 1

    @property
    def weighs_increments(self) -> bool:
        return self.increments

    def select(self, values: Sequence[float], uniforms: Sequence[float]) -> list[int] | None:
        weights = self._weights(values)
        if self.increments:
            effective = sum(weights) ** 2 / sum(weight * weight for weight in weights)
            if effective >= len(weights) / 2:
                return None
            uniforms = [(place + uniforms[0]) / len(weights) for place in range(len(weights))]
        return _drawn(weights, uniforms)

    def answer(self, values: Sequence[float], uniform: float) -> int:
        return _drawn(self._weights(values), [uniform])[0] if self.increments else super().answer(values, uniform)

    def _weights(self, values: Sequence[float]) -> list[float]:
        """``exp(value / temperature)``, the largest being 1."""
        top = min(max(values), sys.float_info.max)  # a difference of two rewards may be infinite
        if math.isinf(top):  # every particle is rejected for good: none is better than another
            return [1.0] * len(values)
        return [math.exp(min(value - top, 0.0) / self.temperature) for value in values]


def _drawn(weights: Sequence[float], uniforms: Sequence[float]) -> list[int]:
    """For each number in (0, 1) a place, with a probability in proportion to its weight."""
    sums = list(accumulate(weights))
    return [min(bisect_right(sums, u * sums[-1]), len(weights) - 1) for u in uniforms]


@dataclass(frozen=True)
class TreeBoN(Population):
    """Best-of-N over a tree (arXiv 2410.16033).

    ``n`` answers grow by one layer of ``max_new_tokens / layers`` tokens; the best ``n / branching`` by reward stay,
    and each is continued ``branching`` times, to the last layer, whose best is the answer. The paper's score of a
    partial answer is the weighted implicit reward ``sum_k (1/k) log(pi_dpo(y_k) / pi_ref(y_k))``
    (``rewards.ImplicitReward``); any reward that makes sense on partial text is taken. ``n`` is at most 65,536, and
    the slots of its answers are set aside together.
    """

    name: ClassVar[str] = "treebon"
    n: int = 16
    branching: int = 4
    layers: int = 4

    def __post_init__(self) -> None:
        for field in ("n", "branching", "layers"):
            self._check_integer(field, MOST if field == "layers" else MOST_ANSWERS)
        if self.n % self.branching:
            raise ValueError(f"treebon: n={self.n} must be a multiple of branching={self.branching}")

    def rule(self, config: SettingsT) -> SettingsT:
        return super().rule(config).replace(segment_length=-(-config.max_new_tokens // self.layers))

    @property
    def width(self) -> int:
        return self.n

    @property
    def children(self) -> int:
        return self.branching

    def select(self, values: Sequence[float], uniforms: Sequence[float]) -> list[int]:
        best_first = sorted(range(len(values)), key=lambda place: (-values[place], place))
        return best_first[: self.n // self.branching]

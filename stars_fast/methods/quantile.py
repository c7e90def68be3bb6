"""STARS' rule on quantiles: the acceptance is known beforehand, so that no target has to be found for a prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from stars_fast.methods.base import Method, Scored, Segments, SettingsT
from stars_fast.methods.fit import Fit


@dataclass(frozen=True)
class QuantileRule(Method):
    """``stars`` or ``cards`` without a target, with a fit.

    A candidate is accepted with probability ``min(1, exp((u - 1) / b))``, ``u = F(r)`` being its quantile among the
    candidates of such prefixes. F is fixed before they are drawn, so that the law of an accepted segment is
    exactly the policy's, tilted by ``exp(u / b)``. Where u is uniform, ``acceptance = b (1 - exp(-1 / b))``.
    """

    uses_fit: ClassVar[bool] = True
    method: Method
    fit: Fit
    acceptance: float

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.method.name

    @property
    def expected_acceptance(self) -> float:
        return self.acceptance

    def rule(self, config: SettingsT) -> SettingsT:
        ruled = self.method.rule(config)
        return ruled.replace(target_reward=1.0, base_reward=1.0, beta=softness(self.acceptance))

    def segments(self) -> Segments:
        return self.method.segments()

    def values(self, candidates: Sequence[Scored]) -> list[float]:
        return [
            one.reward if math.isinf(one.reward) else self.fit.level(one.segment, one.before or 0.0, one.reward)
            for one in candidates
        ]


@lru_cache(maxsize=64)
def softness(acceptance: float) -> float:
    """The b with ``b (1 - exp(-1 / b)) = acceptance``, in (0, 1)."""
    low, high = 1e-6, 1e6
    while high / low > 1 + 1e-12:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if -middle * math.expm1(-1 / middle) < acceptance else (low, middle)
    return middle

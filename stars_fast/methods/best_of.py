"""Methods that draw several whole answers or segments, and take one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from stars_fast.methods.base import Method, SettingsT, Trial
from stars_fast.methods.numbers import MOST_ANSWERS
from stars_fast.methods.stars import Vanilla


@dataclass(frozen=True)
class _BestOf(Method):
    """Out of ``n`` candidates the best, ties to the first: none reaches an infinite target. n is at most 65,536."""

    has_target: ClassVar[bool] = False
    n: int = 16

    def __post_init__(self) -> None:
        self._check_integer("n", MOST_ANSWERS)

    def rule(self, config: SettingsT) -> SettingsT:
        return config.replace(target_reward=math.inf, base_reward=None, max_attempts=self.n)


@dataclass(frozen=True)
class BestOfN(_BestOf, Trial):
    """The best of ``n`` independent answers: ``arg max_i r(x, y_i)``, ties to the first.

    ``n`` is 16 here; papers use 4 to 1,000. At most 65,536: every answer is kept until the last has ended.
    """

    name: ClassVar[str] = "best_of_n"


@dataclass(frozen=True)
class BlockwiseBestOfN(_BestOf):
    """Each segment is the best of ``n``: blockwise best-of-K of controlled decoding (arXiv 2310.17022).

    Their scorer is a value function; any partial reward is taken here. Block length: ``segment_length``.
    ``n`` is at most 65,536.
    """

    name: ClassVar[str] = "blockwise_best_of_n"


@dataclass(frozen=True)
class RejectionSampling(Trial):
    """Whole answers by rejection sampling: the first accepted with probability ``min(1, exp((r - r_star) / beta))``.

    The best of ``max_attempts`` (20) is returned where none is. Given acceptance, the law is
    ``pi(y | x) exp(min(r(x, y), r_star) / beta)`` up to a constant: what STARS and CARDS (arXiv 2406.16306) speed up.
    """

    name: ClassVar[str] = "rejection_sampling"

    def rule(self, config: SettingsT) -> SettingsT:
        return config.replace(alpha=1.0, finished_threshold="target")

    def pilot(self) -> Method:
        return Vanilla()

"""Methods that are STARS' rule under other settings: one answer grows, a segment at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from stars_fast.methods.base import Method, Segments, Trial

if TYPE_CHECKING:
    from stars_fast.config import StarsConfig


@dataclass(frozen=True)
class Stars(Method):
    """Segments of K tokens by adaptive rejection sampling (arXiv 2511.03827). All settings are StarsConfig's.

    A candidate that brings the answer to n tokens is accepted with probability ``min(1, exp((r - tau(n)) / beta))``,
    ``tau(n) = min(r0 + (r_star - r0) n / max_new_tokens, r_star)``, ``r0 = (1 - alpha) r(x) + alpha r_star``; the best
    of ``max_attempts`` is committed where none is.
    """

    name: ClassVar[str] = "stars"


@dataclass(frozen=True)
class Vanilla(Method):
    """Plain sampling: each segment is the first candidate. Only the finished answer is scored, for the output."""

    name: ClassVar[str] = "vanilla"
    scores_unfinished: ClassVar[bool] = False
    has_target: ClassVar[bool] = False

    def rule(self, config: StarsConfig) -> StarsConfig:
        return config.replace(target_reward=-math.inf, base_reward=None, max_attempts=1)


@dataclass(frozen=True)
class _BestOf(Method):
    """Out of ``n`` candidates the best, ties to the first: none reaches an infinite target."""

    has_target: ClassVar[bool] = False
    n: int = 16

    def __post_init__(self) -> None:
        self._check_least("n", 1)

    def rule(self, config: StarsConfig) -> StarsConfig:
        return config.replace(target_reward=math.inf, base_reward=None, max_attempts=self.n)


@dataclass(frozen=True)
class BestOfN(_BestOf, Trial):
    """The best of ``n`` independent answers: ``arg max_i r(x, y_i)``, ties to the first.

    ``n`` is 16 here; papers use 4 to 1,000.
    """

    name: ClassVar[str] = "best_of_n"


@dataclass(frozen=True)
class RejectionSampling(Trial):
    """Whole answers by rejection sampling: the first accepted with probability ``min(1, exp((r - r_star) / beta))``.

    The best of ``max_attempts`` (20) is returned where none is. Given acceptance, the law is
    ``pi(y | x) exp(min(r(x, y), r_star) / beta)`` up to a constant: what STARS and CARDS (arXiv 2406.16306) speed up.
    """

    name: ClassVar[str] = "rejection_sampling"

    def rule(self, config: StarsConfig) -> StarsConfig:
        return config.replace(alpha=1.0, finished_threshold="target")

    def pilot(self) -> Method:
        return Vanilla()


@dataclass(frozen=True)
class Cards(Method):
    """Segments that end where the policy becomes uncertain, by STARS' rule (CARDS, arXiv 2406.16306).

    A segment ends before a token whose distribution has an entropy of at least ``entropy`` nats (without temperature
    and filters), once it has ``shortest`` tokens, and after ``longest`` at the latest. That token belongs to the next
    segment, and is drawn anew there. alpha 0.5, beta 0.7 and 20 attempts are StarsConfig's defaults already; ``top_k``
    is 40 where StarsConfig leaves it open. After the attempts the best candidate is committed; the paper's code takes a
    further one without a test.
    """

    name: ClassVar[str] = "cards"
    entropy: float = 3.0
    shortest: int = 4
    longest: int = 64

    def __post_init__(self) -> None:
        self._check_least("entropy", 0.0)
        self._check_least("shortest", 1)
        self._check_least("longest", 1)

    def rule(self, config: StarsConfig) -> StarsConfig:
        return config.replace(segment_length=self.longest, top_k=40 if config.top_k is None else config.top_k)

    def segments(self) -> Segments:
        return Segments(self.entropy, self.shortest)


@dataclass(frozen=True)
class BlockwiseBestOfN(_BestOf):
    """Each segment is the best of ``n``: blockwise best-of-K of controlled decoding (arXiv 2310.17022).

    Their scorer is a value function; any partial reward is taken here. Block length: ``segment_length``.
    """

    name: ClassVar[str] = "blockwise_best_of_n"

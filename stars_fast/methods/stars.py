"""STARS (arXiv 2511.03827), its acceptance rule as pure functions of rewards, and what it is measured against.

``stars_fast.ops.select_and_commit`` applies the same rule to a whole batch at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from stars_fast.methods.base import Method, SettingsT


def base_reward(empty_reward: float, target: float, alpha: float) -> float:
    """``r0 = (1 - alpha) * r(x) + alpha * r_star``; r_star itself where that is infinite."""
    return target if math.isinf(target) or alpha == 1.0 else (1.0 - alpha) * empty_reward + alpha * target


def threshold(tokens: float, max_new_tokens: int, base: float, target: float) -> float:
    """``tau(n) = min(r0 + (r_star - r0) * n / max_new_tokens, r_star)``, n including the candidate."""
    if math.isinf(target):
        return target
    return min(base + (target - base) * tokens / max_new_tokens, target)


def acceptance_probability(reward: float, tau: float, beta: float) -> float:
    """``min(1, exp((r - tau) / beta))``."""
    if reward >= tau:
        return 1.0
    return math.exp((reward - tau) / beta)  # 0 where the difference is minus infinity


def target_for(acceptance: float, low: float, high: float, expected: Callable[[float], float]) -> float:
    """The target between ``low`` and ``high`` at which ``expected`` says ``acceptance``; the nearer end if none does.

    ``expected`` is the acceptance to be expected with a target: the higher the target, the lower.
    """
    middle = low
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if expected(middle) > acceptance else (low, middle)
    return middle


@dataclass(frozen=True)
class Stars(Method):
    """Segments of K tokens by adaptive rejection sampling (arXiv 2511.03827). All settings are StarsConfig's.

    A candidate that brings the answer to n tokens is accepted with probability ``min(1, exp((r - tau(n)) / beta))``,
    ``tau(n) = min(r0 + (r_star - r0) n / max_new_tokens, r_star)``, ``r0 = (1 - alpha) r(x) + alpha r_star``; the best
    of ``max_attempts`` is committed where none is. Given acceptance, a segment's law is ``pi(s) exp(-max(tau - r, 0) /
    beta)`` up to a constant, given the text before: a tilt of each segment, not of whole texts.
    """

    name: ClassVar[str] = "stars"
    uses_fit: ClassVar[bool] = True


@dataclass(frozen=True)
class Vanilla(Method):
    """Plain sampling: each segment is the first candidate. Only the finished answer is scored, for the output."""

    name: ClassVar[str] = "vanilla"
    scores_unfinished: ClassVar[bool] = False
    has_target: ClassVar[bool] = False

    def rule(self, config: SettingsT) -> SettingsT:
        return config.replace(target_reward=-math.inf, base_reward=None, max_attempts=1)

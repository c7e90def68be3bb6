"""The acceptance rule of STARS (arXiv 2511.03827), as pure functions of rewards.

``stars_fast.ops.select_and_commit`` applies the same rule to a whole batch at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable


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

"""Reward-guided speculative decoding: a draft model writes, the policy steps in."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any, ClassVar

from stars_fast.methods.base import Method, Scorer, Segments, SettingsT
from stars_fast.methods.numbers import shown


@dataclass(frozen=True)
class RSD(Method):
    """Reward-guided speculative decoding (arXiv 2501.19324).

    A draft model writes a step. It stays if its reward (a process reward model's) is at least ``threshold``; else the
    policy writes the step anew, which stays whatever it is. With acceptance set A the step's law is
    ``pi_draft(s) 1[s in A] + pi_draft(not A) pi(s)``.

    A step ends with ``delimiter``, or after ``longest`` tokens.

    Parameters
    ----------
    draft : transformers causal LM, path or hub id
        With the policy's vocabulary.
    """

    name: ClassVar[str] = "rsd"
    loop: ClassVar[str] = "rsd"
    has_target: ClassVar[bool] = False
    gives_hidden_state: ClassVar[bool] = False
    drawn: ClassVar[bool] = False
    draft: Any = None
    threshold: float = 0.7
    delimiter: str | None = "\n\n"
    longest: int = 64

    def __post_init__(self) -> None:
        self._check_integer("longest")
        self._check_real("threshold", -math.inf)
        self._check_delimiter()
        if not (self.draft is None or isinstance(self.draft, (str, os.PathLike)) or hasattr(self.draft, "config")):
            raise TypeError(f"rsd: draft={shown(self.draft)} must be a transformers causal LM, a path or a hub id")

    def rule(self, config: SettingsT) -> SettingsT:
        return config.replace(
            target_reward=self.threshold, alpha=1.0, max_attempts=2, candidates=1, segment_length=self.longest
        )

    @property
    def draft_model(self) -> Any:
        return self.draft

    def passes(self, drawn: int, committed: int) -> tuple[int, int]:
        """The draft model writes every segment and reads what the policy writes instead; the policy reads or writes
        what is committed.
        """
        return committed, drawn

    def segments(self) -> Segments:
        return Segments(delimiter=self.delimiter)

    def check(self, reward: Scorer) -> None:
        super().check(reward)
        if self.draft is None:
            raise ValueError("method='rsd' needs a draft model: StarsConfig(method=RSD(draft=...))")

"""Methods with a second proposer: another model, or the same one under another prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from stars_fast.methods.base import Method, Segments

if TYPE_CHECKING:
    from stars_fast.config import StarsConfig
    from stars_fast.rewards.base import Reward


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
    has_target: ClassVar[bool] = False
    gives_hidden_state: ClassVar[bool] = False
    draft: Any = None
    threshold: float = 0.7
    delimiter: str | None = "\n\n"
    longest: int = 64

    def __post_init__(self) -> None:
        self._check_least("longest", 1)
        self._check_least("threshold", -math.inf)
        self._check_delimiter()

    def rule(self, config: StarsConfig) -> StarsConfig:
        return config.replace(
            target_reward=self.threshold, alpha=1.0, max_attempts=2, candidates=1, segment_length=self.longest
        )

    def segments(self) -> Segments:
        return Segments(delimiter=self.delimiter)

    def check(self, reward: Reward) -> None:
        super().check(reward)
        if self.draft is None:
            raise ValueError("method='rsd' needs a draft model: StarsConfig(method=RSD(draft=...))")


@dataclass(frozen=True)
class PersonaJudge(Method):
    """One model under two preferences: one writes, the other judges, token by token (arXiv 2504.12663).

    The model drafts ``block`` tokens under ``draft_prompt``. Under ``judge_prompt`` it accepts them in order, each with
    probability ``min(1, p_judge / p_draft)``; the first rejected one is replaced by a draw from
    ``max(0, p_judge - p_draft)``, normalised. This is the test of speculative sampling (arXiv 2302.01318), so every
    token follows ``p_judge`` *exactly*: the drafting preference decides how often a token is replaced, and never what
    is likely. No reward is asked but for the finished answer.

    Parameters
    ----------
    draft_prompt, judge_prompt : str or sequence of int
        Put before every prompt: into the system message of chats, before the text of others, as ids before prompts of
        ids, behind their BOS.
    """

    name: ClassVar[str] = "persona_judge"
    scores_unfinished: ClassVar[bool] = False
    has_target: ClassVar[bool] = False
    gives_hidden_state: ClassVar[bool] = False
    draft_prompt: str | Sequence[int] = ""
    judge_prompt: str | Sequence[int] = ""
    block: int = 8

    def __post_init__(self) -> None:
        self._check_least("block", 1)
        for name in ("draft_prompt", "judge_prompt"):
            if not isinstance(value := getattr(self, name), str):
                object.__setattr__(self, name, tuple(int(token) for token in value))

    def rule(self, config: StarsConfig) -> StarsConfig:
        return config.replace(target_reward=0.0, alpha=1.0, max_attempts=1, candidates=1, segment_length=self.block)

    def check(self, reward: Reward) -> None:
        super().check(reward)
        if not self.draft_prompt or not self.judge_prompt:
            raise ValueError(
                "method='persona_judge' needs two preferences: StarsConfig(method=PersonaJudge(draft_prompt=..., "
                "judge_prompt=...))"
            )

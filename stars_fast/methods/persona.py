"""Persona-judge: one model under two preferences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from stars_fast.methods.base import Method, Scorer, Settings, SettingsT
from stars_fast.methods.numbers import text_or_ids


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
    block : int
        At least 1; what goes beyond ``max_new_tokens`` has no effect.
    """

    name: ClassVar[str] = "persona_judge"
    loop: ClassVar[str] = "persona"
    scores_unfinished: ClassVar[bool] = False
    has_target: ClassVar[bool] = False
    gives_hidden_state: ClassVar[bool] = False
    drawn: ClassVar[bool] = False
    draft_prompt: str | Sequence[int] = ""
    judge_prompt: str | Sequence[int] = ""
    block: int = 8

    def __post_init__(self) -> None:
        self._check_integer("block")
        for name in ("draft_prompt", "judge_prompt"):
            object.__setattr__(self, name, text_or_ids(f"{self.name}: {name}", getattr(self, name)))

    def rule(self, config: SettingsT) -> SettingsT:
        return config.replace(target_reward=0.0, alpha=1.0, max_attempts=1, candidates=1, segment_length=self.block)

    @property
    def preferences(self) -> Sequence[str | Sequence[int]]:
        return self.judge_prompt, self.draft_prompt

    def slots(self, config: Settings) -> int:
        """The answer below each of the two prompts, and the block that is being drafted."""
        return 2 * config.max_new_tokens + min(config.segment_length, config.max_new_tokens)

    def passes(self, drawn: int, committed: int) -> tuple[int, int]:
        """It drafts, reads the draft under the other prompt, and catches up."""
        return 3 * drawn, 0

    def check(self, reward: Scorer) -> None:
        super().check(reward)
        if not self.draft_prompt or not self.judge_prompt:
            raise ValueError(
                "method='persona_judge' needs two preferences: StarsConfig(method=PersonaJudge(draft_prompt=..., "
                "judge_prompt=...))"
            )

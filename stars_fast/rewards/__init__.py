"""Scorers: one protocol, one file per kind."""

from stars_fast.rewards.base import Completion, Response, Reward, RewardPrompt
from stars_fast.rewards.callable import CallableReward
from stars_fast.rewards.classifier import ClassifierReward
from stars_fast.rewards.implicit import ImplicitReward
from stars_fast.rewards.judge import JudgeReward
from stars_fast.rewards.process import ProcessReward

__all__ = [
    "CallableReward",
    "ClassifierReward",
    "Completion",
    "ImplicitReward",
    "JudgeReward",
    "ProcessReward",
    "Response",
    "Reward",
    "RewardPrompt",
]

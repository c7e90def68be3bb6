"""Scorers: one protocol, one file per kind."""

from stars_fast.rewards.base import Completion, Response, Reward, RewardPrompt
from stars_fast.rewards.callable import CallableReward
from stars_fast.rewards.classifier import ClassifierReward
from stars_fast.rewards.implicit import ImplicitReward

__all__ = [
    "CallableReward",
    "ClassifierReward",
    "Completion",
    "ImplicitReward",
    "Response",
    "Reward",
    "RewardPrompt",
]

"""Scorers: one protocol, one file per kind."""

from stars_fast.rewards.base import Completion, Response, Reward, RewardPrompt
from stars_fast.rewards.callable import CallableReward
from stars_fast.rewards.classifier import ClassifierReward
from stars_fast.rewards.grounding import GroundingReward, noised
from stars_fast.rewards.implicit import ImplicitReward
from stars_fast.rewards.judge import JudgeReward
from stars_fast.rewards.probe import HiddenStateProbe
from stars_fast.rewards.process import ProcessReward
from stars_fast.rewards.published import ArmoRMReward, InternLM2Reward, ValueHeadReward
from stars_fast.rewards.quality import QualityReward
from stars_fast.rewards.rules import RuleReward
from stars_fast.rewards.weighted import WeightedSum

__all__ = [
    "ArmoRMReward",
    "CallableReward",
    "ClassifierReward",
    "Completion",
    "GroundingReward",
    "HiddenStateProbe",
    "ImplicitReward",
    "InternLM2Reward",
    "JudgeReward",
    "ProcessReward",
    "QualityReward",
    "Response",
    "Reward",
    "RewardPrompt",
    "RuleReward",
    "ValueHeadReward",
    "WeightedSum",
    "noised",
]

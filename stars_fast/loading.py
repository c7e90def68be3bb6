"""Models as users name them: objects, local folders, hub ids."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from stars_fast.rewards import CallableReward, ClassifierReward, Reward
from stars_fast.rewards.classifier import ONE_LABEL


def load_policy(policy: PreTrainedModel | str | os.PathLike[str], tokenizer: Any) -> tuple[PreTrainedModel, Any]:
    """The policy and its tokenizer; a path or hub id is loaded with transformers' Auto classes."""
    if isinstance(policy, (str, os.PathLike)):
        from transformers import AutoModelForCausalLM

        if tokenizer is None:
            tokenizer = _tokenizer_beside(policy)
        policy = AutoModelForCausalLM.from_pretrained(policy, dtype="auto")
    if not hasattr(policy, "config") or not hasattr(policy, "get_output_embeddings"):
        raise TypeError(f"policy is a {type(policy).__name__}: give a transformers causal LM, a path or a hub id")
    if isinstance(tokenizer, (str, os.PathLike)):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    if policy.get_output_embeddings() is None:
        raise TypeError(f"policy is a {type(policy).__name__} without a language-model head")
    return policy, tokenizer


def load_reward(
    reward: Any, tokenizer: Any, reward_tokenizer: Any, tail: str | Sequence[int], policy_ids: int
) -> Reward:
    """A :class:`Reward` from a Reward, a sequence classifier, a path or hub id, or a plain function.

    ``policy_ids`` is how many ids the policy is expected to produce (its tokenizer's, where there is one): a classifier
    that reads them must have an embedding for each. A padded vocabulary's further ids are caught when they are scored.
    """
    if isinstance(reward, type):
        raise TypeError(f"reward is a class: give an instance, {reward.__name__}(...)")
    if isinstance(reward_tokenizer, (str, os.PathLike)):
        from transformers import AutoTokenizer

        reward_tokenizer = AutoTokenizer.from_pretrained(reward_tokenizer)
    if isinstance(reward, (str, os.PathLike)):
        reward, reward_tokenizer = load_classifier(reward, reward_tokenizer)
    if not isinstance(reward, Reward) and hasattr(reward, "config") and hasattr(reward, "base_model_prefix"):
        reward = ClassifierReward(reward, reward_tokenizer, tokenizer, tail)
    if isinstance(reward, Reward):
        reward.check_vocabulary(policy_ids)
        return reward
    if callable(reward):
        return CallableReward(reward, tokenizer)
    raise TypeError(
        f"reward is a {type(reward).__name__}: give a sequence-classification model with one label, "
        "a stars_fast.rewards.Reward, a function, a path or a hub id"
    )


def load_classifier(name: str | os.PathLike[str], tokenizer: Any) -> tuple[PreTrainedModel, Any]:
    """A sequence classifier by path or hub id, and the tokenizer beside it, if there is one."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(name)
    if config.num_labels != 1:
        raise ValueError(f"reward={str(name)!r} has num_labels={config.num_labels}; {ONE_LABEL}")
    if tokenizer is None:
        tokenizer = _tokenizer_beside(name)
    return AutoModelForSequenceClassification.from_pretrained(name, dtype="auto"), tokenizer


def _tokenizer_beside(name: str | os.PathLike[str]) -> Any:
    """The model's own tokenizer. None if there is none: a policy then takes ids, a reward model reads the policy's."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError):
        return None

"""The numeric self-check tells a model that is right on the tree from one that is not."""

import pytest
import torch
from conftest import tiny_policy, tiny_reward

from stars_fast.policy.policy import Policy
from stars_fast.rewards import ClassifierReward
from stars_fast.tree import attention
from stars_fast.tree.check import max_difference, tolerance


def tree_models():
    return {"policy": Policy(tiny_policy(32)), "reward": ClassifierReward(tiny_reward(32)).tree_model}


@pytest.mark.parametrize("role", ["policy", "reward"])
def test_an_exact_model_differs_by_rounding_only(role):
    assert max_difference(tree_models()[role]) < 1e-4 < tolerance(torch.float32)


@pytest.mark.parametrize("role", ["policy", "reward"])
def test_attention_with_a_wrong_scale_is_noticed(role, monkeypatch):
    model = tree_models()[role]
    right = attention.tree_attention
    wrong = lambda *tensors, scale, **rest: right(*tensors, scale=2 * scale, **rest)  # noqa: E731
    monkeypatch.setattr(attention, "tree_attention", wrong)
    assert max_difference(model) > tolerance(torch.float32)


def test_a_model_with_few_positions_is_checked_within_them():
    assert max_difference(Policy(tiny_policy(32, positions=4))) < 1e-4

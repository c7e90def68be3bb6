"""The numeric self-check tells a model that is right on the tree from one that is not."""

import math

import pytest
import torch
from conftest import refused, tiny_policy, tiny_reward
from torch import nn

from stars_fast.policy.policy import Policy
from stars_fast.rewards import ClassifierReward
from stars_fast.tree import attention
from stars_fast.tree.check import absolute_tolerance, max_difference, median_difference


def tree_models():
    return {"policy": Policy(tiny_policy(32)), "reward": ClassifierReward(tiny_reward(32)).tree_model}


@pytest.mark.parametrize("role", ["policy", "reward"])
def test_an_exact_model_differs_by_rounding_only(role):
    assert max_difference(tree_models()[role]) < 1e-4 < absolute_tolerance(torch.float32)


@pytest.mark.parametrize("role", ["policy", "reward"])
def test_attention_with_a_wrong_scale_is_noticed(role, monkeypatch):
    model = tree_models()[role]
    right = attention.tree_attention
    wrong = lambda *tensors, scale, **rest: right(*tensors, scale=2 * scale, **rest)  # noqa: E731
    monkeypatch.setattr(attention, "tree_attention", wrong)
    assert max_difference(model) > absolute_tolerance(torch.float32)


def test_a_model_that_is_off_by_a_few_per_cent_is_refused(monkeypatch):
    """As PaliGemma is, whose own attention sees a prompt in both directions."""
    right = attention.tree_attention
    wrong = lambda *tensors, scale, **rest: right(*tensors, scale=1.1 * scale, **rest)  # noqa: E731
    monkeypatch.setattr(attention, "tree_attention", wrong)
    with refused("policy", "differ from its own by [2-9]%"):
        Policy(tiny_policy(32))


def test_a_model_with_few_positions_is_checked_within_them():
    assert max_difference(Policy(tiny_policy(32, positions=4))) < 1e-4


class MaskedHead(nn.Linear):
    """A head that must not write the upper half of its ids, and whose last rows pad the vocabulary with zeros."""

    mask, zeros = -math.inf, 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = super().forward(hidden) - 40.0
        logits[..., : self.zeros] = 0.0
        used = self.out_features // 2
        if self.mask in (-math.inf, torch.finfo(hidden.dtype).min):
            logits[..., used:] = self.mask
        else:
            logits[..., used:] += self.mask
        return logits


def masking(mask: float, zeros: int = 0, dtype: torch.dtype = torch.float32):
    model = tiny_policy(64, hidden=32)
    model.lm_head.__class__ = MaskedHead
    model.lm_head.mask, model.lm_head.zeros = mask, zeros
    return model.to(dtype)


MASKS = pytest.mark.parametrize("mask", [-math.inf, torch.finfo(torch.float32).min, -1e30, -1e4, -300.0, 0.0], ids=str)


@MASKS
@pytest.mark.parametrize("zeros", [0, 12])
def test_masked_ids_do_not_refuse_a_right_model(mask, zeros):
    assert max_difference(Policy(masking(mask, zeros))) < (1e-2 if mask == -1e4 else 1e-3)
    half = torch.finfo(torch.bfloat16).min if mask < -1e30 else mask
    assert median_difference(Policy(masking(half, zeros, torch.bfloat16))) < 0.1


@MASKS
@pytest.mark.parametrize("zeros", [0, 12])
def test_masked_ids_do_not_hide_a_wrong_model(mask, zeros, monkeypatch):
    right = attention.tree_attention
    wrong = lambda *tensors, scale, **rest: right(*tensors, scale=-3 * scale, **rest)  # noqa: E731
    monkeypatch.setattr(attention, "tree_attention", wrong)
    with refused("policy", "differ from its own by"):
        Policy(masking(mask, zeros))


def test_a_model_that_masks_other_ids_on_the_tree_is_refused():
    model = masking(-math.inf)
    model.lm_head.register_forward_hook(
        lambda head, args, logits: logits.index_fill_(-1, torch.tensor([3 if args[0].shape[1] == 11 else 4]), -math.inf)
    )
    with refused("policy", "mask other ids"):
        Policy(model)

"""Rewards come in the shapes that libraries give them; what is not one number per completion is told by its shape."""

import math

import numpy as np
import pytest
import torch
from conftest import sum_reward
from transformers.modeling_outputs import SequenceClassifierOutput

from stars_fast import StarsConfig, StarsEngine
from stars_fast.rewards.values import as_float, one_each

CONFIG = StarsConfig(segment_length=4, max_new_tokens=8, max_attempts=3, target_reward=2.0, beta=0.5)


def column(completions):
    return torch.tensor(sum_reward(completions))[:, None]


SHAPES = {
    "tensor": lambda completions: column(completions)[:, 0],
    "integers": lambda completions: (column(completions)[:, 0] * 6).round().long(),
    "column": column,
    "bfloat16 column": lambda completions: (column(completions) * 6).round().bfloat16(),
    "array": lambda completions: column(completions)[:, 0].numpy(),
    "array column": lambda completions: column(completions).numpy(),
    "lists of one": lambda completions: column(completions).tolist(),
    "tensors of one": lambda completions: list(column(completions)),
    "array scalars": lambda completions: list(column(completions)[:, 0].numpy()),
    "squeezed": lambda completions: column(completions).squeeze(),
    "squeezed array": lambda completions: column(completions).numpy().squeeze(),
    "scores by name": lambda completions: [{"score": value} for value in sum_reward(completions)],
    "generator": lambda completions: (value for value in sum_reward(completions)),
}


@pytest.mark.parametrize("candidates", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_rewards_of_every_shape_with_one_meaning_guide_alike(policy32, shape, candidates, recwarn):
    whole = shape in ("integers", "bfloat16 column")
    wanted = (lambda completions: [float(round(6 * r)) for r in sum_reward(completions)]) if whole else sum_reward
    want, got = (
        StarsEngine(policy32, function).generate([[5, 6], [7]], CONFIG, seed=0, candidates=candidates)
        for function in (wanted, SHAPES[shape])
    )
    assert got.errors == [None] * 2 and not recwarn.list
    assert got.completions == want.completions and got.rewards == pytest.approx(want.rewards, abs=1e-6)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    "returned, found",
    [
        (lambda n: torch.zeros(n, 2), r"Tensor of shape \[{n}, 2\]"),
        (lambda n: np.zeros((n, 2)), r"ndarray of shape \[{n}, 2\]"),
        (lambda n: {"rewards": [0.0] * n}, r"a dict of rewards \(return the list of numbers in it\)"),
        (lambda n: SequenceClassifierOutput(logits=torch.zeros(n, 1)), r"of logits \(return its logits\[:, 0\]\)"),
        (lambda n: 0.5, "returned 0.5"),
        (lambda n: "0.5", "returned '0.5'"),
        (lambda n: {0.5}, "returned {{0.5}}"),
    ],
    ids=["two labels", "array of two", "dict", "model output", "one number for all", "text", "set"],
)
def test_what_is_not_one_number_per_completion_is_told_for_one_as_for_many(returned, found, count):
    with pytest.raises(ValueError, match=f"one number per completion, {count} here.*" + found.format(n=count)):
        one_each(returned(count), count)


def test_another_number_of_values_is_told():
    for values in ([0.0], torch.zeros(1), np.zeros((1, 1)), torch.zeros(1, 1)):
        with pytest.raises(ValueError, match="1 values for 2 completions"):
            one_each(values, 2)
    with pytest.raises(ValueError, match=r"2 here, and returned a Tensor of shape \[\]"):
        one_each(torch.tensor(0.5), 2)


@pytest.mark.parametrize(
    "value, said",
    [
        ({"label": "NEGATIVE", "score": 0.9}, "returned {'label'.* for one completion; it must be one number"),
        ("0.7 because it is good", "returned '0.7 because it is good' for one completion"),
        ([0.1, 0.2], r"returned \[0.1, 0.2\] for one"),
        (10**400, "returned 10000.* for one"),
        (torch.zeros(2), r"returned a Tensor of shape \[2\] for one"),
        (None, "returned None"),
        (math.inf, "finite"),
        (ValueError("of its own"), "raised ValueError: of its own"),
    ],
    ids=str,
)
def test_a_value_that_is_no_number_fails_its_completion_in_words(value, said):
    number, error = as_float(value)
    assert math.isnan(number)
    with pytest.raises(ValueError, match=said):
        raise ValueError(error)


def test_functions_with_columns_for_some_prompts_may_return_columns_too(policy32):
    def function(completion_ids, answer=None):
        return column(completion_ids)

    engine = StarsEngine(policy32, function)
    assert engine.generate([[5], [6]], CONFIG, seed=0, columns={"answer": [1, 2]}).errors == [None] * 2

"""A warning points at the user's own line, whatever the package is called through."""

import warnings

import pytest
import torch
from conftest import sum_reward

import stars_fast
from stars_fast import StarsConfig, StarsEngine

CONFIG = StarsConfig(method="cards", segment_length=4, target_reward=1.0, max_new_tokens=4)
OVERRULED = "segment_length=4 has no effect"


def by_the_engine(policy):
    StarsEngine(policy, sum_reward).generate([[5]], CONFIG)


def by_the_drop_in(policy):
    stars_fast.generate(policy, torch.tensor([[5]]), reward_model=sum_reward, stars_config=CONFIG)


@pytest.mark.parametrize("call", [by_the_engine, by_the_drop_in])
def test_a_warning_points_at_the_users_line(policy32, call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(policy32)
    (overruled,) = {(w.filename, w.lineno) for w in caught if OVERRULED in str(w.message)}
    assert overruled == (__file__, call.__code__.co_firstlineno + 1)

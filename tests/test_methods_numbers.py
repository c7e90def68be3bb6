"""Numbers that users set: any library's are taken, and what is none is refused by name."""

import json
import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import sum_reward

from stars_fast import StarsConfig, StarsEngine
from stars_fast.methods import BestOfN, ParticleFilter
from stars_fast.methods.numbers import integer, real, shown


@pytest.mark.parametrize("four", [4, np.int64(4), np.array(4), torch.tensor(4)], ids=lambda four: type(four).__name__)
def test_any_librarys_integer_is_an_int(policy32, four):
    engine = StarsEngine(policy32, sum_reward, max_rows=four, kv_cache_tokens=four)
    for number in (integer("n", four, 4), BestOfN(n=four).n, StarsConfig(max_attempts=four).max_attempts):
        assert type(number) is int and number == 4
    assert type(engine.max_rows) is int and type(engine.kv_cache_tokens) is int


@pytest.mark.parametrize("half", [0.5, np.float32(0.5), torch.tensor(0.5)], ids=lambda half: type(half).__name__)
def test_any_librarys_number_is_a_float(half):
    for number in (real("x", half), ParticleFilter(temperature=half).temperature, StarsConfig(alpha=half).alpha):
        assert type(number) is float and number == 0.5
    assert json.dumps(ParticleFilter(temperature=half).to_dict())


@pytest.mark.parametrize("value", [True, np.bool_(True), 2.0, "2", None, torch.tensor([2])], ids=repr)
def test_what_is_no_integer_is_named(value):
    with pytest.raises(TypeError, match=r"best_of_n: n=.* must be an integer of at least 1"):
        BestOfN(n=value)


@pytest.mark.parametrize("value", [True, "a", None, 1j], ids=repr)
def test_what_is_no_number_is_named(value):
    with pytest.raises(TypeError, match=r"x=.* must be a number or so"):
        real("x", value, hint=" or so")


def test_values_are_shown_on_one_line_and_cut_off():
    for value in (
        torch.zeros(3, 3),
        np.zeros((9, 9)),
        "a\nb" * 99,
        list(range(10**6)),
        10**5000,
        {"a": {"b": "c" * 999}},
    ):
        assert "\n" not in shown(value) and len(shown(value)) < 200


@pytest.mark.parametrize("value", [Fraction(1, 2), Decimal("0.5")], ids=repr)
def test_fractions_and_decimals_are_numbers_and_what_a_float_cannot_hold_is_none(value):
    assert real("x", value, 0.0, 1.0) == 0.5
    for beyond in (10**400, Fraction(10**400), Decimal("sNaN")):
        with pytest.raises(ValueError, match=r"x=.* must be a number that a float can hold"):
            real("x", beyond)


@pytest.mark.parametrize(
    "value, limits, message",
    [
        (0.0, {"low": 0.0, "high": 1.0, "open_below": True}, r"\(0, 1\]"),
        (math.inf, {"low": 0.0, "open_above": True}, r"\[0, inf\)"),
        (math.nan, {"low": 0.0}, r"\[0, inf\]"),
        (math.nan, {}, "not be NaN"),
    ],
)
def test_a_number_outside_its_interval_is_told_the_interval(value, limits, message):
    with pytest.raises(ValueError, match=f"x={value} must .*{message}"):
        real("x", value, **limits)

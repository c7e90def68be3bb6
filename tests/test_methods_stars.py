"""The rule of STARS: thresholds, and the target for an acceptance."""

import math

import pytest

from stars_fast.methods.stars import target_for


def test_the_target_for_an_acceptance_is_found_or_the_nearer_end():
    def expected(target):
        return 1 / (1 + math.exp(target))

    assert target_for(0.3, -5.0, 5.0, expected) == pytest.approx(math.log(7 / 3))
    assert target_for(0.999, -5.0, 5.0, expected) == pytest.approx(-5)
    assert target_for(0.001, -5.0, 5.0, expected) == pytest.approx(5)

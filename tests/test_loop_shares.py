"""What one row more is worth, and who gets it."""

import itertools

import numpy as np
import pytest

from stars_fast.loop.shares import row_values, share_evenly, share_rows


def test_rows_go_where_they_save_most():
    """Against every other way of sharing rows, a bucket's padding included."""
    values = [[0.9, 0.4, 0.1], [2.0, 1.9, 1.8, 0.2], [], [0.5, 0.5, 0.5]]
    for costs in (0.3 * np.arange(11.0), 0.7 * np.arange(11.0), np.array([0.0, 3, 3, 3, 3.1, 3.1, 7, 7, 7, 7, 7])):
        shares = share_rows(values, costs)
        assert all(1 <= m <= 1 + len(value) for m, value in zip(shares, values, strict=True))

        def saved(shares, costs=costs):
            gained = sum(sum(value[: m - 1]) for m, value in zip(shares, values, strict=True))
            return gained - costs[sum(shares) - len(values)]

        others = itertools.product(*(range(1, 2 + len(value)) for value in values))
        assert saved(shares) == pytest.approx(max(saved(m) for m in others if sum(m) < len(values) + len(costs)))


def test_a_bucket_is_filled_where_its_padding_costs_the_same():
    values = [[0.9, 0.4, 0.1]] * 4  # two further rows pay at 0.5 a row, and no more
    assert sum(share_rows(values, 0.5 * np.arange(13))) == 4 + 4
    steps = np.array([0.0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6])
    assert sum(share_rows(values, steps)) == 4 + 4
    assert sum(share_rows(values, steps / 1.5)) == 4 + 8


def expected_cost(acceptance, shares, fixed):
    """Of a segment that draws ``shares[0]`` candidates, then ``shares[1]`` ..., in costs of a row."""
    total, still = 0.0, 1.0
    for m in shares:
        total += still * (fixed + m)
        still *= (1 - acceptance) ** m
    return total


def compositions(n):
    return [[]] if n == 0 else [[m, *rest] for m in range(1, n + 1) for rest in compositions(n - m)]


@pytest.mark.parametrize("acceptance", [0.05, 0.3, 0.8])
def test_following_the_values_costs_least_of_all_ways_to_draw_a_segment(acceptance):
    for fixed in (0.5, 4.0, 30.0):
        left, shares = 9, []
        while left:
            m = share_rows([row_values(acceptance, left, fixed)], np.arange(left) * 1.0)[0]
            shares.append(m)
            left -= m
        best = min(expected_cost(acceptance, other, fixed) for other in compositions(9))
        assert expected_cost(acceptance, shares, fixed) <= 1.02 * best  # tables are shared by what differs by a tenth


def test_values_never_grow_and_are_larger_for_who_is_seldom_accepted():
    for acceptance, left, fixed in itertools.product([0.02, 0.3, 0.98], [1, 2, 20], [0.1, 300.0]):
        values = row_values(acceptance, left, fixed)
        assert len(values) == left - 1 and all(a >= b for a, b in itertools.pairwise(values))
    assert sum(row_values(0.05, 20, 10.0)) > sum(row_values(0.5, 20, 10.0))


@pytest.mark.parametrize("acceptance", [0.02, 0.3, 0.98])
def test_attempts_that_are_never_used_cost_no_time_and_change_no_share(acceptance):
    """Tables end where candidates are hardly ever reached, and are shared from there on."""
    values = row_values(acceptance, 10**9, 4.0)
    assert len(values) < 500 and values == row_values(acceptance, 5_000, 4.0)
    costs = np.arange(256) * 1.0
    assert share_rows([values], costs) == share_rows([row_values(acceptance, 300, 4.0)], costs)
    assert share_evenly([10**9] * 3, 8) == [3, 3, 2]


def test_a_fixed_number_of_candidates_is_shared_out_evenly():
    assert share_evenly([4, 4, 4], 12) == [4, 4, 4]
    assert share_evenly([4, 4, 4], 9) == [3, 3, 3]
    assert sorted(share_evenly([4, 4, 4], 8)) == [2, 3, 3]
    assert share_evenly([4, 1, 4], 9) == [4, 1, 4]
    assert share_evenly([2**31 - 1, 1], 9) == [8, 1]  # by the rows there are, not by the attempts that are allowed


def test_everybody_has_a_row_even_where_there_are_too_few():
    assert share_evenly([5, 5, 5], 2) == [1, 1, 1]

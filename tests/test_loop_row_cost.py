"""What a row costs is found from noisy heartbeats, stalls and prompts beside them."""

import numpy as np
import pytest

from stars_fast.loop.row_cost import PRIOR_RATIO, PRIOR_RATIO_OF_GPUS, HeartbeatCost, Line, Timing


def learned(fixed, slope, token, scatter=0.05, stalls=0.05, rows=(40, 90), seed=0, beats=150):
    rng, line = np.random.default_rng(seed), Line()
    for _ in range(beats):
        n, encoded = int(rng.integers(*rows)), 12 * int(rng.integers(0, 5))
        seconds = (fixed + slope * n + token * encoded) * np.exp(scatter * rng.standard_normal())
        line.observe(n, encoded, seconds * (20 if rng.random() < stalls else 1))
    return line


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fixed, slope, token", [(1e-3, 6e-5, 6e-5), (1.0, 0.3, 0.1), (0.1, 0.1, 0.1)])
def test_costs_are_recovered_from_heartbeats_that_scatter_and_stall(fixed, slope, token, seed):
    line = learned(fixed, slope, token, seed=seed)
    mean = fixed + 65 * slope
    assert line.fixed + 65 * line.slope == pytest.approx(mean, rel=0.06)
    assert 65 * (line.slope - slope) == pytest.approx(0, abs=0.15 * mean)
    assert line.token == pytest.approx(token, rel=0.35)


@pytest.mark.parametrize("seed", range(3))
def test_prompts_are_not_starved_where_a_pass_is_dear_and_its_tokens_are_cheap(seed):
    """As on a GPU: 60 ms to launch a pass, 0.02 ms a token. Laid on the tokens alone, smaller pieces look dearer yet.

    0.115 s of decoding, less the launch, are worth 2,760 tokens: 14 heartbeats for 200 prompts.
    """
    rng, cost, running, waiting = np.random.default_rng(seed), HeartbeatCost(PRIOR_RATIO_OF_GPUS), 40, 200 * 192

    def heartbeat(encoded):
        seconds = 16 * (6e-3 + 3e-5 * running) + (60e-3 + 2e-5 * encoded if encoded else 0)
        seconds *= np.exp(0.02 * rng.standard_normal())
        cost.observe(Timing(running, 16, encoded, 0, seconds, 0.05, running), running)

    for beat in range(64):  # one prompt at a time before
        heartbeat(192 + int(rng.integers(0, 100)) if beat % 4 else 0)
    beats = 0
    while waiting > 0:
        encoded = min(int(cost.encoding_worth(running, 16)), waiting)
        heartbeat(encoded)
        waiting, beats = waiting - encoded, beats + 1
    assert beats <= 20


def test_a_row_that_costs_next_to_nothing_is_found_out():
    line = learned(1.0, 0.002, 0.004, scatter=0.01)
    assert line.slope < 0.1 * PRIOR_RATIO * line.fixed


def test_before_anything_was_measured_and_where_rows_never_vary_the_prior_decides():
    assert Line().slope / Line().fixed == PRIOR_RATIO
    line = Line()
    for _ in range(50):
        line.observe(10, 0, 0.032)
    assert line.slope / line.fixed == pytest.approx(PRIOR_RATIO, rel=0.01)
    assert line.fixed + 10 * line.slope == pytest.approx(0.032, rel=0.01)
    assert line.token == pytest.approx(line.slope, rel=0.01)
    assert line.launch == pytest.approx(line.fixed, rel=0.01)
    assert line.unvaried() and not Line().unvaried()
    line.observe(11, 0, 0.033)
    assert not line.unvaried()


def test_costs_are_never_negative():
    line = Line()
    for n in range(20):
        line.observe(n + 1, n, 1.0 - 0.04 * n)  # the more rows, the faster
    assert min(line.fixed, line.slope, line.launch, line.token) > 0


def test_a_machine_that_changes_is_learned_anew():
    line = learned(1.0, 0.06, 0.06)
    rng = np.random.default_rng(1)
    for _ in range(80):
        n = int(rng.integers(40, 90))
        line.observe(n, 0, 3 * (1 + 0.06 * n))
    assert line.fixed + 65 * line.slope == pytest.approx(3 * (1 + 0.06 * 65), rel=0.05)


def test_padding_is_paid_by_decode_steps_and_not_by_scoring():
    cost = HeartbeatCost()
    for rows in [*range(33, 97)] * 2:
        padded = 64 if rows <= 64 else 96
        cost.observe(Timing(rows, 16, 0, 0, 16 * (5 + 0.01 * padded), 16 * 0.02 * rows, rows), padded)
    same_bucket = cost.per_token(np.array([96, 96]), np.array([70, 90]))
    assert same_bucket[1] - same_bucket[0] == pytest.approx(20 * 0.02, rel=0.1)
    assert cost.encoding_worth(10, 16) > 0

"""The arithmetic of docs/scale.md: prices, parts of a model on several devices, and a day in small."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks import scale
from benchmarks.roofline import GPUS, Workload

WORK = Workload(64, in_order=True)


def test_a_million_tokens_cost_what_their_seconds_do():
    assert scale.dollars(3.6, 1000.0) == pytest.approx(1.0)
    assert scale.dollars(3.6, 1000.0, gpus=4) == pytest.approx(4.0)


def test_heartbeats_that_were_measured_took_longer_than_expected():
    assert 1.0 < scale.slowdown() < 2.0


@pytest.mark.parametrize("ways", [2, 4, 8])
def test_parts_of_a_model_add_up(ways):
    whole, _ = scale.models("Llama-3.1-8B + 8B")
    part = scale.sharded(whole, ways)
    for name in ("parameters", "active", "kv_bytes_per_token"):
        assert ways * getattr(part, name) == pytest.approx(getattr(whole, name), rel=1e-6)


def test_a_70b_policy_needs_a_second_device_and_an_8b_pair_none():
    fits = {
        (pair, ways, apart): scale.split(pair, ways, apart, GPUS["h200"], WORK).fits
        for pair in ("Llama-3.1-8B + 8B", "Llama-3.1-70B + 8B")
        for ways, apart in ((1, False), (1, True), (2, False))
    }
    assert [key[0] for key, fit in fits.items() if not fit] == ["Llama-3.1-70B + 8B"] * 2


def test_on_two_devices_one_waits_for_the_other():
    together, apart = (scale.split("Llama-3.1-8B + 8B", 1, flag, GPUS["h200"], WORK) for flag in (False, True))
    assert apart.rate == together.rate and apart.gpus == 2


def test_more_devices_are_faster_and_make_less_of_each():
    splits = [scale.split("Llama-3.1-8B + 8B", ways, False, GPUS["h200"], WORK) for ways in (1, 2, 4)]
    assert splits[0].rate < splits[1].rate < splits[2].rate
    assert splits[0].rate > splits[1].rate / 2 > splits[2].rate / 4


def test_a_small_device_has_a_smaller_batch_or_none():
    small = replace(GPUS["h200"], memory=29.5e9)
    assert scale._largest_that_fits("Llama-2-7B + 7B", small, 0.3) is None
    assert scale._largest_that_fits("Llama-2-7B + 7B", replace(small, memory=36e9), 0.3).committed_tokens < 16 * 16


def test_a_day_has_the_load_and_the_lengths_it_says(monkeypatch):
    monkeypatch.setattr(scale, "GROUPS", 50)
    day = scale.a_day(5_000, 10, 5.0)
    assert day.arrival[-1] == pytest.approx(100.0, rel=0.02) and (np.diff(day.arrival) >= 0).all()
    assert np.median(day.answer) == pytest.approx(41, rel=0.1) and day.group.max() < 50
    assert (day.shared * 2 <= day.prompt).all()


def test_prices_are_taken_from_the_command(capsys):
    scale.main(["--only", "prices", "--price", "h200=7"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "| h200 |" in line]
    assert lines and all("| 7.00 |" in line for line in lines)
    assert sum("measured" in line for line in lines) == 4

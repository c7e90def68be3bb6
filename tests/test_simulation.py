"""The simulation drives the engine's own scheduler, and adaptive candidates keep up with the best fixed number."""

import json
import math

import numpy as np
import pytest
from conftest import sum_reward, tiny_policy
from typer.testing import CliRunner

from benchmarks.roofline import GPUS, ModelCost, Workload, config_named, heartbeat, renewal
from benchmarks.simulation.__main__ import app
from benchmarks.simulation.acceptance import rates, recorded, synthetic
from benchmarks.simulation.arrivals import SHAPES, Surge, arrival_times, lengths
from benchmarks.simulation.fleet import Replica, Requests, serve
from benchmarks.simulation.machine import LinearMachine, RooflineMachine
from benchmarks.simulation.run import Work, simulate
from stars_fast import StarsConfig, StarsEngine
from stars_fast.loop.scheduler import Scheduler
from stars_fast.loop.stream import Progress
from stars_fast.methods import Stars
from stars_fast.report.files import to_line
from stars_fast.rows.reading import read_rows
from stars_fast.rows.responses import finished_rows

SMALL = LinearMachine(10e-3, 0.3e-3)  # a row costs 3 % of what is fixed


def work(acceptance, requests=120, batch=16, **fields):
    return Work(synthetic(rates(acceptance, requests, 1), 128, 16, 2), batch, **fields)


def best_fixed(tasks):
    """Accepted tokens per second with the best fixed number of candidates, near enough."""
    return max(simulate(tasks, SMALL, candidates).tokens_per_second for candidates in (1, 2, 3, 5, 8, 12, 20))


@pytest.fixture(scope="module")
def h200():
    import torch

    costs = [ModelCost.from_config(config_named("llama-2-7b"), role, torch.bfloat16) for role in ("policy", "reward")]
    return RooflineMachine(*costs, Workload(batch=64), GPUS["h200"])


# What happens is what must


@pytest.mark.parametrize("acceptance, candidates", [(0.3, 1), (0.1, 6), (0.05, 20)])
def test_a_fixed_number_of_candidates_costs_what_renewal_theory_says(acceptance, candidates):
    one = simulate(work(str(acceptance), 400, max_rows=320), SMALL, candidates)
    cycle = renewal(acceptance, candidates, 20)
    assert one.drawn / one.committed == pytest.approx(cycle.candidates, rel=0.05)
    assert one.committed == 400 * 128
    assert one.rows * one.heartbeats == pytest.approx(400 * 8 * cycle.candidates, rel=0.05)
    assert one.waste == pytest.approx(cycle.candidates - 1, rel=0.07)


def test_whatever_the_schedule_the_same_attempts_win():
    tasks = work("beta(1,3)", 60)
    outcomes = [simulate(tasks, SMALL, schedule) for schedule in ("auto", "oracle", "barrier", 1, 7)]
    assert len({outcome.committed for outcome in outcomes}) == 1
    assert min(outcome.drawn for outcome in outcomes) == outcomes[3].drawn == outcomes[2].drawn


def test_one_at_a_time_without_a_backlog_takes_the_time_of_the_unluckiest():
    tasks = work("0.2", 16)
    slowest = max(sum(min(winner, 20) for winner in course.winners) for course in tasks.courses)
    assert simulate(tasks, SMALL, 1).heartbeats == slowest


def test_with_a_barrier_each_segment_takes_the_time_of_its_unluckiest():
    tasks = work("0.2", 16)
    winners = np.array([course.winners for course in tasks.courses]).clip(max=20)
    assert simulate(tasks, SMALL, "barrier").heartbeats == winners.max(0).sum()


def test_a_gpu_on_paper_agrees_with_the_roofline(h200):
    """Without prefill, and away from the edges of buckets: 64 requests with two candidates each fill 128 rows."""
    beat = heartbeat(h200.policy, h200.reward, h200.workload, 2, h200.gpu)
    expected = sum(stage.achievable_s for stage in beat.stages if stage.name != "refill")
    assert sum(h200.heartbeat(128, 64, 16, 0, [(128, 64)])) == pytest.approx(expected, rel=0.03)


def test_in_order_the_candidates_behind_an_accepted_one_cost_no_scoring(h200):
    at_once, in_order = (
        simulate(work("0.5", 300, batch=64, max_rows=320, in_order=flag), h200, 3) for flag in (False, True)
    )
    assert (at_once.committed, at_once.drawn) == (in_order.committed, in_order.drawn)
    paper = [
        heartbeat(h200.policy, h200.reward, Workload(64, acceptance=0.5, in_order=flag), 3, h200.gpu)
        for flag in (False, True)
    ]
    expected = paper[0].total.achievable_s / paper[1].total.achievable_s
    assert 1.02 < at_once.seconds / in_order.seconds == pytest.approx(expected, rel=0.03)


# Adaptive candidates


@pytest.mark.parametrize("acceptance", ["0.05", "0.15", "0.3", "0.6", "beta(0.6,2.4)", "beta(1.5,3.5)"])
@pytest.mark.parametrize("batch, requests", [(1, 25), (16, 150)])
def test_adaptive_candidates_keep_up_with_the_best_fixed_number(acceptance, batch, requests):
    """Whatever is accepted: no fixed number does in all cases. Learning and guessing cost 8 % at most."""
    tasks = work(acceptance, requests, batch)
    assert simulate(tasks, SMALL).tokens_per_second > 0.92 * best_fixed(tasks)


def test_adaptive_candidates_beat_every_fixed_number_where_requests_differ():
    tasks = work("beta(0.6,2.4)", 250)
    assert simulate(tasks, SMALL).tokens_per_second > 1.02 * best_fixed(tasks)


def test_nobody_waits_for_the_slowest():
    tasks = work("0.3", 150, batch=64, max_rows=64)
    assert simulate(tasks, SMALL).tokens_per_second > 2 * simulate(tasks, SMALL, "barrier").tokens_per_second


def test_the_number_of_rows_follows_what_a_row_costs():
    """From the same prior, which takes a row for 6 % of what is fixed: what was measured decides."""
    tasks = work("0.15", 150, max_rows=320)
    dear, expected, cheap = (simulate(tasks, LinearMachine(10e-3, ms / 1e3)).rows for ms in (5.0, 0.6, 0.02))
    assert 2 * dear < expected < cheap / 2


def test_it_is_the_engines_scheduler_that_decides(monkeypatch):
    seen, candidates = [], Scheduler.candidates
    monkeypatch.setattr(Scheduler, "candidates", lambda *args: seen.append(candidates(*args)) or seen[-1])
    outcome = simulate(work("0.3", 30), SMALL)
    assert len(seen) == outcome.heartbeats and sum(map(sum, seen)) * 16 == outcome.drawn


# A fleet


def day(requests, replicas, rate, groups=200, shared=0.5, shape=SHAPES["conversation"], **options):
    rng = np.random.default_rng(1)
    prompt, answer = (lengths(quantiles, requests, rng) for quantiles in (shape.prompt, shape.answer))
    return Requests(
        arrival_times(requests, requests / rate / replicas, shape, **options),
        prompt,
        (prompt * shared).astype(int),
        answer,
        np.full(requests, 0.3),
        rng.integers(0, groups, requests),
    )


SHAPE = SHAPES["conversation"]
PLAIN = Replica(4, 50, np.array([0, 4, 4, 4, 4]), np.array([0, 0.1, 0.1, 0.1, 0.1]), 1e-5, 16, 20)


def test_requests_come_as_the_trace_has_them():
    """Hours, gaps and lengths: what was published of it is what is drawn."""
    times = arrival_times(200_000, 86_400.0, SHAPE)
    hourly = np.histogram(times, 24, (0, 86_400))[0]
    assert hourly.max() / hourly.min() == pytest.approx(SHAPE.peak_to_trough, rel=0.1) and hourly.argmax() in (14, 15)
    gaps = np.diff(times)
    assert np.median(gaps) / gaps.mean() == pytest.approx(1.37 / 15.33, rel=0.15)
    drawn = lengths(SHAPE.answer, 200_000, np.random.default_rng(0))
    assert np.quantile(drawn, [0.5, 0.9, 0.95, 0.99]) == pytest.approx([41, 342, 455, 694], rel=0.03)


def test_merged_streams_are_less_bursty():
    one, many = (np.diff(arrival_times(20_000, 100.0, SHAPE, streams)) for streams in (1, 50))
    assert one.std() / one.mean() > 2 > 1.6 > many.std() / many.mean()


@pytest.mark.parametrize("acceptance, batch", [("0.3", 64), ("beta(1.5,3.5)", 16)])
def test_one_replica_of_a_fleet_does_what_the_engines_scheduler_does(h200, acceptance, batch):
    """All requests at once and no prompts: 10 % in accepted tokens a second."""
    drawn = rates(acceptance, 8 * batch, 1)
    paper = Workload(batch, acceptance=float(drawn.mean()), in_order=True)
    replica = Replica.modelled(h200.policy, h200.reward, h200.gpu, paper, batch, 0.0)
    none = np.zeros(len(drawn), int)
    served = serve(Requests(none.astype(float), none, none, none + 128, drawn, none), replica, 1, "random")
    machine = RooflineMachine(h200.policy, h200.reward, paper, h200.gpu)
    machine.prefill = lambda cost, prompts: 0.0
    one = simulate(Work(synthetic(drawn, 128, 16, 2), batch, max_rows=512, in_order=True), machine)
    assert served.committed / served.seconds == pytest.approx(one.tokens_per_second, rel=0.1)


@pytest.mark.parametrize("routing", ["random", "two", "prefix"])
def test_every_request_is_answered_once_and_in_its_time(routing):
    requests = day(800, 10, 2.0)
    served = serve(requests, PLAIN, 10, routing)
    assert served.committed == requests.answer.sum() and np.isfinite(served.whole).all()
    segments = np.ceil(requests.answer / 16)
    assert (served.first > 0.1 - 0.05).all() and (served.whole > 0.1 * segments - 0.05).all()
    assert (served.first <= served.whole).all()


def test_a_fixed_number_of_candidates_draws_what_renewal_theory_says():
    requests = day(1_000, 20, 2.0, shared=0.0)
    served = serve(requests, PLAIN, 20, "two")
    assert served.drawn / served.committed == pytest.approx(renewal(0.3, 4, 20).candidates, rel=0.07)


def test_beginnings_are_found_where_requests_are_sent_by_them():
    """Fifty kept of two hundred: a quarter by chance, nearly all where each has a home."""
    hits = {routing: serve(day(4_000, 20, 2.5), PLAIN, 20, routing).hits for routing in ("random", "prefix")}
    assert hits["random"] == pytest.approx(0.25, abs=0.08) and hits["prefix"] > 0.7


def test_a_surge_makes_requests_wait():
    calm, surge = (
        np.quantile(serve(day(2_000, 20, 2.0, surge=one), PLAIN, 20, "two").first, 0.99)
        for one in (Surge(), Surge(12, 6.0, 0.04))
    )
    assert surge > 2 * calm


def test_a_replica_that_does_not_fit_is_refused(h200):
    with pytest.raises(ValueError, match="seats=900: the memory of h200"):
        Replica.modelled(h200.policy, h200.reward, h200.gpu, Workload(context=2000), 900, 0.0)
    with pytest.raises(ValueError, match="routing='nearest'"):
        serve(day(10, 2, 1.0), PLAIN, 2, "nearest")


# What is put in


def test_recorded_rows_are_replayed_as_they_were(tmp_path):
    segments = [
        {"tokens": 16, "attempts": 3, "accepted": True},
        {"tokens": 16, "attempts": 20, "accepted": False},
        {"tokens": 5, "attempts": 1, "accepted": True},
    ]
    rows = [json.dumps({"segments": segments}), json.dumps({"segments": []})]
    (course,) = recorded(rows, max_attempts=20)
    assert course.tokens == [16, 16, 5] and course.winners == [3, 21, 1]
    assert course.acceptance == pytest.approx(2.5 / 25)
    one = simulate(Work([course], batch=1), SMALL, 1)
    assert one.heartbeats == 24 and one.committed == 37 and one.drawn == 3 * 16 + 20 * 16 + 5


@pytest.mark.parametrize("acceptance", ["0", "1.2", "nan", "beta(0,1)", "beta(1)", "half", ""])
def test_an_acceptance_is_a_probability_or_a_distribution(acceptance):
    with pytest.raises(ValueError, match="acceptance="):
        rates(acceptance, 3, 0)


def test_rates_are_drawn_per_request_and_the_same_again():
    drawn = rates("Beta(2, 5)", 4000, 3)
    assert drawn.mean() == pytest.approx(2 / 7, abs=0.01) and (drawn == rates("beta(2,5)", 4000, 3)).all()
    assert set(rates("0.25", 3, 0)) == {0.25}


@pytest.mark.parametrize("lines", [["{}"], ["no"], ['{"segments": 3}'], []])
def test_files_that_hold_no_recorded_rows_are_refused(lines):
    with pytest.raises(ValueError, match="row"):
        recorded(lines, 20)


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="fixed=0"):
        LinearMachine(0, 1)
    with pytest.raises(ValueError, match=r"batch=300.*max_rows=256"):
        work("0.3", 2, batch=300)
    with pytest.raises(ValueError, match="schedule='fast'"):
        simulate(work("0.3", 2), SMALL, "fast")
    assert math.isfinite(simulate(work("0.3", 2), SMALL).tokens_per_second)


# The command

COMMAND = ("--requests", "60", "--batch", "4", "--fixed", "1,4")


def invoke(*arguments):
    return CliRunner().invoke(app, [*COMMAND, *map(str, arguments)])


def test_the_command_compares_schedules_on_a_gpu_on_paper():
    result = invoke("--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    schedules = {one["name"]: one for one in report["schedules"]}
    assert list(schedules) == ["auto", "oracle", "barrier", "1", "4"]
    assert all(one["committed"] == 60 * 128 for one in schedules.values())
    assert schedules["auto"]["tokens_per_second"] > 1.2 * schedules["1"]["tokens_per_second"]
    assert schedules["1"]["tokens_per_second"] > schedules["barrier"]["tokens_per_second"]
    assert report["machine"]["gpu"] == "h200"


def test_the_command_replays_what_generate_wrote(tmp_path):
    engine = StarsEngine(tiny_policy(32), sum_reward)
    config = StarsConfig(max_new_tokens=14, segment_length=4, max_attempts=6, beta=0.3)
    rows = read_rows(['{"prompt_ids": [3, 4]}', '{"prompt_ids": [5]}', '{"prompt_ids": [7, 8, 9]}'], 0)
    records = [record for done in finished_rows(engine, rows, config, 8, Progress(Stars())) for record in done]
    path = tmp_path / "out.jsonl"
    path.write_text("".join(map(to_line, records)))
    costs = ("--fixed-cost", "10", "--row-cost", "0.3", "--max-attempts", "6", "--segment", "4")
    result = invoke("--acceptance", path, *costs)
    assert result.exit_code == 0, result.stderr
    assert "3 requests" in result.stdout and "barrier" in result.stdout
    report = json.loads(invoke("--acceptance", path, *costs, "--json").stdout)
    assert report["schedules"][0]["committed"] == sum(record["tokens"] for record in records)


@pytest.mark.parametrize(
    "options, named",
    [
        (("--acceptance", "2"), "--acceptance 2: a probability"),
        (("--max-attempts", "0"), "--max-attempts 0"),
        (("--fixed-cost", "3"), "row_cost=None"),
        (("--fixed", "1,x"), "fixed='1,x'"),
        (("--batch", "0"), "batch=0"),
        (("--gpu", "h900"), "h900"),
    ],
)
def test_the_command_names_what_it_cannot_use(options, named):
    result = invoke(*options)
    assert result.exit_code == 2 and named in result.stderr

"""``stars-fast bench``: what it compares is run, ratios are of the same rounds, and plots are drawn from the record."""

import itertools
import json
import math
import random
import sys
from dataclasses import replace
from statistics import fmean

import pytest
import torch
from conftest import tiny_policy, tiny_reward
from typer.testing import CliRunner

from stars_fast import StarsEngine
from stars_fast.bench import plots, record, sweeps
from stars_fast.bench.contestants import BESIDE, BEST, ENGINE, GENERATE, GRAPHED, PLAIN, STRONG, Outcome, Point
from stars_fast.bench.equal_reward import expected_best, smallest_n
from stars_fast.bench.measure import Run, measure, summary
from stars_fast.bench.models import Pair, counting, random_pair
from stars_fast.bench.workload import Pilots, Workload
from stars_fast.cli import app
from stars_fast.cli import bench as cli_bench

LOAD = Workload(batch=2, prompt_length=4, max_new_tokens=8, segment_length=4, acceptance=0.3)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pair():
    return Pair("tiny", tiny_policy(32), tiny_reward(32, scale=3.0), openings=[[1, 2], [3]])


@pytest.fixture(scope="module")
def found(pair):
    return record.run(pair, record.side_by_side([LOAD]), rounds=2)


def invoke(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def test_every_contestant_runs_and_is_compared(found):
    assert json.loads(json.dumps(found)) == json.loads(json.dumps(found, default=str))
    assert found["models"] == "tiny" and found["dtype"] == "float32" and found["rounds"] == 2
    assert min(found["yardsticks"].values()) > 0
    (point,) = found["points"]
    assert list(point["contestants"]) == list(sweeps.SIDE_BY_SIDE) == list(BESIDE)
    for name, one in point["contestants"].items():
        ratio, speed = one["ratio"], one["tokens_per_second"]
        assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"], name
        assert 0 < speed["min"] <= speed["median"] <= speed["max"], name
        assert one["weight_bytes_per_second"] > 0 and one["operations_per_second"] > 0, name
        chosen_by_segment = name not in (BEST, GENERATE)
        assert (one["attempts_per_segment"] is not None) == chosen_by_segment, name
        assert (one["mean_reward"] is None) == (name == GENERATE), name
    assert point["contestants"][ENGINE]["ratio"]["median"] == 1
    assert point["equal_reward"]["n"] >= 1
    assert len(point["target_reward"]) == LOAD.batch


def test_ratios_are_medians_of_the_same_rounds():
    def runs(seconds, attempts):
        return [Run(s, Outcome(100, 2, 10, attempts, 1.0), bytes=6, operations=12) for s in seconds]

    told = summary({ENGINE: runs([1, 2, 4], 30), STRONG: runs([4, 4, 12], 15)})
    assert told[STRONG]["ratio"] == {
        "median": 3, "min": 2, "max": 4, "all_rounds": pytest.approx(20 / 7), "per_attempt": pytest.approx(40 / 7)
    }  # fmt: skip
    assert told[STRONG]["tokens_per_second"] == {"median": 25, "min": 100 / 12, "max": 25, "all_rounds": 15}
    assert told[ENGINE]["attempts_per_segment"] == 3
    assert told[ENGINE]["weight_bytes_per_second"] == pytest.approx(18 / 7)
    assert told[ENGINE]["operations_per_second"] == pytest.approx(36 / 7)


def test_contestants_alternate_and_the_first_runs_do_not_count(pair):
    order = []

    def contestant(name):
        return lambda seed: order.append((seed, name)) or Outcome(1, 1, 1, 1, 0.0)

    two = [Point(LOAD, LOAD.config(), {name: contestant(i + name) for name in (ENGINE, PLAIN)}) for i in "ab"]
    done = []
    runs = measure(pair, two, rounds=2, done=lambda: done.append(None))
    assert order == [
        *((0, i + name) for i in "ab" for name in (ENGINE, PLAIN)),
        *((1, i + name) for i in "ab" for name in (ENGINE, PLAIN)),
        *((2, i + name) for i in "ab" for name in (PLAIN, ENGINE)),
    ]
    assert [{name: len(own) for name, own in one.items()} for one in runs] == [{ENGINE: 2, PLAIN: 2}] * 2
    assert len(done) == len(order) == 12


def test_progress_knows_how_much_there_is(pair, monkeypatch):
    monkeypatch.setitem(sweeps.SWEEPS, "acceptance", sweeps.SWEEPS["acceptance"]._replace(values=(0.3, 0.5)))
    done, series = [], record.swept(LOAD, ["acceptance"])
    record.run(pair, series, rounds=1, done=lambda: done.append(None))
    assert len(done) == record.steps(series, rounds=1)


@pytest.mark.parametrize("acceptance", [1 / 6, 0.5])
def test_targets_make_the_acceptance_what_was_asked_for(pair, acceptance):
    engine = StarsEngine(pair.policy, pair.reward)
    load = Workload(batch=4, prompt_length=4, max_new_tokens=8, segment_length=4, acceptance=acceptance)
    config = Pilots(pair, engine).config(load)
    out = engine.generate(pair.prompts(4, 4), config, seed=1, num_return_sequences=60, max_attempts=1)
    segments = [segment for row in out.segments for segment in row]
    assert fmean(segment.accepted for segment in segments) == pytest.approx(acceptance, abs=0.1)


def test_the_expected_best_is_the_mean_over_all_choices():
    rewards = [0.3, -1.0, 2.0, 0.3, 1.1]
    for n in range(1, 6):
        every = [max(chosen) for chosen in itertools.combinations(rewards, n)]
        assert expected_best(rewards, n) == pytest.approx(fmean(every))
    with pytest.raises(ValueError, match=r"n=6: must lie in 1 to 5"):
        expected_best(rewards, 6)


def test_n_is_the_smallest_that_is_as_good():
    def draw(count):
        return [[0.0, 1.0] * (count // 2), [1.0, 2.0] * (count // 2)]

    assert smallest_n(0.5, 0.1, draw)[:2] == (1, True)
    enough = smallest_n(1.4, 0.1, draw)
    assert enough.reached and enough.reward >= 1.4 and enough.error == 0.1
    below = fmean(expected_best(pool, enough.n - 1) for pool in draw(64))
    assert below < 1.4
    share = enough.between - (enough.n - 1)
    assert below + share * (enough.reward - below) == pytest.approx(1.4)
    assert smallest_n(9.0, 0.1, draw, most=32)[:2] == (32, False)


def test_the_n_of_known_laws_is_found_whatever_the_seed():
    """Uniform rewards: the best of N is worth N / (N + 1)."""
    found = []
    for seed in range(30):
        chance = random.Random(seed)
        found.append(smallest_n(0.79, 0.0, lambda count: [[chance.random() for _ in range(count)]]).n)  # noqa: B023
    assert fmean(found) == pytest.approx(4, abs=0.7) and max(found) <= 6


def test_the_standard_error_is_that_of_the_engines_texts(pair, found):
    (point,) = found["points"]
    assert 0 < point["equal_reward"]["error"] < 0.2
    assert not found["random"] and random_pair("1m", torch.float32, CPU).random


def test_a_sweep_that_is_refused_costs_no_measurement(pair, monkeypatch):
    monkeypatch.setattr(record, "measure", lambda *_: pytest.fail("measured before all was ready"))
    monkeypatch.setitem(sweeps.SWEEPS, "candidates", sweeps.SWEEPS["candidates"]._replace(values=(1,)))
    monkeypatch.setitem(sweeps.SWEEPS, "batch", sweeps.SWEEPS["batch"]._replace(values=(1, 40)))
    load = replace(LOAD, candidates=2)
    with pytest.raises(ValueError, match=r"batch=40 with candidates=2 takes 80 rows, more than.*max_rows=64"):
        record.run(pair, record.swept(load, ["candidates", "batch"]), rounds=1)


def test_passes_that_a_graph_replays_are_not_told():
    runs = [Run(1.0, Outcome(100, 2, 10, 30, 1.0), bytes=6, operations=12)]
    told = summary({ENGINE: runs, STRONG: runs}, graphed=GRAPHED)
    assert told[ENGINE]["weight_bytes_per_second"] is told[ENGINE]["operations_per_second"] is None
    assert told[STRONG]["weight_bytes_per_second"] == 6
    assert cli_bench._cells(told[ENGINE])[-2:] == ["-", "-"]


def test_forward_passes_are_counted_whoever_runs_them(pair):
    policy, reward = pair.weights["policy"], pair.weights["reward"]
    ids = torch.ones(2, 3, dtype=torch.long)
    with counting(pair) as passes, torch.no_grad():
        pair.policy(ids, logits_to_keep=1)
        pair.reward.model(ids)
    assert passes.bytes == 4 * (policy.body + policy.head + reward.body)
    assert passes.operations == 2 * (6 * policy.active + 2 * policy.head + 6 * reward.active)
    with torch.no_grad():
        pair.policy(ids)
    assert passes.bytes == 4 * (policy.body + policy.head + reward.body), "nothing is counted outside"


def test_prompts_are_the_same_whenever_they_are_asked_for(pair):
    assert pair.prompts(3, 5) == pair.prompts(3, 5) and pair.prompts(2, 5) == pair.prompts(3, 5)[:2]
    assert pair.prompts(3, None) == [[1, 2], [3], [1, 2]]


def test_random_models_are_the_same_for_everybody():
    torch.manual_seed(5)
    one = random_pair("1m", torch.bfloat16, CPU)
    state = torch.get_rng_state()
    other = random_pair("1m", torch.bfloat16, CPU)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers are left alone"
    assert torch.equal(one.policy.lm_head.weight, other.policy.lm_head.weight)
    assert one.policy.dtype == one.reward.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"size='7b': choose from 27m, 1m"):
        random_pair("7b", torch.float32, CPU)


# plots


def drawn_from(names):
    """A record of sweeps that nobody has measured."""

    def spread(value):
        return {"median": value, "min": 0.8 * value, "max": 1.3 * value}

    points = []
    for name in names:
        sweep = sweeps.sweep_named(name)
        for x in sweep.values:
            each = {
                contestant: {"tokens_per_second": spread(place * 50 * math.sqrt(x)), "seconds": spread(place * 0.1 * x)}
                for place, contestant in enumerate(sweep.contestants, 1)
            }
            load = {**vars(LOAD), sweep.field: x}
            points.append({"sweep": name, "workload": load, "contestants": each})
    fields = {name: sweeps.sweep_named(name).field for name in names}
    return {"models": "models", "dtype": "float32", "sweeps": fields, "points": points}


def test_every_sweep_is_drawn_as_png_and_svg(tmp_path):
    pytest.importorskip("matplotlib")
    paths = plots.draw(drawn_from(sweeps.SWEEPS), tmp_path / "new")
    assert len(paths) == len(set(paths)) == 2 * 8
    for path in paths:
        start = path.read_bytes()[:200]
        assert start.startswith(b"\x89PNG") if path.suffix == ".png" else b"<?xml" in start
    for label in ("accepted tokens/s", "segment length (tokens)"):
        assert label in _words(tmp_path / "new" / "speed-by-segment-length.svg")
    for label in ("seconds per call", "new tokens per prompt (max_new_tokens)", "proportional"):
        assert label in _words(tmp_path / "new" / "cost-by-new-tokens.svg")


@pytest.mark.parametrize(("name", "measure"), [("batch", "tokens_per_second"), ("new-tokens", "seconds")])
def test_lines_are_the_medians_and_bars_the_ranges(tmp_path, monkeypatch, name, measure):
    pytest.importorskip("matplotlib")
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, *_: figures.append(figure) or [])
    told = drawn_from([name])
    plots.draw(told, tmp_path)
    (axes,) = figures[0].axes
    sweep = sweeps.sweep_named(name)
    assert [bars.get_label() for bars in axes.containers] == list(sweep.contestants)
    for contestant, bars in zip(sweep.contestants, axes.containers, strict=True):
        one = [point["contestants"][contestant][measure] for point in told["points"]]
        line, _, (ranges,) = bars
        assert line.get_xdata().tolist() == list(sweep.values)
        assert line.get_ydata().tolist() == [figure["median"] for figure in one]
        ends = [segment[:, 1].tolist() for segment in ranges.get_segments()]
        assert ends == [pytest.approx([figure["min"], figure["max"]]) for figure in one]


def _words(path):
    """matplotlib draws letters as shapes, and leaves the text in comments."""
    return path.read_text()


def test_plots_without_matplotlib_name_the_extra_before_anything_is_measured(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(record, "run", lambda *_: pytest.fail("measured for nothing"))
    result = invoke("--sweep", "batch", "--plots", "folder")
    assert result.exit_code == 2
    assert "pip install -e '.[report]'" in result.stderr


# the command


def test_help_shows_every_default_once():
    told = " ".join(invoke("--help").stdout.replace("│", " ").split())
    for default in ("default: (1/6)", "default: (1 and 16; 4 for a sweep)", "default: (32; the demo's openings)"):
        assert default in told
    assert "0.1666" not in told


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny_policy(32).save_pretrained(folder / "policy")
    tiny_reward(32, scale=3.0).save_pretrained(folder / "reward")
    return "--policy", folder / "policy", "--reward", folder / "reward"


TINY = ("--prompt-length", 4, "--max-new-tokens", 8, "--segment-length", 4, "--rounds", 1, "--threads", 1)


def test_the_command_prints_one_json_object_and_the_tables_beside_it(models):
    result = invoke(*models, *TINY, "--batch", 1, "--batch", 3, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["threads"] == 1 and set(found["machine"]) == {"versions", "platform", "devices", "kernels"}
    assert [point["workload"]["batch"] for point in found["points"]] == [1, 3]
    for word in ("one candidate", "generate", f"best of {found['points'][0]['equal_reward']['n']}", "GB/s"):
        assert word in result.stderr


def test_a_sweep_is_measured_and_drawn(models, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    two = sweeps.SWEEPS["candidates"]._replace(values=(1, 2))
    monkeypatch.setitem(sweeps.SWEEPS, "candidates", two)
    result = invoke(*models, *TINY, "--sweep", "candidates", "--plots", tmp_path / "plots")
    assert result.exit_code == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines() if " engine " in line]
    assert rows[0][:3] == ["1", "engine", "1.00"] and rows[1][:2] == ["2", "engine"]
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == [
        f"{measure}-by-candidates.{kind}" for measure in ("cost", "speed") for kind in ("png", "svg")
    ]


def test_the_demo_models_are_measured_on_their_openings(monkeypatch):
    monkeypatch.setitem(sweeps.SWEEPS, "candidates", sweeps.SWEEPS["candidates"]._replace(values=(2,)))
    result = invoke("--demo", "--sweep", "candidates", "--max-new-tokens", 16, "--rounds", 1, "--threads", 1)
    assert result.exit_code == 0, result.stderr
    assert "own prompts" in result.stdout


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--sweep", "weather"), "sweep='weather': choose from batch, candidates"),
        (("--size", "7b"), "size='7b'"),
        (("--dtype", "int8"), "--dtype 'int8'"),
        (("--policy", "somewhere"), "both --policy and --reward"),
        (("--demo", "--policy", "a", "--reward", "b"), "--policy 'a' and --demo"),
        (("--acceptance", 1.5), "--acceptance 1.5"),
        (("--plots", "folder"), "--plots folder"),
        (("--sweep", "prompts", "--batch", 1, "--batch", 2), "--batch 1 --batch 2: a sweep"),
        (("--size", "1m", "--batch", 1, "--prompt-length", 9000), "positions"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(options, told):
    result = invoke(*options)
    assert result.exit_code == 2
    assert told in result.stderr and result.stderr.count("error:") == 1

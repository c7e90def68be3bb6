"""benchmarks/gpu.py: the whole program on toy models, and what must not go wrong where a run costs money."""

import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from benchmarks import gpu
from benchmarks.gpu_parts import heartbeats as gpu_heartbeats
from benchmarks.gpu_parts import kernels as gpu_kernels
from benchmarks.gpu_parts import models as gpu_models
from benchmarks.gpu_parts import order, overlap, prefill, project_tests
from benchmarks.gpu_parts.hypotheses import HYPOTHESES, judged, line, verdict
from benchmarks.gpu_parts.runner import Part, Record, Runner
from stars_fast import StarsConfig
from stars_fast.bench.models import made_pair
from stars_fast.bench.workload import Workload

CPU = torch.device("cpu")
RUNNING = {"status": "running", "estimate": 1.0, "seconds": 0.0, "rows": []}


def good(runner, value=1):
    """Adds a figure."""
    runner.add("figure", value=value)


def bad(runner):
    """Fails after a figure."""
    runner.add("figure", value=2)
    raise ValueError("a planted error")


@pytest.fixture
def runner(tmp_path):
    return Runner(Record(tmp_path / "record.json", {"tiny": True, "parts": {}}), time.time() + 60, CPU, tiny=True)


def saved(runner):
    return json.loads(runner.record.path.read_text())["parts"]


def run_program(*arguments):
    command = [sys.executable, gpu.__file__, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_the_whole_program_runs_on_toy_models(tmp_path):
    out = tmp_path / "folder" / "tiny.json"
    result = run_program("--tiny", "--out", out)
    assert result.returncode == 0, result.stdout + result.stderr
    content = json.loads(out.read_text())
    parts = content["parts"]
    assert list(parts) == [part.name for part in gpu.PARTS]
    without_gpu = {part.name for part in gpu.PARTS if part.needs_gpu and not torch.cuda.is_available()}
    assert {name: entry["status"] for name, entry in parts.items()} == {
        name: "skipped" if name in without_gpu else "done" for name in parts
    }
    assert content["machine"]["torch"] == torch.__version__
    in_turn = [one["id"] for part in gpu.PARTS for one in HYPOTHESES if one["part"] == part.name]
    assert list(content["verdicts"]) == in_turn and len(in_turn) == len(HYPOTHESES)
    for told in content["verdicts"].values():
        assert result.stdout.count(line(told)) == 2, "behind its part, and at the end"
        assert told["verdict"] in ("unclear", "not measured") or told["verdict"].startswith("not in this build")
    (throughput,) = [row for row in parts["throughput"]["rows"] if row["kind"] == "throughput"]
    assert len(throughput["calls"]) == 3 and len(throughput["share_of_warm"]) == 2
    for row in (row for entry in parts.values() for row in entry["rows"] if row["kind"] == "engine"):
        assert row["beats"] >= 3 and row["tokens_per_second"] > 0
        assert 0 < row["expected"]["floor_milliseconds"] < row["expected"]["milliseconds"]
    profiles = [row for name in ("step-profile", "pass-profile") for row in parts[name]["rows"]]
    assert [row["what"] for row in profiles if row["kind"] == "profile"] == ["step", "step", "score", "prefill"]
    for row in (row for row in profiles if row["kind"] == "profile"):
        assert {"product", "attention"} <= row["classes"].keys()
        assert row["products"][0]["count"] > 0 and row["product_teraflops"] > 0
    (graphs,) = [row for row in parts["graph-shapes"]["rows"] if row["kind"] == "graphs"]
    assert len(graphs["launched"]) == len(graphs["large"]) == len(graphs["graphs"]) == 3
    padding = [row for row in parts["graph-shapes"]["rows"] if row["kind"] == "padding"]
    assert [(row["what"], len(row["over_exact"])) for row in padding] == [("score", 3), ("decode", 3), ("trunk", 3)]
    (idle,) = parts["idle"]["rows"]
    assert len(idle["idle_milliseconds"]) == 2 and {"propose", "score"} <= idle["host_milliseconds"].keys()


# verdicts


@pytest.mark.parametrize(
    ("repeats", "tolerance", "bound", "word"),
    [
        ([10.9, 9.1, 10.0], 0.1, "", "confirmed"),
        ([10.9, 9.1, 11.2], 0.1, "", "unclear"),  # one of them is outside
        ([12.0, 12.5, 13.0], 0.1, "", "refuted"),
        ([12.0, 11.5, 13.0], 0.1, "", "unclear"),  # beyond the band by less than they differ
        ([8.0, 8.1, 8.2], 0.1, "", "refuted"),
        ([99.0, 12.0], 0.0, "at least", "confirmed"),
        ([9.0, 9.1], 0.0, "at least", "refuted"),
        ([9.0, 10.1], 0.0, "at least", "unclear"),
        ([1.0, 10.0], 0.0, "at most", "confirmed"),
        ([11.0, 11.5, 10.8], 0.0, "at most", "refuted"),
        ([10.0], 0.1, "", "unclear"),
        ([99.0], 0.1, "", "unclear"),
    ],
)
def test_a_prediction_is_confirmed_refuted_or_unclear(repeats, tolerance, bound, word):
    told = verdict(10.0, repeats, tolerance, bound)
    assert told.word == word
    assert told.spread == max(repeats) - min(repeats)


def recorded(*rows, gpu="NVIDIA H200", pair="llama-2-7b", part="step-profile"):
    return {"tiny": False, "pair": pair, "machine": {"gpu": gpu}, "parts": {part: {"rows": list(rows)}}}


def test_a_hypothesis_finds_its_figure_and_holds_for_its_machine_alone():
    shape = {"kind": "profile", "what": "step", "groups": 64}
    other = shape | {"candidates": 2, "classes": {"product": {"milliseconds": [9.0, 9.0]}}}
    own = shape | {"candidates": 3, "classes": {"product": {"milliseconds": [5.4, 5.6, 5.5]}}}
    told = judged(recorded(other, own), "step-profile")
    assert list(told) == ["H3", "H4", "H5", "H6", "H7", "H8"]
    assert (told["H3"]["verdict"], told["H3"]["measured"]) == ("confirmed", 5.5)
    assert line(told["H3"]).startswith("H3: predicted 5.5 ms, measured 5.5, confirmed (spread 0.2): products of ")
    assert line(told["H4"]) == "H4: predicted 2.97 ms, not measured: attention of that step"
    for elsewhere in ({"gpu": "NVIDIA H100"}, {"pair": "qwen2.5-7b"}):
        assert "unclear (spread 0.2; predicted for" in line(judged(recorded(own, **elsewhere), "step-profile")["H3"])
    absent = recorded({"kind": "absent", "what": "scoring in order"}, part="score-order")
    assert "not in this build (scoring in order)" in line(judged(absent, "score-order")["H12"])


def test_every_hypothesis_belongs_to_a_part():
    assert {one["part"] for one in HYPOTHESES} <= {part.name for part in gpu.PARTS}
    assert [one["id"] for one in HYPOTHESES] == [f"H{number}" for number in range(1, len(HYPOTHESES) + 1)]
    assert all(("tolerance" in one) != ("bound" in one) for one in HYPOTHESES)


def test_a_part_ends_with_its_verdicts_and_writes_them_down(runner, capsys):
    def part(runner):
        """Measures the first hypothesis."""
        runner.add("throughput", share_of_warm=[0.9, 0.95], first_over_later=[2.0, 2.1])

    runner.run([Part("throughput", 1, part)])
    written = json.loads(runner.record.path.read_text())["verdicts"]
    assert (written["H1"]["measured"], written["H1"]["remark"]) == (0.925, "toy models")
    assert line(written["H1"]) in capsys.readouterr().out


# kernels


def test_kernels_of_an_earlier_run_are_told_apart():
    """By the names that an H200 gave them."""
    record = json.loads((Path(gpu.__file__).parent / "results" / "2026-11-27-h200.json").read_text())
    (row,) = [row for row in record["parts"]["split"]["rows"] if row["kind"] == "kernels"]
    spent = gpu_kernels.by_class((one["name"], one["milliseconds"], one["count"]) for one in row["top"])
    assert list(spent)[:4] == ["product", "attention", "split-K reduce", "rotary"]
    layers, steps, passes = 32, 15, 17
    assert spent["attention"][1] == spent["append"][1] == spent["merge"][1] == layers * passes
    assert spent["rotary"][1] == spent["activation"][1] == spent["residual"][1] == layers * (steps + 1)
    assert spent["norm"][1] == 2 * layers * (steps + 1)
    assert gpu_kernels.OTHER not in spent


def test_the_device_is_idle_where_no_kernel_runs():
    runs = [(0.0, 10.0), (5.0, 2.0), (12.0, 8.0), (120.0, 5.0)]  # start and duration
    total, gaps = gpu_kernels.busy([gpu_kernels.Kernel("k", *one) for one in runs], longest_gap=50.0)
    assert total == 23.0
    assert [(gap.start, gap.duration) for gap in gaps] == [(20.0, 100.0)]


# parts of a long measurement


def test_parts_are_listed_and_unknown_ones_refused(capsys):
    assert gpu.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert [line.split()[0] for line in listed.splitlines()] == [part.name for part in gpu.PARTS]
    with pytest.raises(SystemExit):
        gpu.main(["--only", "nothing"])
    assert "invalid choice: 'nothing' (choose from" in capsys.readouterr().err


def test_the_estimates_fit_the_time():
    names = [part.name for part in gpu.PARTS]
    assert gpu.START + sum(part.seconds for part in gpu.PARTS[: names.index("tests") + 1]) <= 480
    assert all(part.about.endswith(".") for part in gpu.PARTS)


def test_a_failing_part_is_recorded_and_the_next_one_runs(runner, capsys):
    assert runner.run([Part("bad", 1, bad), Part("good", 1, good)])
    assert saved(runner)["bad"]["status"] == "failed"
    assert "ValueError: a planted error" in saved(runner)["bad"]["error"]
    assert "ValueError: a planted error" in capsys.readouterr().out
    assert [row["value"] for entry in saved(runner).values() for row in entry["rows"]] == [2, 1]
    assert saved(runner)["good"]["status"] == "done"


def test_every_figure_is_in_the_file_at_once(runner):
    def part(runner):
        """Looks at the file."""
        runner.add("figure", value=1)
        assert saved(runner)["looks"]["status"] == "running"
        assert saved(runner)["looks"]["rows"] == [{"kind": "figure", "value": 1}]

    runner.run([Part("looks", 1, part)])
    assert saved(runner)["looks"]["status"] == "done"


def test_nothing_is_started_when_the_time_is_up(runner):
    def slow(runner):
        """Takes what it has been given."""
        while runner.time_for(0.1):
            time.sleep(0.05)
            runner.add("figure")

    started = time.time()
    runner.run([Part("slow", 0.2, slow)])
    assert time.time() - started < 2  # its own time, half as much again as estimated
    assert [row["kind"] for row in saved(runner)["slow"]["rows"]][-1] == "left_out"
    runner.ends = time.time() + 1
    runner.run([Part("late", 40, good)])
    late = saved(runner)["late"]
    assert (late["status"], late["rows"], late["error"]) == ("skipped", [], "no time left")


def test_what_a_part_makes_for_others_takes_nothing_of_its_time(runner, monkeypatch):
    def make():
        running = saved(runner)["any"]
        assert running["start_seconds"] > 100, "while it may take long nobody calls it hanging"
        time.sleep(0.3)
        return 1

    def part(runner):
        """Asks for what takes longer than it may itself."""
        assert runner.once("models", make) == runner.once("models", bad) == 1
        runner.add("figure", enough=runner.left() > 0.1)

    runner.run([Part("any", 0.1, part)])
    (row,), entry = saved(runner)["any"]["rows"], saved(runner)["any"]
    assert row["enough"] and 0.3 <= entry["start_seconds"] < 2


def test_a_part_goes_on_after_an_error_it_expects(runner):
    def part(runner):
        """Measures two things, one of them broken."""
        with runner.guarded("the first"):
            raise ValueError("a planted error")
        runner.add("figure", value=1)

    runner.run([Part("some", 1, part)])
    assert [row["kind"] for row in saved(runner)["some"]["rows"]] == ["error", "figure"]
    assert saved(runner)["some"]["status"] == "failed"
    assert "a planted error" in saved(runner)["some"]["error"]


def test_a_part_that_hangs_is_ended(tmp_path):
    record = Record(tmp_path / "record.json", {"parts": {"stuck": RUNNING | {"started": time.time() - 100}}})
    record.save()
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    started = time.time()
    assert gpu._one_worker(command, started + 60, record.path) == "stuck hangs"
    assert time.time() - started < 10
    record.content["parts"]["stuck"]["estimate"] = 60
    assert record.overdue() == ""


def test_a_process_that_dies_is_started_again_behind_the_part_that_killed_it(tmp_path, monkeypatch, capsys):
    parts = [Part("first", 1, good), Part("killer", 1, good), Part("last", 1, partial(good, value=3))]
    starts = []

    def worker(command, ends, out):
        record = Record.of(args.out)
        runner = Runner(record, ends, CPU, tiny=True)
        starts.append(list(record.content["parts"]))
        if len(starts) == 1:
            runner.run(parts[:1])
            record.content["parts"]["killer"] = RUNNING | {"started": time.time()}
            record.save()
            return "exit status -11"
        runner.run(parts)
        return ""

    monkeypatch.setattr(gpu, "_one_worker", worker)
    monkeypatch.setattr(gpu, "build", dict)
    args = gpu.argparse.Namespace(out=tmp_path / "died.json", minutes=1, tiny=True, only=None, pair="llama-2-7b")
    args.out.write_text("of a run before")
    assert gpu.supervise(args, parts) == 1
    (earlier,) = set(tmp_path.iterdir()) - {args.out}
    assert earlier.read_text() == "of a run before"
    entries = json.loads(args.out.read_text())["parts"]
    assert starts == [[], ["first", "killer"]]
    assert {name: entry["status"] for name, entry in entries.items()} == {
        "first": "done", "killer": "failed", "last": "done",
    }  # fmt: skip
    assert entries["killer"]["error"] == "exit status -11"
    assert "part killer: failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "seconds", "cause"),
    [("", 60, ""), ("raise SystemExit(75)", 60, "device"), ("raise SystemExit(3)", 60, "3"), ("input()", 0, "time is")],
)
def test_why_a_process_ended_is_told(code, seconds, cause, tmp_path):
    command = [sys.executable, "-c", code.replace("input()", "import time; time.sleep(60)")]
    Record(tmp_path / "record.json", {"parts": {}}).save()
    told = gpu._one_worker(command, time.time() + seconds, tmp_path / "record.json")
    assert cause in told and bool(told) == bool(cause)


def test_parts_are_chosen_in_their_order(capsys):
    assert gpu.main(["--list", "--only", "tiles", "--only", "idle"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["idle", "tiles"]


@pytest.mark.parametrize("name", gpu_models.PAIRS)
def test_models_made_on_a_device_are_those_that_transformers_makes(name):
    """At real head sizes and rotary settings, with few and narrow layers."""
    torch.manual_seed(0)  # a head of one output has 128 weights, whose spread differs by a quarter once in 200 times
    configs = gpu_models.configs(name)
    for config in configs:
        config.num_hidden_layers, config.intermediate_size, config.vocab_size = 1, 64, 128
        config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim = 128, 2, 1, 64
    pair = made_pair(name, *configs, torch.bfloat16, CPU)
    autos = AutoModelForCausalLM, AutoModelForSequenceClassification
    for made, auto, config in zip((pair.policy, pair.reward), autos, configs, strict=True):
        usual = auto.from_config(config).eval()
        assert not made.training
        for (key, ours), (other, theirs) in zip(made.named_buffers(), usual.named_buffers(), strict=True):
            assert key == other and torch.equal(ours, theirs)
        assert {parameter.dtype for parameter in made.parameters()} == {torch.bfloat16}
        for (key, ours), (_, theirs) in zip(made.named_parameters(), usual.named_parameters(), strict=True):
            assert ours.float().std() == pytest.approx(theirs.detach().float().std(), rel=0.25), key


@pytest.mark.parametrize("acceptance", [0.15, 0.5])
def test_thresholds_accept_what_they_should(runner, acceptance):
    driven, load = gpu_models.pilots(runner), gpu_heartbeats.workload(runner, 16, acceptance)
    prompts = driven.pair.prompts(16, load.prompt_length)
    watch = gpu_heartbeats.run_engine(runner, prompts, driven.config(load), 2, 4, 20.0)
    assert watch.acceptance == pytest.approx(acceptance, abs=0.1)
    assert len(watch.steady) >= 4


def test_steady_heartbeats_are_those_in_which_all_requests_ran(runner):
    driven = gpu_models.pilots(runner)
    config = StarsConfig(
        target_reward=-1e9, base_reward=-1e9, segment_length=4, max_new_tokens=8, ignore_eos=True, candidates=1
    )
    watch = gpu_heartbeats.run_engine(runner, driven.pair.prompts(3, 8), config, 1, 1, 20.0)
    assert [(beat.steady, beat.committed, beat.drawn) for beat in watch.beats] == [(False, 12, 12), (True, 12, 12)]
    assert [beat.scored for beat in watch.beats] == [3 * 8 + 12, 12]
    assert watch.beats[1].context == 12
    assert watch.acceptance == 1
    load = Workload(3, 8, 8, 4, acceptance=0.5)
    figures = gpu_heartbeats.figures(watch, load)
    assert figures["tokens_per_second"] == pytest.approx(0.5 * 12 / watch.beats[1].seconds)
    assert driven.engine.on_heartbeat is None


def test_orders_of_scoring_are_compared_in_turns(runner, monkeypatch):
    core = gpu_models.pilots(runner).engine.core
    seen, run = [], order.run_engine

    def run_engine(*arguments):
        seen.append(core.in_order)
        return run(*arguments)

    monkeypatch.setattr(order, "run_engine", run_engine)
    runner.run([Part("score-order", 60, order.compare_orders)])
    (row,) = saved(runner)["score-order"]["rows"]
    assert seen == [True] + 3 * [True, False], "a first run is for captures"
    assert len(row["saved_milliseconds"]) == len(row["token_share"]) == 3


def test_attention_of_fresh_prompts_is_compared_with_a_library(runner):
    runner.run([Part("prefill", 60, prefill.measure_prefill)])
    part = saved(runner)["prefill"]
    assert part["status"] == "done", part
    shapes = [(8, 1), (8, 2), (4, 1), (4, 2)]
    for contender in (prefill.OURS, prefill.STAND_IN):
        found = [row for row in part["rows"] if row.get("contender") == contender]
        assert [(row["length"], row["batch"]) for row in found] == shapes
        assert all(row["teraflops"] > 0 and len(row["microseconds"]) == 3 for row in found)
    gains = [row for row in part["rows"] if row["kind"] == "prefill_gain"]
    assert [(row["length"], row["batch"], len(row["gain"])) for row in gains] == [(*shape, 3) for shape in shapes]


def test_passes_beside_steps_are_compared_with_one_after_the_other(runner):
    runner.run([Part("overlap", 60, overlap.measure_overlap)])
    part = saved(runner)["overlap"]
    assert part["status"] == "done", part
    found = {(row["what"], row["tokens"]): row for row in part["rows"]}
    passes = [("prompts of both models", 16), ("half of scoring", 12), ("prompts", 16), ("prompts", 8)]
    assert list(found) == passes
    for row in found.values():
        assert row["changed_tokens"] == [0, 0, 0]
        steps, alone, both = (row[f"{way}_milliseconds"] for way in ("steps", "alone", "both"))
        whole = zip(both, row["saved_milliseconds"], steps, alone, strict=True)
        assert all(taken + ms == pytest.approx(one + other) for taken, ms, one, other in whole)
        shares = zip(row["of_shorter"], row["of_heartbeat"], strict=True)
        assert all(abs(of_beat) < abs(of_shorter) for of_shorter, of_beat in shares)


def test_a_pass_that_writes_where_steps_read_is_noticed(runner, monkeypatch):
    def reading(model, prompts):
        return lambda: [tensor.zero_() for layer in model.shapes for tensor in model.pool.layer(layer)]

    monkeypatch.setattr(overlap, "reading", reading)
    runner.run([Part("overlap", 60, overlap.measure_overlap)])
    assert all(min(row["changed_tokens"]) > 0 for row in saved(runner)["overlap"]["rows"])


def test_the_projects_tests_are_found(runner):
    assert (project_tests.ROOT / "tests" / Path(__file__).name).is_file()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_an_earlier_record_is_left_alone(tmp_path, capsys):
    out = tmp_path / "gpu.json"
    out.write_text("figures")
    assert gpu.main(["--out", str(out)]) == 2
    assert out.read_text() == "figures"
    assert "--tiny" in capsys.readouterr().err

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
from benchmarks.gpu_parts import models as gpu_models
from benchmarks.gpu_parts import operators as gpu_operators
from benchmarks.gpu_parts.runner import Part, Record, Runner
from stars_fast import StarsConfig, StarsEngine
from stars_fast.bench.models import made_pair

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
    return Runner(Record(tmp_path / "record.json", {"parts": {}}), time.time() + 60, CPU, tiny=True)


def saved(runner):
    return json.loads(runner.record.path.read_text())["parts"]


def run_program(*arguments):
    command = [sys.executable, gpu.__file__, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
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
    assert {row["kind"] for row in parts["llama-2-7b"]["rows"]} == {"pair", "engine", "strong", "plain", "generate"}
    for row in (row for entry in parts.values() for row in entry["rows"] if row["kind"] == "engine"):
        assert row["beats"] >= 2
        assert row["tokens_per_second"] > 0
        assert row["expected"]["tokens_per_second"] > 0
    assert parts["split"]["rows"][0]["stages_milliseconds"]["propose"] > 0
    assert [row["kind"] for row in parts["split"]["rows"]] == 2 * ["split", "kernels"]
    (row,) = parts["overlap"]["rows"]
    assert row["serial_milliseconds"] > 0
    table = out.with_suffix(".txt").read_text()
    assert table.strip() in result.stdout
    for word in ("x strong", "decode step", "tree_attention", "roofline: propose", "on two streams"):
        assert word in table


def test_only_the_parts_named_run(tmp_path):
    out = tmp_path / "one.json"
    result = run_program("--tiny", "--only", "steps", "--out", out)
    assert result.returncode == 0, result.stdout + result.stderr
    assert list(json.loads(out.read_text())["parts"]) == ["steps"]


def test_parts_are_listed_and_unknown_ones_refused(capsys):
    assert gpu.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert [line.split()[0] for line in listed.splitlines()] == [part.name for part in gpu.PARTS]
    with pytest.raises(SystemExit):
        gpu.main(["--only", "nothing"])
    assert "invalid choice: 'nothing' (choose from" in capsys.readouterr().err


def test_the_estimates_fit_the_time():
    assert sum(part.seconds for part in gpu.PARTS) <= 540
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
    args = gpu.argparse.Namespace(out=tmp_path / "died.json", seconds=60, tiny=True, only=None)
    assert gpu.supervise(args, parts) == 1
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
    assert gpu.main(["--list", "--only", "tiles", "--only", "device"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["device", "tiles"]


def test_heartbeats_without_compiled_layers_are_measured_beside_the_others(runner):
    runner.run([Part("uncompiled", 60, gpu.UNCOMPILED)])
    entry = saved(runner)["uncompiled"]
    assert entry["status"] == "done", entry["error"]
    assert {row["pair"] for row in entry["rows"] if row["kind"] == "engine"} == {"llama-2-7b, unc."}
    assert "pilots" not in runner.shared  # the parts behind compile


@pytest.mark.parametrize("name", gpu_models.PAIRS)
def test_models_made_on_a_device_are_those_that_transformers_makes(name):
    """At real head sizes and rotary settings, with few and narrow layers."""
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


@pytest.mark.parametrize("acceptance", [0.15, 0.3, 0.5])
def test_thresholds_accept_what_they_should(runner, acceptance):
    models = gpu_models.pair(runner, "llama-2-7b")
    driven = gpu_heartbeats.pilots(runner, models)
    config = driven.config(gpu_heartbeats.workload(runner, 16, 4, acceptance))
    watch = gpu_heartbeats.run_engine(runner, driven.engine, models.prompts(16, 8), config, 2, 4, 20.0)
    assert watch.acceptance == pytest.approx(acceptance, abs=0.1)
    assert len(watch.steady) >= 4


def test_steady_heartbeats_are_those_in_which_all_requests_ran(runner):
    models = gpu_models.pair(runner, "llama-2-7b")
    engine = StarsEngine(models.policy, models.reward)
    config = StarsConfig(
        target_reward=-1e9, base_reward=-1e9, segment_length=4, max_new_tokens=8, ignore_eos=True, candidates=1
    )
    watch = gpu_heartbeats.run_engine(runner, engine, models.prompts(3, 8), config, 1, 1, 20.0)
    assert [(beat.steady, beat.committed, beat.drawn) for beat in watch.beats] == [(False, 12, 12), (True, 12, 12)]
    assert watch.beats[1].context == 12
    assert watch.acceptance == 1
    figures = gpu_heartbeats.figures(watch, 4)
    assert figures["tokens_per_second"] == pytest.approx(figures["counted_tokens_per_second"])
    assert engine.on_heartbeat is None


def test_the_projects_tests_are_found(runner):
    assert (gpu_operators.ROOT / "tests" / Path(__file__).name).is_file()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_an_earlier_record_is_left_alone(tmp_path, capsys):
    out = tmp_path / "gpu.json"
    out.write_text("figures")
    assert gpu.main(["--out", str(out)]) == 2
    assert out.read_text() == "figures"
    assert "--tiny" in capsys.readouterr().err

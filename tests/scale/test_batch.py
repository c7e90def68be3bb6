"""``stars-fast batch`` on Ray: the rows of ``stars-fast generate``, whatever is killed on the way."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_pictures import llava, llava_processor, picture
from typer.testing import CliRunner

from stars_fast import StarsConfig
from stars_fast.cli import app
from stars_fast.demo import PROMPTS
from stars_fast.rows.records import record
from stars_fast.scale import StarsBatch

ray = pytest.importorskip("ray", reason="needs the extra ray")
pa = pytest.importorskip("pyarrow", reason="needs the extra ray")

SETTINGS = {"target_reward": 1.0, "base_reward": 0.0, "max_new_tokens": 24}
CONFIG = StarsConfig(segment_length=4, target_reward=1.0, max_new_tokens=8)
OPTIONS = ("--policy", "demo", "--set", "target_reward=1.0", "--set", "base_reward=0.0", "--max-new-tokens", 24)
LIMIT = 150  # seconds of a run; one takes about ten on two cores of its own
# Whoever is to be killed waits for it: nothing is scored while there is a part in the folder that `hold` names.
REWARD = """
import time
from pathlib import Path

HOLD = Path(__file__).with_name("hold")

def held():
    try:
        return any(Path(HOLD.read_text()).glob("part-*.jsonl"))
    except OSError:
        return False

def score(completions):
    while held():
        time.sleep(0.01)
    return [len(set(one)) / 8 for one in completions]
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """An input with two rows that fail: one cannot be read, one has no room for its answer."""
    path = tmp_path_factory.mktemp("rows") / "in.jsonl"
    given = [{"id": i if i % 3 else f"r{i}", "prompt": PROMPTS[i % len(PROMPTS)]} for i in range(48)]
    given.append({"id": "long", "prompt": "film " * 5000})
    path.write_text("".join(json.dumps(row) + "\n" for row in given) + "nonsense\n")
    path.with_name("rewards.py").write_text(REWARD)
    return path


@pytest.fixture(scope="module")
def undisturbed(rows):
    """What ``generate`` makes of them, by id."""
    output = rows.with_name("generated.jsonl")
    command = ["generate", "--input", rows, "--output", output, *reward_of(rows), *OPTIONS]
    result = CliRunner().invoke(app, list(map(str, command)))
    assert result.exit_code == 1, result.output
    return {row["id"]: row for row in map(json.loads, output.open())}


def reward_of(rows):
    return "--reward", f"{rows.with_name('rewards.py')}:score"


def batch(rows, output, *options):
    command = [sys.executable, "-m", "stars_fast", "batch", "--input", rows, "--output", output]
    return [*command, *reward_of(rows), *OPTIONS, *options]


@contextlib.contextmanager
def held_after_a_part(rows, output):
    """Within this, workers stop at the next reward once there is a part."""
    hold = rows.with_name("hold")
    hold.write_text(str(output))
    try:
        yield
    finally:
        hold.unlink()


@contextlib.contextmanager
def started(*command):
    with subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True) as job:
        try:
            yield job
        finally:
            job.kill()


def parts(output):
    return list(output.glob("part-*.jsonl"))


def wait_for(job, found):
    """What a function finds, as soon as it finds something."""
    end = time.monotonic() + LIMIT
    while not (there := found()):
        assert job.poll() is None, job.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.02)
    return there


def check(output, undisturbed):
    """Every row once, each as it would have been, the failed ones apart."""
    good = [json.loads(line) for part in parts(output) for line in part.open()]
    bad = [json.loads(line) for part in parts(output / "errors") for line in part.open()]
    assert {row["id"] for row in bad} == {"long", "line 50 of in.jsonl"} and len(bad) == 2
    assert len(good) == 48 and not [row for row in good if row["error"]]
    found = {row["id"]: row["completion"] for row in good + bad if row["id"] != "line 50 of in.jsonl"}
    assert found == {id_: row["completion"] for id_, row in undisturbed.items() if id_ != "line 50"}
    assert not list(output.glob(".writing*"))


def test_a_worker_that_is_killed_changes_no_text(rows, undisturbed, ray_processes, tmp_path):
    output = tmp_path / "out"
    with started(*batch(rows, output, "--actors", 2, "--batch-size", 4)) as job:
        with held_after_a_part(rows, output):
            wait_for(job, lambda: parts(output))
            workers = wait_for(job, lambda: ray_processes("ray::MapWorker"))
            os.kill(workers[0], signal.SIGKILL)
        _, complaint = job.communicate(timeout=LIMIT)
        assert job.returncode == 1, complaint
    assert "50 rows written to" in complaint and "2 with an error" in complaint
    check(output, undisturbed)


def test_a_driver_that_is_killed_is_gone_on_from_by_the_same_command(rows, undisturbed, ray_processes, tmp_path):
    output = tmp_path / "out"
    command = batch(rows, output, "--actors", "1:2", "--batch-size", 4, "--checkpoint", tmp_path / "done")
    with held_after_a_part(rows, output), started(*command) as job:
        wait_for(job, lambda: parts(output))
        job.kill()
        kept = {part.name: part.stat().st_mtime_ns for part in parts(output)}
    with started(*command) as job:  # workers of the first one may still be at it
        _, complaint = job.communicate(timeout=LIMIT)
        assert job.returncode == 1, complaint
    assert "were there before" in complaint
    assert kept.items() <= {part.name: part.stat().st_mtime_ns for part in parts(output)}.items()
    check(output, undisturbed)
    other_settings(rows, output, "--checkpoint", tmp_path / "done")


def other_settings(rows, output, *options):
    """Nothing is started for a command that cannot go on."""
    for changed, named in ((("--seed", 3), "seed was 0 and is 3"), (("--set", "top_k=9"), "top_k was None and is 9")):
        command = batch(rows, output, *options, *changed)[3:]
        result = CliRunner().invoke(app, list(map(str, command)))
        assert result.exit_code == 2 and named in result.stderr and not ray.is_initialized()
    other = rows.with_name("other.jsonl")
    other.write_text(rows.read_text().replace(PROMPTS[1], "Another film"))
    result = CliRunner().invoke(app, list(map(str, batch(other, output, *options)[3:])))
    assert result.exit_code == 2 and "answers to other prompts or seeds under id 1, 'r9'" in result.stderr
    assert not ray.is_initialized()


def test_too_few_cpus_are_said_at_once(cluster, rows, tmp_path, monkeypatch):
    """Ray itself would wait for them without a word."""
    monkeypatch.setattr("stars_fast.scale.job.connected", lambda address: contextlib.nullcontext())
    begin = time.monotonic()
    result = CliRunner().invoke(app, list(map(str, batch(rows, tmp_path / "out", "--actors", 3)[3:])))
    assert time.monotonic() - begin < 30
    assert result.exit_code == 2
    message = "3 actors of 1 CPU each do not fit: 2 of 2 CPUs are free: pass --actors 2, or --cpus-per-actor"
    assert message in " ".join(result.stderr.split())
    assert not parts(tmp_path / "out")


def test_a_table_changes_no_chat(monkeypatch):
    """Arrow gives every message the keys that one of them has."""
    chats = [
        [{"role": "user", "content": "a"}],
        [{"role": "user", "content": [{"type": "text", "text": "b"}, {"type": "image", "url": "c"}], "name": "d"}],
    ]
    read = []

    def complete(engine, rows, config, variables):
        read.extend(row.prompt for row in rows)
        return [[record(row, 0)] for row in rows]

    monkeypatch.setattr("stars_fast.scale.stars_batch.complete", complete)
    for chat in chats:  # content is of one kind in a column
        table = pa.table({"id": ["1", "2"], "messages": [chat, [{"role": "assistant", **chat[0], "tool_calls": "x"}]]})
        assert None in table.to_pylist()[0]["messages"][0].values()
        StarsBatch("demo", "demo")(table)
        assert read[-2] == chat


def test_pictures_come_as_files_bytes_or_as_data_sets_of_the_hub_have_them(tmp_path):
    llava().save_pretrained(tmp_path)
    llava_processor().save_pretrained(tmp_path)
    paths = [str(tmp_path / f"{seed}.png") for seed in (1, 2)]
    for seed, path in enumerate(paths, 1):
        picture(seed).save(path)
    files = [Path(path).read_bytes() for path in paths]
    columns = (paths, files, [[file] for file in files], [{"bytes": file, "path": None} for file in files])
    columns += ([{"bytes": None, "path": path} for path in paths],)
    actor = StarsBatch(str(tmp_path), lambda completion_ids: [sum(ids) % 7 / 2 for ids in completion_ids], CONFIG)
    tables = [pa.table({"id": ["a", "b"], "prompt": ["what?"] * 2, "image": column}) for column in columns]
    first, *others = (actor(table)["completion"].to_pylist() for table in tables)
    assert first[0] != first[1] and others == [first] * 4


def test_a_pipeline_of_ones_own_has_the_same_texts(cluster, rows, undisturbed):
    def score(completions):  # as that of the file; it pickles by value
        return [len(set(one)) / 8 for one in completions]

    given = [row for row in map(json.loads, rows.read_text().splitlines()[:-1]) if row["id"] != "r0"]
    kept = [{"id": str(row["id"]), "prompt": row["prompt"], "kept": len(row["prompt"])} for row in given[20:]]
    texts = [row for row in given[20:] if isinstance(row["id"], str)]  # whose ids are as they were
    answered = ray.data.from_items(kept).map_batches(
        StarsBatch,
        fn_constructor_kwargs={"policy": "demo", "reward": score, "config": StarsConfig(**SETTINGS)},
        batch_size=16,
        compute=ray.data.ActorPoolStrategy(size=1),
    )
    found = {row["id"]: row for row in answered.take_all()}
    assert len(found) == len(kept) and all(found[row["id"]]["kept"] == row["kept"] for row in kept)
    assert {row["id"]: found[row["id"]]["completion"] for row in texts} == {
        row["id"]: undisturbed[row["id"]]["completion"] for row in texts
    }
    assert [row["id"] for row in found.values() if row["error"] is not None] == ["long"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--actors", "0"), "--actors 0: give a number, or the least and the most"),
        (("--n", "2", "--set", "num_return_sequences=3"), "--n and --set num_return_sequences: give one of them"),
        (("--method", "best_of_nn"), "best_of_n"),
        (("--actors", "8:2"), "the most is less than the least"),
        (("--input", "s3://bucket/*.jsonl"), "stars_fast.scale.StarsBatch"),
        (("--input", "nowhere*.jsonl"), "nowhere*.jsonl: there is no such file"),
        (("--output", "{rows.parent}"), "lies in --output"),
        (("--output", "{rows}"), "File exists"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_what_cannot_be_is_said_before_anything_starts(rows, tmp_path, monkeypatch, options, named):
    monkeypatch.setattr("stars_fast.scale.job.connected", lambda address: pytest.fail("Ray was started"))
    command = batch(rows, tmp_path / "out", *(option.format(rows=rows) for option in options))[3:]
    result = CliRunner().invoke(app, list(map(str, command)))
    assert result.exit_code == 2 and named in " ".join(result.stderr.split())

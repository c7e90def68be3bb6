"""The output folder of a job, without Ray: a part is there whole or not at all, and written by this run."""

import json
import pickle
import sys
from pathlib import Path

import pytest

from stars_fast.cli import batch
from stars_fast.rows.engines import Names
from stars_fast.rows.reading import Row, each_row
from stars_fast.rows.records import record
from stars_fast.scale.job import PartWriter
from stars_fast.scale.parts import Parts, is_same
from stars_fast.scale.replicas import serve_app

ROWS = [Row("a", "w3", 1), Row(2, [{"role": "user", "content": "w4"}], 2), Row("3", [5, 6], 3)]


def begun(folder):
    parts = Parts.open(folder, None)
    parts.begin()
    return parts


def answers(rows=ROWS, error=None):
    return [[record(row, 0, (5,), "w5", finish_reason="length", error=error)] for row in rows]


def lines(folder):
    return [json.loads(line) for part in sorted(folder.glob("*.jsonl")) for line in part.open()]


def test_a_part_is_in_the_output_and_its_rows_are_done(tmp_path):
    parts = begun(tmp_path / "out")
    assert parts.write(answers()) == 0
    assert lines(parts.output) == [records[0] for records in answers()]
    done = parts.done()
    assert list(done) == ["a", 2, "3"] and all(is_same(row, done[row.id]) for row in ROWS)
    assert not is_same(Row("a", "w3", 7), done["a"]) and not is_same(Row("a", "w3 ", 1), done["a"])


def test_a_worker_that_outlives_its_run_writes_nothing_more(tmp_path):
    earlier = begun(tmp_path / "out")
    earlier.write(answers(ROWS[:1]))
    later = begun(tmp_path / "out")
    with pytest.raises(OSError, match="no other run has taken over"):
        earlier.write(answers(ROWS[1:]))
    assert list(later.done()) == ["a"] and len(lines(later.output)) == 1
    assert [path.name for path in later.output.glob(".*")] == [later.lease.name]


def test_a_batch_that_is_written_again_takes_the_place_of_what_there_was(tmp_path):
    parts = begun(tmp_path / "out")
    parts.write(answers(error="out of luck"))
    assert len(lines(parts.errors)) == 3 and not parts.done()
    parts.write(answers())
    assert len(lines(parts.output)) == 3 and not lines(parts.errors)


def test_a_part_that_was_not_noted_before_the_end_is_noted_at_the_next_begin(tmp_path):
    parts = begun(tmp_path / "out")
    parts.write(answers())
    noted = parts.done()
    for entry in parts.checkpoint.iterdir():
        entry.unlink()
    assert Parts.open(parts.output, None).done() == noted


def test_parts_may_be_taken_away_when_they_are_noted(tmp_path):
    parts = begun(tmp_path / "out")
    parts.write(answers())
    for part in parts.output.glob("*.jsonl"):
        part.unlink()
    assert len(parts.done()) == 3


def test_what_failed_lies_apart_and_is_tried_again(tmp_path):
    parts = begun(tmp_path / "out")
    assert parts.write([*answers(ROWS[:2]), *answers(ROWS[2:], error="half a pair \ud800")]) == 1
    assert [row["id"] for row in lines(parts.output)] == ["a", 2]
    assert [row["error"] for row in lines(parts.errors)] == ["half a pair \ud800"]
    assert list(parts.done()) == ["a", 2]
    assert not lines(begun(parts.output).errors)


@pytest.mark.parametrize("text", ["{\n", "[]\n", '{"id": 1}\n'])
def test_a_part_of_something_else_is_named(tmp_path, text):
    (tmp_path / "part-0.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"part-0\.jsonl is not a part that this command wrote"):
        Parts.open(tmp_path, None).done()


def test_a_batch_that_kills_its_worker_every_time_becomes_an_error(tmp_path, monkeypatch):
    """Ray itself would start the worker and the batch again for ever."""
    monkeypatch.setattr("stars_fast.scale.job.build_engine", lambda *given: None)
    monkeypatch.setattr(
        "stars_fast.scale.job.complete",
        lambda engine, rows, *more: [[record(row, 0, error=row.error)] for row in rows],
    )
    parts, ids = begun(tmp_path / "out"), [row.id for row in ROWS]
    assert [parts.tries(ids) for _ in range(5)] == [1, 2, 3, 4, 5]
    told = PartWriter(parts, None, None, None)({"row": _Column(json.dumps(vars(row)) for row in ROWS)})
    assert told["failed"] == [3] and "its worker died 5 times" in lines(parts.errors)[0]["error"]


def test_what_ends_a_worker_is_told_as_it_was(tmp_path, monkeypatch):
    def missing(*given):
        raise FileNotFoundError("no folder /models/p")

    monkeypatch.setattr("stars_fast.scale.job.build_engine", missing)
    told = PartWriter(begun(tmp_path / "out"), None, None, None)({"row": _Column([])})
    error = pickle.loads(told["error"][0])
    assert isinstance(error, FileNotFoundError) and str(error) == "no folder /models/p"


class _Column(list):
    """As much of an Arrow column as a worker uses."""

    to_pylist = list.copy


def test_rows_of_several_files_are_called_by_file_and_line():
    seen = {}
    first = list(each_row([b'{"prompt": "w3"}', b"{"], 0, seen, "a.jsonl"))
    second = list(each_row([b'{"prompt": "w3"}'], 0, seen, "b.jsonl"))
    assert [row.id for row in first + second] == ["a.jsonl:1", "line 2 of a.jsonl", "b.jsonl:1"]
    assert first[1].error.startswith("line 2 of a.jsonl: not JSON")
    with pytest.raises(ValueError, match=r"lines 1 of b\.jsonl and 2 of c\.jsonl have the same id 'b\.jsonl:1'"):
        list(each_row([b'{"id": "x", "prompt": ""}', b'{"id": "b.jsonl:1", "prompt": ""}'], 0, seen, "c.jsonl"))


def test_replicas_without_ray_serve_name_their_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[ray-serve\]'"):
        serve_app("demo", "demo")


def ids(pattern):
    files = batch._named(batch._files(pattern, Path("out")), pattern)
    return [row.id for row in batch._todo(files, 0, {}, Path("out"))]


def test_rows_keep_their_names_when_a_file_is_added_and_files_may_be_called_alike(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("x", "y"):
        Path(folder).mkdir()
        Path(folder, "part.jsonl").write_text('{"prompt": "w3"}\n')
    whole = f"{tmp_path}/*/part.jsonl"
    assert ids("x/*.jsonl") == ids("x/part.jsonl") == ids("./x/../x/p*") == ["part.jsonl:1"]
    assert ids("*/part.jsonl") == ids(whole) == ids("**/*.jsonl") == ["x/part.jsonl:1", "y/part.jsonl:1"]
    Path("x/a.jsonl").write_text('{"prompt": "w4"}\n')
    assert ids("x/*.jsonl") == ["a.jsonl:1", "part.jsonl:1"]


def test_workers_that_start_elsewhere_find_folders_and_the_file_of_a_reward(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("policy").mkdir()
    names = batch._found(Names("policy", "rewards.py:score", None, "org/tokenizer", "auto", "policy"))
    whole = f"{tmp_path}/policy"
    assert names == (whole, f"{tmp_path}/rewards.py:score", None, "org/tokenizer", "auto", whole)


def test_workers_that_start_elsewhere_find_pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows").mkdir()
    Path("rows/x.jsonl").write_text('{"prompt": "w3", "image": "a.png"}\n')
    files = batch._named(batch._files("rows/*.jsonl", Path("out")), "rows/*.jsonl")
    (row,) = batch._todo(files, 0, {}, Path("out"))
    assert row.asked[0]["content"][0]["path"] == f"{tmp_path}/rows/a.png"

"""Rows in and rows out: what can be read is read, what was made of something else is not gone on with."""

import io
import json

import pytest
from conftest import sum_reward, tiny_policy

from stars_fast import StarsConfig, StarsEngine
from stars_fast.loop.stream import Progress
from stars_fast.report.files import to_line
from stars_fast.rows import reading, records
from stars_fast.rows.pictures import with_pictures
from stars_fast.rows.reading import Row, lines_of, read_rows
from stars_fast.rows.records import record, resume, write_settings
from stars_fast.rows.responses import finished_rows
from stars_fast.scale.parts import fingerprint, is_same

NESTED = b"[" * 900 + b"]" * 900


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        (b'{"messages": [{"role": "user", "content": NaN}]}', "messages: holds NaN"),
        (b'{"messages": [{"role": "user", "content": "w3", "weight": 1e999}]}', "messages: holds NaN"),
        (b'{"messages": [{"role": "user", "content": "w3", "more": {"x": [-Infinity]}}]}', "messages: holds NaN"),
        (b'{"messages": [{"role": "user", "content": ' + NESTED + b"}]}", "nested more than 64 deep"),
        (b"[" * 100_000, "not JSON: maximum recursion depth"),
        (b'{"prompt_ids": [' + b"9" * 5000 + b"]}", "not JSON: Exceeds the limit"),
        (b"\xff\xfe", "not JSON"),
    ],
    ids=["NaN", "1e999", "deep inside", "nested", "brackets", "digits", "bytes"],
)
def test_a_line_that_could_not_be_written_out_again_is_an_error_row(line, cause):
    found = read_rows([b'{"prompt": "w3"}', line, b'{"prompt": "w4"}'], 0)
    assert [row.id for row in found if row.error is None] == [1, 3]
    assert cause in found[1].error and found[1].error.startswith("line 2: ") and len(found[1].error) < 200
    to_line(record(found[1], 0, error=found[1].error))


def test_a_key_that_is_not_echoed_may_hold_what_it_likes():
    assert read_rows([b'{"prompt": "w3", "score": NaN, "tree": ' + NESTED + b"}"], 0)[0].error is None


def test_a_line_without_an_end_is_read_in_pieces_and_costs_no_other(monkeypatch):
    monkeypatch.setattr(reading, "_LONGEST_LINE", 20)
    longest = b'{"prompt": "w3 w4w"}'
    file = io.BytesIO(longest + b"\r\n" + b'{"prompt": "' + b"w3 " * 100 + b'"}\n{"prompt": "w5"}\n' + b"x" * 99)
    found = read_rows(lines_of(file), 0)
    assert [row.prompt for row in found] == ["w3 w4w", None, "w5", None]
    assert [row.error for row in found[1::2]] == ["line 2: longer than 20 bytes", "line 4: longer than 20 bytes"]


def test_a_line_without_an_id_takes_none_of_the_others():
    assert [row.id for row in read_rows(['{"id": 2, "prompt": "w3"}', "{", '{"id": 3, "prompt": "w4"}'], 0)] == [
        2,
        "line 2",
        3,
    ]


@pytest.fixture
def output(tmp_path):
    """An output file with answers to three rows."""
    path = tmp_path / "out.jsonl"
    path.write_text("".join(to_line(record(row, 0, (5,), "w5", finish_reason="length")) for row in ROWS))
    write_settings(path, {})
    return path


ROWS = [Row("a", "w3", 1), Row(2, [{"role": "user", "content": "w4"}], 2), Row(3, [5, 6], 3)]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ([ROWS[0], Row(2, [{"role": "user", "content": "w5"}], 2), ROWS[2]], "under id 2:"),
        ([Row("a", "w3 ", 1), ROWS[1], Row(3, [5, 7], 3)], "under id 'a', 3:"),
        ([Row("a", "w3", 7), *ROWS[1:]], "under id 'a':"),
        ([Row("a", None, 1, "line 1: not JSON")], "under id 'a':"),
    ],
    ids=["messages", "text and ids", "seed", "broken"],
)
def test_answers_to_other_prompts_are_not_gone_on_with(output, changed, named):
    before = output.read_bytes()
    with pytest.raises(ValueError, match=rf"{output} holds answers to other prompts or seeds {named}"):
        resume(output, 1, changed, {})
    assert output.read_bytes() == before


def test_rows_may_come_go_and_change_their_order(output):
    assert resume(output, 1, [Row("new", "w9", 9), *ROWS[:0:-1]], {}) == {"a", 2, 3}


def test_a_changed_row_that_had_failed_is_done_again(output):
    with output.open("a") as file:
        file.write(to_line(record(Row("bad", "w7", 4), 0, error="out of luck")))
    assert resume(output, 1, [*ROWS, Row("bad", "w8", 4)], {}) == {"a", 2, 3}
    assert len(output.read_text().splitlines()) == 3


def test_what_is_torn_is_cut_where_there_is_no_room_for_a_copy(output, monkeypatch):
    whole = output.read_bytes()
    output.write_bytes(whole + whole[:30])

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records, "replacing", full)
    assert resume(output, 1, ROWS, {}) == {"a", 2, 3}
    assert output.read_bytes() == whole


@pytest.mark.parametrize("line", ['{"id": [1], "sample": 0, "completion": ""}', "[" * 99_999, "3"])
def test_a_line_of_something_else_is_no_row(output, line):
    with output.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match="line 4, is not a row that this command wrote"):
        resume(output, 1, ROWS, {})


@pytest.mark.parametrize("settings", ["{", "[]", json.dumps({"seed": 1})])
def test_settings_that_are_not_these_are_named(output, settings):
    output.with_name("out.jsonl.settings.json").write_text(settings)
    with pytest.raises(ValueError, match=r"out.jsonl.settings.json"):
        resume(output, 1, ROWS, {"seed": 0})


@pytest.mark.parametrize("name", ["chat_template_kwargs", "reward_file"])
def test_settings_that_only_one_of_two_runs_has_are_other_settings(output, name):
    for earlier, now in (({name: "x"}, {}), ({}, {name: "x"})):
        write_settings(output, {"seed": 0, **earlier})
        with pytest.raises(ValueError, match=rf"{name} was .* and is "):
            resume(output, 1, ROWS, {"seed": 0, **now})
    write_settings(output, {"seed": 0})
    assert len(resume(output, 1, ROWS, {"seed": 0, name: None})) == 3


def test_a_line_that_could_not_be_read_leaves_nothing_once_it_is_mended(tmp_path):
    path, settings = tmp_path / "out.jsonl", {"policy": "p"}
    write_settings(path, settings)
    broken, _ = read_rows(["not json", '{"prompt": "w3"}'], 0)
    path.write_text("".join(to_line(record(row, 0, error=row.error)) for row in (broken,)))
    mended = read_rows(['{"prompt": "w5"}', '{"prompt": "w3"}'], 0)
    assert resume(path, 1, mended, settings) == set() and path.read_text() == ""


A, B = {"type": "image", "path": "/pictures/a.png"}, {"type": "image", "path": "/b.png"}
DATA = {"type": "image", "url": "data:image/png;base64,AA=="}
WORDS = {"type": "text", "text": "w3"}
PLACE = {"type": "image"}
BASE64 = {"type": "image", "base64": "AA=="}
OPENAIS = {"type": "image_url", "image_url": {"url": A["path"]}}
UPPER = "DATA:image/png;base64,AA=="  # schemes are in either case


@pytest.mark.parametrize(
    ("prompt", "image", "parts"),
    [
        ("w3", "a.png", [A, WORDS]),
        ("w3", ["a.png", "/b.png", DATA["url"]], [A, B, DATA, WORDS]),
        ([{"role": "user", "content": "w3"}], "a.png", [A, WORDS]),
        ([{"role": "user", "content": [WORDS]}], ["a.png", "/b.png"], [A, B, WORDS]),
        ([{"role": "user", "content": [PLACE, WORDS, PLACE]}], ["a.png", "/b.png"], [A, WORDS, B]),
        ([{"role": "user", "content": [{"type": "image", "image": "a.png"}]}], None, [{**PLACE, "image": A["path"]}]),
        ([{"role": "user", "content": [{"type": "image", "path": "a.png"}, PLACE]}], "/b.png", [A, B]),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}]}], None, [OPENAIS]),
        ([{"role": "user", "content": [BASE64, PLACE]}], UPPER, [BASE64, {**DATA, "url": UPPER}]),
    ],
)
def test_pictures_stand_before_the_text_or_where_they_have_a_place(prompt, image, parts):
    assert with_pictures(prompt, image, "/pictures") == [{"role": "user", "content": parts}]


def test_pictures_are_the_first_users_and_a_prompt_without_any_stays_as_it_is():
    chat = [{"role": "system", "content": "w4"}, {"role": "user", "content": "w3"}, {"role": "user", "content": "w5"}]
    assert with_pictures(chat, "a.png", "/pictures") == [chat[0], {"role": "user", "content": [A, WORDS]}, chat[2]]
    for prompt in ("w3", [5, 6], chat):
        assert with_pictures(prompt, None, "/pictures") is prompt


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({"prompt": "w3", "image": 3}, "image: give a path or a data URL"),
        ({"prompt": "w3", "images": [3]}, "images: give a path or a data URL"),
        ({"prompt": "w3", "images": ["a.png"], "image": "a.png"}, "has image and images: give one"),
        ({"prompt": "w3", "image": ["a.png", ""]}, "image: give a path or a data URL"),
        ({"prompt_ids": [5], "image": "a.png"}, "image goes with a prompt, or with messages of a user"),
        ({"messages": [{"role": "system", "content": "w3"}], "image": "a.png"}, "image goes with a prompt, or"),
        ({"messages": [{"role": "user", "content": [PLACE, PLACE]}], "image": "a.png"}, "places for 2 pictures"),
        ({"messages": [{"role": "user", "content": [PLACE]}]}, "places for 1 pictures, and image has 0"),
    ],
)
def test_what_is_no_picture_or_has_no_place_is_an_error_row(fields, cause):
    (row,) = read_rows([json.dumps(fields)], 0)
    assert cause in row.error and row.error.startswith("line 1: ") and row.prompt is None


def test_a_picture_that_nothing_reads_is_an_error_of_its_row_which_names_file_and_line():
    lines = [
        '{"prompt": "w3", "image": "a.png"}',
        '{"prompt_ids": [3]}',
        json.dumps({"messages": [{"role": "user", "content": [A]}]}),
    ]
    engine, config = StarsEngine(tiny_policy(32), sum_reward), StarsConfig(max_new_tokens=2, target_reward=0.0)
    rows = read_rows(lines, 0, "prompts/rows.jsonl")
    found = [records[0] for records in finished_rows(engine, rows, config, 8, Progress(config.chosen_method))]
    assert [one["id"] for one in found if one["error"] is None] == [2]
    for record_, line in zip(found[:2], (1, 3), strict=True):
        assert f"prompts/rows.jsonl, line {line}: has a picture" in record_["error"]
        assert "processor=" in record_["error"]


def test_a_row_with_another_picture_is_another_row(tmp_path):
    row = Row("a", "w3", 1, image="a.png")
    path = tmp_path / "out.jsonl"
    path.write_text(to_line(record(row, 0, (5,), "w5", finish_reason="length")))
    write_settings(path, {})
    done = json.loads(path.read_text())
    assert done["image"] == "a.png" and "image" not in record(ROWS[0], 0)
    asked = fingerprint(done["prompt"], done["seed"], done["image"])
    assert resume(path, 1, [row], {}) == {"a"} and is_same(row, asked)
    for other in (Row("a", "w3", 1), Row("a", "w3", 1, image="b.png")):
        assert not is_same(other, asked)
        with pytest.raises(ValueError, match="other prompts or seeds under id 'a'"):
            resume(path, 1, [other], {})


def test_paths_start_where_the_row_was_read():
    (row,) = read_rows(['{"prompt": "w3", "image": "a.png"}'], 0, "there/rows.jsonl")
    assert row.asked[0]["content"][0]["path"] == "there/a.png" and row.prompt == "w3"
    (same,) = read_rows(['{"id": 1, "prompt": "w3", "images": "a.png"}'], 0, "there/rows.jsonl")
    assert same == row and read_rows(['{"prompt": "w3", "images": []}'], 0)[0].asked == "w3"
    assert Row(**json.loads(json.dumps(vars(row)))) == row  # as it goes to a worker


def test_many_bad_rows_are_each_named_and_prompts_are_read_a_few_times_at_most(monkeypatch):
    engine, config, read = (
        StarsEngine(tiny_policy(32), sum_reward),
        StarsConfig(max_new_tokens=2, target_reward=0.0),
        [],
    )
    prepare = engine.prepare
    monkeypatch.setattr(engine, "prepare", lambda given: read.append(len(given.prompts)) or prepare(given))
    rows = [Row(place, [3] if place % 3 == 2 else [90 + place], place) for place in range(30)]
    found = [records[0] for records in finished_rows(engine, rows, config, 30, Progress(config.chosen_method))]
    assert [one["id"] for one in found if one["error"] is None] == list(range(2, 30, 3))
    assert [one["error"] for one in found[:20]] == [
        f"the prompt holds id {90 + place}, outside the policy's vocabulary of 32"
        for place in range(30)
        if place % 3 < 2
    ]
    assert sum(read) <= 3 * len(rows)

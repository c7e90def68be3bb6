"""Files of the commands: settings within bounds, contents that change in one step, one run at a time."""

import os
import stat
from pathlib import Path

import pytest
import yaml

from stars_fast.report import files
from stars_fast.report.files import parse_yaml, read_yaml, replace_file, replacing, sole_run


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (
            "a0: &a0 [x,x]\n" + "".join(f"a{i}: &a{i} [{f'*a{i - 1},' * 9}]\n" for i in range(1, 30)),
            "more than 10000 val",
        ),
        ("a: &a {b: *a}", "alias to what it is part of"),
        ("a: &a\n  <<: *a\n", "alias to what it is part of"),
        ("[" * 500 + "]" * 500, "more than 50 deep"),
        ("a: [" + "x," * 20_000 + "]", "more than 10000 val"),
    ],
    ids=["bomb", "itself", "merged with itself", "deep", "long"],
)
def test_yaml_that_stands_for_too_much_is_refused(text, cause):
    with pytest.raises(ValueError, match=cause):
        parse_yaml(text)


def test_yaml_makes_no_objects_of_python():
    with pytest.raises(yaml.YAMLError, match="could not determine a constructor"):
        parse_yaml("a: !!python/object/apply:os.system ['true']")


def test_yaml_may_have_anchors_and_merges():
    text = "base: &base {a: 1, b: [2, 3]}\nown: {<<: *base, a: 4}\nlist: [*base, *base]\n"
    assert parse_yaml(text) == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("contents", "cause"),
    [
        (b"a: &a [*a]", "alias"),
        (b"\xff\xfe", "not UTF-8"),
        (b"a" * 300_000, "larger than 262,144 bytes"),
        (b"a: [", "not YA"),
    ],
)
def test_a_settings_file_that_cannot_be_used_is_named(tmp_path, contents, cause):
    path = tmp_path / "run.yaml"
    path.write_bytes(contents)
    with pytest.raises(ValueError, match=rf"{path}.*{cause}"):
        read_yaml(path, ["a"])


def test_a_file_is_replaced_in_one_step_and_keeps_its_mode(tmp_path):
    path = tmp_path / "settings.json"
    replace_file(path, "old")
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask()
    path.chmod(0o640)
    with pytest.raises(KeyboardInterrupt), replacing(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    replace_file(path, "new")
    assert path.read_text() == "new" and stat.S_IMODE(path.stat().st_mode) == 0o640
    assert os.listdir(tmp_path) == ["settings.json"]


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_no_planted_link_is_written_through(tmp_path, monkeypatch):
    monkeypatch.setattr(files.secrets, "token_hex", lambda count: "guessed")
    (tmp_path / "precious").write_text("precious")
    for name in ("out.lnk", ".out.guessed.tmp", ".out.lock"):
        (tmp_path / name).symlink_to("precious")
    with pytest.raises(FileExistsError):
        replace_file(tmp_path / "out", "text")
    with pytest.raises(OSError, match="symbolic link"), sole_run(tmp_path / "out"):
        pass
    replace_file(tmp_path / "out.lnk", "text")  # the link goes, not what it leads to
    assert (tmp_path / "precious").read_text() == "precious"


@pytest.mark.parametrize("name", ["out.jsonl", "."], ids=["file", "folder"])
def test_a_second_run_is_refused_until_the_first_is_over(tmp_path, name):
    output = tmp_path / name
    with sole_run(output):
        with pytest.raises(ValueError, match="another run is writing to"), sole_run(output):
            pass
        with sole_run(tmp_path / "other.jsonl"):
            pass
    with sole_run(output):
        pass
    assert os.listdir(tmp_path) == []


def test_a_lock_that_a_killed_run_left_holds_nobody(tmp_path):
    (tmp_path / ".out.jsonl.lock").touch()
    with sole_run(tmp_path / "out.jsonl"):
        pass


def test_a_lock_that_its_owner_took_away_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    lock, opened, true_open = tmp_path / ".out.lock", [], os.open

    def open_late(path, *arguments):
        opened.append(true_open(path, *arguments))
        if len(opened) == 1:  # between opening and locking, the owner ends
            lock.unlink()
        return opened[-1]

    monkeypatch.setattr(os, "open", open_late)
    with sole_run(tmp_path / "out"):
        assert len(opened) == 2 and os.path.samestat(os.fstat(opened[1]), lock.stat())


def test_without_locks_runs_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_fcntl", None)
    with sole_run(tmp_path / "out"), sole_run(tmp_path / "out"):
        assert not list(Path(tmp_path).iterdir())

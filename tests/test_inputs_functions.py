"""Rewards that are named by file."""

import pickle

import pytest

from stars_fast.inputs.functions import load_function


def test_two_files_of_one_name_are_two_modules(tmp_path):
    """What was loaded first is still found by what looks for it under its module, as pickles do."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rewards.py").write_text(f"def score(completions):\n    return {folder!r}\n")
    first, second = (load_function(f"{tmp_path / folder / 'rewards.py'}:score") for folder in ("a", "b"))
    assert (pickle.loads(pickle.dumps(first))([]), pickle.loads(pickle.dumps(second))([])) == ("a", "b")


def test_a_file_without_a_name_is_refused_with_what_it_defines_and_not_run(tmp_path):
    file = tmp_path / "rewards.py"
    file.write_text("raise SystemExit\ndef score(completions): ...\ndef _own(): ...\nboth = score\n")
    with pytest.raises(ValueError, match=r"give .*rewards.py:NAME; what is defined there is score, both"):
        load_function(str(file))

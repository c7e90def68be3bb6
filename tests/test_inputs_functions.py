"""Rewards that are named by file."""

import pickle

from stars_fast.inputs.functions import load_function


def test_two_files_of_one_name_are_two_modules(tmp_path):
    """What was loaded first is still found by what looks for it under its module, as pickles do."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rewards.py").write_text(f"def score(completions):\n    return {folder!r}\n")
    first, second = (load_function(f"{tmp_path / folder / 'rewards.py'}:score") for folder in ("a", "b"))
    assert (pickle.loads(pickle.dumps(first))([]), pickle.loads(pickle.dumps(second))([])) == ("a", "b")

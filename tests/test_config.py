"""StarsConfig: its fields and defaults, what it refuses, and that a saved one comes back."""

import dataclasses
import json
import math
from dataclasses import FrozenInstanceError

import pytest

from stars_fast import StarsConfig


def test_the_config_has_the_promised_fields_and_defaults():
    promised = {
        "segment_length": 16,
        "max_attempts": 20,
        "target_reward": None,
        "alpha": 0.5,
        "beta": 0.7,
        "candidates": "auto",
        "finished_threshold": "target",
        "max_new_tokens": 128,
        "temperature": None,
        "top_k": None,
        "top_p": None,
        "min_p": None,
        "repetition_penalty": None,
        "num_return_sequences": 1,
        "eos_token_id": None,
        "ignore_eos": False,
        "stop_strings": None,
        "method": "stars",
    }
    assert promised.items() <= dataclasses.asdict(StarsConfig()).items()


def test_the_config_is_frozen():
    with pytest.raises(FrozenInstanceError):
        StarsConfig().beta = 1.0


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"segment_length": 3, "target_reward": 1.25, "candidates": 4, "top_p": 0.9, "ignore_eos": True},
        {"target_reward": [0.5, -1.0], "eos_token_id": [3, 4], "stop_strings": ["a", "b\n"]},
        {"finished_threshold": "ramp", "num_return_sequences": 3},
        {"target_reward": -math.inf},
    ],
    ids=str,
)
def test_a_saved_config_comes_back_equal(tmp_path, fields):
    config = StarsConfig(**fields)
    config.save_pretrained(tmp_path / "new" / "folder")
    assert StarsConfig.from_pretrained(tmp_path / "new" / "folder") == config


@pytest.mark.parametrize(
    "text, said",
    [
        ('{"method": {"name": "best_of_n", "n": 1000000000000}}', "best_of_n: n=1000000000000 .* at most 65536"),
        ('{"top_k": 1e400}', "top_k=inf must be an integer"),
        ('{"alpha": 1e400}', "alpha=inf must lie in"),
        ('{"bogus": 1}', "'bogus' is not a field"),
        ("[1]", "holds a list: must be an object"),
        ("{", "Expecting property name"),
        ("[" * 100_000, "recursion"),
    ],
    ids=range(7),
)
def test_a_file_that_is_no_config_is_named_with_what_is_wrong(tmp_path, text, said):
    (tmp_path / "stars_config.json").write_text(text)
    with pytest.raises((ValueError, TypeError), match=rf"stars_config\.json: .*{said}"):
        StarsConfig.from_pretrained(tmp_path)


def test_a_saved_config_is_json(tmp_path):
    StarsConfig(beta=0.25).save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.json")
    assert json.loads(file.read_text())["beta"] == 0.25


@pytest.mark.parametrize("contents", ["{", "[" * 99_999, "[]", "\xff"], ids=["cut off", "deep", "list", "bytes"])
def test_a_file_that_holds_no_config_is_named(tmp_path, contents):
    (tmp_path / "stars_config.json").write_bytes(contents.encode("latin-1"))
    with pytest.raises((ValueError, TypeError), match=f"^{tmp_path}/stars_config.json: "):
        StarsConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "name, value, limit",
    [
        ("segment_length", 0, "1"),
        ("segment_length", -3, "1"),
        ("segment_length", 2.5, "integer"),
        ("max_attempts", 0, "1"),
        ("max_new_tokens", 0, "1"),
        ("num_return_sequences", 0, "1"),
        ("candidates", 0, "1"),
        ("candidates", "many", "auto"),
        ("alpha", -0.1, "0"),
        ("alpha", 1.5, "1"),
        ("alpha", math.nan, "1"),
        ("beta", 0.0, "0"),
        ("beta", -1.0, "0"),
        ("beta", math.nan, "0"),
        ("target_reward", math.nan, "NaN"),
        ("target_reward", "high", "number"),
        ("finished_threshold", "never", "ramp"),
        ("temperature", 0.0, "1e-06.*greedy"),
        ("temperature", 1e-38, "1e-06"),
        ("temperature", -1.0, "1e-06"),
        ("temperature", math.inf, "0"),
        ("temperature", 1e39, "1e\\+30"),
        ("repetition_penalty", 1e-46, "1e-06"),
        ("repetition_penalty", 1e39, "1e\\+06"),
        ("base_reward", math.inf, "sequence"),
        ("max_attempts", 2**31, "at most 2147483647"),
        ("max_new_tokens", 10**12, "at most 2147483647"),
        ("num_return_sequences", 10**8, "at most 65536"),
        ("top_k", -1, "0"),
        ("top_k", 2.5, "integer"),
        ("top_p", 0.0, "0"),
        ("top_p", 1.5, "1"),
        ("min_p", -0.5, "0"),
        ("min_p", 1.5, "1"),
        ("repetition_penalty", 0.0, "0"),
        ("eos_token_id", -1, "0"),
        ("eos_token_id", "</s>", "integer"),
        ("method", "magic", "stars"),
        ("stop_strings", [""], "empty"),
        ("stop_strings", 3, "string"),
    ],
)
def test_a_config_value_out_of_range_is_named_with_its_limit(name, value, limit):
    shown = str(value).strip("-[]'")
    with pytest.raises((ValueError, TypeError), match=rf"(?s){name}(?=.*{limit})") as caught:
        StarsConfig(**{name: value})
    assert shown in str(caught.value)
    with pytest.raises((ValueError, TypeError), match=name):
        StarsConfig().replace(**{name: value})

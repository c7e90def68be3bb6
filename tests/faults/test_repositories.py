"""Broken and hostile repositories: nothing in them is run, and each works or is one line of a normal error, in time."""

from __future__ import annotations

import pickle
import shutil
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import tiny_policy, tiny_reward, tiny_tokenizer
from faults.mutations import broken, code_of, malicious, pickles
from typer.testing import CliRunner

from stars_fast.cli import app

pytestmark = pytest.mark.filterwarnings("ignore")  # libraries have much to say of such folders
SECONDS = 5.0
BROKEN, MALICIOUS = broken(), malicious(Path("canary"))
ROWS = '{"prompt": "w5 w6"}\n{"messages": [{"role": "user", "content": "w6"}]}\n'
SETTINGS = ("max_new_tokens=2", "segment_length=2", "target_reward=0", "base_reward=0")


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A folder with a policy, its tokenizer and a reward model."""
    folder = tmp_path_factory.mktemp("sound")
    tiny_policy(32, layers=1).save_pretrained(folder / "policy")
    tiny_tokenizer(32).save_pretrained(folder / "policy")
    tiny_reward(32, layers=1).save_pretrained(folder / "reward")
    (folder / "rows.jsonl").write_text(ROWS)
    return folder


@pytest.fixture
def folder(sound, tmp_path, monkeypatch) -> Path:
    """A copy of the policy, to be changed; the hub cannot be reached."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return shutil.copytree(sound / "policy", tmp_path / "repository" / "policy")


def generate(policy: Path, sound: Path):
    """Run the command on a text and a chat."""
    models = ("--policy", str(policy), "--reward", str(sound / "reward"))
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    return CliRunner().invoke(app, ["generate", *models, "--input", str(sound / "rows.jsonl"), *settings])


def assert_clear(result, started: float) -> None:
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    complaints = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    if result.exit_code == 2:
        assert len(complaints) == 1 and result.stderr.endswith(complaints[0] + "\n") and len(complaints[0]) > 20
    else:
        assert result.exit_code in (0, 1) and complaints == []
        assert result.stdout.count("\n") == ROWS.count("\n")  # a line for every row, be it an error
    assert time.process_time() - started < SECONDS


def test_a_sound_folder_works(folder, sound):
    result = generate(folder, sound)
    assert result.exit_code == 0, result.stderr


def test_there_are_enough_of_them():
    assert len(BROKEN) >= 150 and len(MALICIOUS) >= 40


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_repository_is_one_line(name, folder, sound):
    BROKEN[name](folder)
    started = time.process_time()
    assert_clear(generate(folder, sound), started)


def test_what_is_planted_would_be_noticed(tmp_path):
    for name, contents in pickles(tmp_path / "canary").items():
        if "zip" in name or "old" in name:
            (tmp_path / "file").write_bytes(contents)
            torch.load(tmp_path / "file", weights_only=False)
        else:
            pickle.loads(contents)
        (tmp_path / "canary").rmdir()
    exec(code_of(tmp_path / "canary"), {})
    (tmp_path / "canary").rmdir()


@pytest.mark.parametrize("name", MALICIOUS)
def test_nothing_that_a_repository_brings_is_run(name, folder, sound, tmp_path):
    canary = tmp_path / "canary"
    malicious(canary)[name](folder)
    started = time.process_time()
    result = generate(folder, sound)
    assert not canary.exists()
    assert_clear(result, started)


@pytest.mark.parametrize(
    "name", ["weights cut to -1", "num_attention_heads=0", "pad_token_id=1000000", "hidden_size='x'"]
)
@pytest.mark.parametrize("command", ["doctor", "eval", "bench", "reward of generate"])
def test_every_command_says_it_in_one_line(command, name, folder, sound, tmp_path):
    BROKEN[name](folder)
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "w{i}"}}\n' for i in range(20)))
    sound_reward, changed = str(sound / "reward"), str(folder)
    arguments = {
        "doctor": ["doctor", "--policy", changed],
        "eval": ["eval", "--policy", changed, "--guide", sound_reward, "--judge", sound_reward, "--count", "2"],
        "bench": ["bench", "--policy", changed, "--reward", sound_reward],
        "reward of generate": ["generate", "--policy", str(sound / "policy"), "--reward", changed, "--prompt", "w3"],
    }[command]
    if command == "eval":
        arguments += ["--prompts", str(tmp_path / "prompts.jsonl"), "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.stderr.count("error: ") == 1 and result.stderr.splitlines()[-1].startswith("error: ")

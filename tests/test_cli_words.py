"""What a user of the shell reads speaks of options; a reward is named by file; a table is whole in a pipe."""

import json
import re

import pytest
from conftest import tiny_policy, tiny_tokenizer
from test_cli import invoke

from stars_fast.cli.console import plain_table, print_whole, stdout
from stars_fast.cli.words import in_options, speaking_of

SCRIPT = """
from stars_fast.rewards import RuleReward

def longest(prompts, completions, **_):
    return [float(len(one)) for one in completions]

def labelled(completions, label):
    return [0.0 for one in completions]

def lengths(texts):
    return [0.0 for text in texts]

number = 3

class Scorer:
    pass
"""


@pytest.mark.parametrize(
    ("said", "read"),
    [
        (
            "pass the policy's as tokenizer=, or reward_tokenizer='policy'",
            "--tokenizer, or --reward-tokenizer policy",
        ),
        ("8 tokens with max_new_tokens=128 exceed", "8 tokens with --max-new-tokens 128 exceed"),
        ("beta=-1.0 must lie in (0, inf)", "--set beta=-1.0 must lie in (0, inf)"),
        ("a lower one, or target_reward=None, which", "a lower one, or --set target_reward=none, which"),
        (
            "What stars_fast.fit(engine, prompts) returns, in calls with fit=",
            "`stars-fast fit` writes, in calls with --set fit=DIR",
        ),
        ("StarsConfig(method=RSD(draft=...)), of", "--method rsd --set draft=..., of"),
        ("(output.errors has them all; on_error='raise' raises the first)", "(each row's error says why)"),
        ("give the chat's messages as reward_prompts=", "the chat's messages as the row's messages"),
    ],
)
def test_arguments_are_read_as_options_once(said, read):
    assert read in in_options(said)
    assert in_options(in_options(said)) == in_options(said)


@pytest.mark.parametrize("message", ["--set 'method={name: stars}' and --set beta=1: x", "/runs/reward=3/beta=2.jsonl"])
def test_options_and_paths_stay_as_they_are(message):
    assert in_options(message) == message


def test_a_command_may_call_an_argument_otherwise():
    with speaking_of(reward="--guide", acceptance="--acceptance"):
        assert in_options("reward='x': no") == "--guide x: no"
        assert in_options("acceptance='2': no") == "--acceptance 2: no"
    assert in_options("reward='x': no") == "--reward x: no"


def test_a_warning_of_the_library_speaks_of_options(models, tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": f"w{i}"}) + "\n" for i in range(3, 9)))
    result = invoke(
        *("generate", *models, "--input", tmp_path / "in.jsonl", "--set", "segment_length=2"),
        *("--max-new-tokens", 8, "--set", "ignore_eos=true", "--set", "target_reward=900"),
    )
    (warning,) = [line for line in result.stderr.splitlines() if line.startswith("warning: hardly any")]
    assert "--set target_reward=900" in warning and "--set target_reward=none" in warning


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny_policy(32).save_pretrained(folder)
    tiny_tokenizer(32).save_pretrained(folder)
    (folder / "rewards.py").write_text(SCRIPT)
    return "--policy", str(folder), "--reward", str(folder / "rewards.py:longest")


def test_a_reward_is_a_function_of_a_file(models):
    options = ("--set", "target_reward=12", "--set", "base_reward=0", "--max-new-tokens", 6)
    result = invoke("generate", *models, "--prompt", "w3", "--json", *options)
    record = json.loads(result.stdout)
    assert result.exit_code == 0 and record["reward"] == len(record["completion"])


def test_another_text_in_the_file_is_another_reward(models, tmp_path):
    (tmp_path / "rewards.py").write_text(SCRIPT)
    (tmp_path / "in.jsonl").write_text('{"prompt": "w3"}\n')
    command = ("generate", *models[:2], "--reward", f"{tmp_path / 'rewards.py'}:longest", "--max-new-tokens", 4)
    command += ("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", "--method", "vanilla")
    assert invoke(*command).exit_code == 0
    made_with = json.loads((tmp_path / "out.jsonl.settings.json").read_text())
    assert made_with["reward_file"] and made_with["chat_template_kwargs"] is None
    (tmp_path / "rewards.py").write_text(SCRIPT.replace("float(len(one))", "-float(len(one))"))
    refused = invoke(*command)
    assert refused.exit_code == 2 and "reward_file was " in refused.stderr


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere.py:f", r"no file .*nowhere\.py"),
        ("rewards.py:longst", r"'longst' \(did you mean 'longest'\?\)"),
        ("rewards.py:number", "is a int: name a function"),
        ("rewards.py:Scorer", "is a class: name an instance"),
        ("rewards.py:labelled", "needs 'label', which it is not called with"),
        ("rewards.py:lengths", "takes texts: give it the parameters completions"),
        ("broken.py:f", r"running .*broken\.py raised ZeroDivisionError"),
        ("leaving.py:f", r"running .*leaving\.py raised SystemExit"),
    ],
)
def test_what_a_file_has_no_reward_for_is_said_in_a_line(models, tmp_path, name, said):
    (tmp_path / "rewards.py").write_text(SCRIPT)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "leaving.py").write_text("raise SystemExit\n")
    result = invoke("generate", *models[:2], "--reward", tmp_path / name, "--prompt", "w3")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert re.search(said, result.stderr) and f"--reward {tmp_path / name}" in result.stderr


def test_answers_and_a_methods_own_n_are_told_apart(models):
    result = invoke("generate", *models, "--prompt", "w3", "--n", 2, "--method", "best_of_n", "--set", "n=3", "--json")
    assert len(result.stdout.splitlines()) == 2 and "each of them best_of_n with n=3" in result.stderr


def test_a_table_in_a_pipe_is_whole(capsys):
    table = plain_table(None, ["kernel"], ["n" * 50, "m" * 50])
    table.add_row("k" * 40, "1" * 45, "2" * 45)
    print_whole(stdout(), table)
    shown = capsys.readouterr().out
    assert [part for part in ("n" * 50, "m" * 50, "k" * 40, "1" * 45, "2" * 45) if part not in shown] == []

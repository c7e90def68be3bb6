"""Runs that are killed, interrupted or out of room: gone on with, no row is lost, doubled, half-written or another."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import tiny_policy, tiny_reward, tiny_tokenizer
from faults.commands import start, wait_until
from typer.testing import CliRunner

from stars_fast.cli import app


class Run:
    """A command that writes into ``folder``, and what it writes when nothing disturbs it."""

    def __init__(self, arguments: list[str], folder: Path, file: str, key: tuple[str, str]) -> None:
        self.arguments, self.folder, self.file, self.key = arguments, folder, file, key
        self.go_on("undisturbed")
        self.texts = self.read("undisturbed")

    def command(self, name: str) -> list[str]:
        return [*self.arguments, "--output", str(self.folder / name)]

    def path(self, name: str) -> Path:
        return self.folder / name / self.file

    def go_on(self, name: str) -> None:
        result = CliRunner().invoke(app, self.command(name))
        assert result.exit_code == 0, result.stderr

    def read(self, name: str) -> dict:
        """The ids of every text, by its key; all lines but the last must be whole, and no key come twice."""
        lines = self.path(name).read_text().split("\n")[:-1]
        records = [json.loads(line) for line in lines]
        assert all(record["error"] is None for record in records)
        found = {tuple(record[part] for part in self.key): record["completion_ids"] for record in records}
        assert len(found) == len(records)
        return found

    def disturbed(self, name: str, lines: int, by: signal.Signals) -> tuple[int | None, str]:
        """Begin or go on, and send a signal once there are so many lines. The exit code, and what was said."""
        said = self.folder / "stderr"
        process = start(self.command(name), said)
        path = self.path(name)
        wait_until(lambda: path.exists() and path.read_bytes().count(b"\n") >= lines, process)
        assert process.is_alive(), said.read_text()
        os.kill(process.pid, by)
        process.join(120)
        return process.exitcode, said.read_text()

    def out_of_room(self, name: str, most_bytes: int) -> tuple[int | None, str]:
        """Begin or go on where no file can have more bytes."""
        said = self.folder / "stderr"
        process = start(self.command(name), said, most_bytes)
        process.join(120)
        return process.exitcode, said.read_text()


@pytest.fixture(scope="module", autouse=True)
def nothing_is_drawn() -> Iterator[None]:
    """By the runs of this process: a plot takes as long as what is evaluated here, and is told by what was written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stars_fast.evaluation.plots.plot", lambda rows, folder: None)
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    tiny_policy(32).save_pretrained(folder / "policy")
    tiny_tokenizer(32).save_pretrained(folder / "policy")
    tiny_reward(32, scale=3.0).save_pretrained(folder / "reward")
    return {"policy": str(folder / "policy"), "reward": str(folder / "reward")}


@pytest.fixture(scope="module")
def generate(models, tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("generate")
    rows = [{"id": f"r{i}", "prompt": f"w{i} w3"} for i in range(24)]
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = (
        f"generate --policy {models['policy']} --reward {models['reward']} --input {folder}/in.jsonl --batch-size 2"
    )
    settings = "max_new_tokens=24 ignore_eos=true target_reward=2 base_reward=0 max_attempts=4 num_return_sequences=2"
    return Run([*command.split(), *(f"--set={one}" for one in settings.split())], folder, "", ("id", "sample"))


@pytest.fixture(scope="module")
def evaluation(models, tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("eval")
    (folder / "in.jsonl").write_text("".join(json.dumps({"prompt": f"w{i} w3"}) + "\n" for i in range(28)))
    command = f"eval --policy {models['policy']} --guide {models['reward']} --judge {models['reward']}"
    command += f" --prompts {folder}/in.jsonl --count 12 --batch-size 2 --methods best_of_n --budgets 2"
    settings = ("--set=max_new_tokens=24", "--set=ignore_eos=true")
    return Run([*command.split(), *settings], folder, "generations.jsonl", ("cell", "place"))


@pytest.fixture(params=["generate", "evaluation"])
def command(request) -> Run:
    return request.getfixturevalue(request.param)


def test_a_run_killed_again_and_again_ends_as_one_that_was_not(command):
    for lines, by in ((2, signal.SIGKILL), (9, signal.SIGTERM), (16, signal.SIGKILL)):
        assert command.disturbed("killed", lines, by)[0] == -by
        assert command.read("killed").items() <= command.texts.items()
    command.go_on("killed")
    assert command.read("killed") == command.texts


def test_an_interrupted_run_says_how_to_go_on_and_keeps_what_it_wrote(command):
    code, said = command.disturbed("interrupted", 8, signal.SIGINT)
    assert code == 130 and "interrupted" in said and "run the same command again to go on" in said
    written = command.path("interrupted").read_bytes()
    command.go_on("interrupted")
    assert command.read("interrupted") == command.texts
    assert (
        command.path("interrupted").read_bytes().startswith(written[: written.rfind(b"\n", 0, len(written) // 2) + 1])
    )


def test_a_run_out_of_room_says_so_and_goes_on_when_there_is_some(command):
    size = command.path("undisturbed").stat().st_size
    for share in (0.3, 0.3, 0.7):  # the second time there is no more room than before
        code, said = command.out_of_room("full", int(share * size))
        assert code == 1 and "File too large" in said and "run the same command again to go on" in said
        assert "Traceback" not in said
        assert command.read("full").items() <= command.texts.items()
    command.go_on("full")
    assert command.read("full") == command.texts


def test_one_of_two_runs_on_one_output_is_refused(command):
    first = start(command.command("twice"), command.folder / "first")
    wait_until(lambda: command.path("twice").exists() and command.path("twice").stat().st_size > 0, first)
    second = CliRunner().invoke(app, command.command("twice"))
    assert second.exit_code == 2 and "another run is writing to" in second.stderr
    first.join(120)
    assert first.exitcode == 0 and command.read("twice") == command.texts

"""Rows with pictures are answered as the engine answers their chats; one that is not there costs its row alone."""

import base64
import json

import pytest
from conftest import sum_reward
from tiny_pictures import asked, llava, llava_processor, picture
from typer.testing import CliRunner

from stars_fast import StarsConfig, StarsEngine
from stars_fast.cli import app
from stars_fast.rows.reading import row_seed

CONFIG = StarsConfig(segment_length=4, max_attempts=3, target_reward=1.0, beta=0.5, max_new_tokens=8)
REWARD = """
def score(prompts, completions, completion_ids):
    return [((3 * sum(ids) + len(ids)) % 17) / 6 - 1 for ids in completion_ids]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A policy with its processor beside it, a reward, pictures, and rows that show them."""
    folder = tmp_path_factory.mktemp("pictures")
    llava().save_pretrained(folder / "policy")
    llava_processor().save_pretrained(folder / "policy")
    (folder / "reward.py").write_text(REWARD)
    (folder / "rows").mkdir()
    for seed in (1, 2):
        picture(seed).save(folder / "rows" / f"{seed}.png")
    return folder


@pytest.fixture(scope="module")
def engine():
    return StarsEngine(llava(), lambda completion_ids: sum_reward(completion_ids), processor=llava_processor())


def generate(folder, *options):
    settings = ("segment_length=4", "max_attempts=3", "target_reward=1.0", "beta=0.5", "max_new_tokens=8")
    chosen = [part for setting in settings for part in ("--set", setting)]
    models = ("--policy", folder / "policy", "--reward", f"{folder / 'reward.py'}:score")
    return CliRunner().invoke(app, ["generate", *map(str, (*models, *chosen, *options))])


def test_rows_are_answered_as_the_engine_answers_their_chats(folder, engine):
    data = base64.b64encode((folder / "rows" / "2.png").read_bytes()).decode()
    there = str(folder / "rows" / "1.png")
    rows = [
        ({"id": "a", "prompt": "what?", "image": "1.png"}, asked(picture(1), text="what?")),
        ({"id": "b", "prompt": "what?", "image": f"data:image/png;base64,{data}"}, asked(picture(2), text="what?")),
        ({"id": "c", "prompt": "what?", "image": [there, "2.png"]}, asked(picture(1), picture(2), text="what?")),
        ({"id": "d", "messages": asked("2.png", text="and this?")}, asked(picture(2), text="and this?")),
        ({"id": "e", "prompt": "no picture"}, "no picture"),
    ]
    broken = {"id": "f", "prompt": "what?", "image": "missing.png"}
    lines = [json.dumps(row) for row in (*(row for row, _ in rows), broken)]
    (folder / "rows" / "in.jsonl").write_text("\n".join(lines))
    out = folder / "out.jsonl"
    result = generate(folder, "--input", folder / "rows" / "in.jsonl", "--output", out)
    assert result.exit_code == 1, result.output
    found = {record["id"]: record for record in map(json.loads, out.read_text().splitlines())}
    want = engine.generate([prompt for _, prompt in rows], CONFIG, seed=[row_seed(0, row["id"]) for row, _ in rows])
    assert [found[row["id"]]["completion"] for row, _ in rows] == want.texts
    assert len(set(want.texts[:2])) == 2, "the picture was not seen"
    assert "missing.png" in found["f"]["error"] and found["f"]["completion"] is None
    assert found["c"]["image"] == [there, "2.png"] and "image" not in found["e"]
    again = generate(folder, "--input", folder / "rows" / "in.jsonl", "--output", out)
    assert again.exit_code == 1 and "5 were there before" in again.stderr


def test_a_prompt_is_answered_with_pictures_and_a_processor_from_elsewhere(folder, engine, tmp_path):
    llava().save_pretrained(tmp_path)
    options = ("--prompt", "what?", "--image", folder / "rows" / "1.png", "--policy", tmp_path, "--json")
    result = generate(folder, *options, "--processor", folder / "policy")
    assert result.exit_code == 0, result.output
    want = engine.generate([asked(picture(1), text="what?")], CONFIG, seed=[row_seed(0, 1)])
    assert json.loads(result.stdout)["completion"] == want.texts[0]


def test_pictures_without_a_processor_or_a_prompt_are_refused(folder, tmp_path):
    llava().save_pretrained(tmp_path)
    llava_processor().tokenizer.save_pretrained(tmp_path)
    result = generate(folder, "--prompt", "what?", "--image", folder / "rows" / "1.png", "--policy", tmp_path)
    assert result.exit_code == 1 and "line 1: has a picture" in result.stderr and "--processor" in result.stderr
    result = generate(folder, "--input", folder / "rows" / "in.jsonl", "--image", "1.png")
    assert result.exit_code == 2 and "--image is of --prompt" in result.stderr


def test_methods_are_compared_on_rows_with_pictures_which_guide_and_judge_may_see(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("stars_fast.evaluation.plots.plot", lambda rows, output: None)  # it takes seconds
    (folder / "looks.py").write_text(
        "def looks(completion_ids, images):\n"
        "    return [float(len(shown) == 1 and sum(ids) % 7) for ids, shown in zip(completion_ids, images)]\n"
    )
    rows = [{"prompt": f"what is {n}?", "image": f"{n}.png"} for n in (1, 2)]
    prompts = folder / "rows" / "eval.jsonl"
    prompts.write_text("\n".join(map(json.dumps, rows)))
    reward = f"{folder / 'looks.py'}:looks"
    models = ("--policy", folder / "policy", "--guide", reward, "--judge", reward)
    how = ("--methods", "best_of_n", "--budgets", "2", "--max-new-tokens", 6, "--output", tmp_path)
    options = ("--prompts", prompts, "--count", 2, *models, *how)
    result = CliRunner().invoke(app, ["eval", *map(str, options)])
    assert result.exit_code == 0, result.output
    found = [json.loads(line) for line in (tmp_path / "generations.jsonl").read_text().splitlines()]
    assert len(found) == 4 and all(row["error"] is None for row in found) and any(row["judge"] for row in found)
    prompts.write_text(json.dumps({**rows[0], "image": 3}))
    result = CliRunner().invoke(app, ["eval", *map(str, options)])
    assert result.exit_code == 2 and "row 1: image: give a path" in result.stderr

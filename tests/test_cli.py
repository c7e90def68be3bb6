"""What the command ``stars-fast`` promises."""

import json
import os
import re
from pathlib import Path
from statistics import fmean

import pytest
from conftest import tiny_policy, tiny_reward
from transformers import BertConfig, BertForSequenceClassification
from typer.testing import CliRunner

from stars_fast import Fit, StarsConfig, StarsEngine, demo
from stars_fast.cli import app, batch
from stars_fast.cli.settings import read_settings
from stars_fast.loop.stream import Progress
from stars_fast.methods import BestOfN, OptimalStopping, Stars
from stars_fast.outputs import SegmentEvent, SegmentTrace
from stars_fast.report.files import sole_run
from stars_fast.report.trace import load_trace
from stars_fast.rows import responses
from stars_fast.rows.reading import read_rows, row_seed

ROWS = [
    {"id": "a", "prompt": "w3 w4"},
    {"prompt": "w5"},
    {"id": "chat", "messages": [{"role": "user", "content": "w6"}]},
    {"id": 17, "prompt_ids": [7, 8, 9]},
    {"id": "own seed", "prompt": "w3 w4", "seed": 5},
]
SETTINGS = ("max_new_tokens=14", "segment_length=4", "max_attempts=6", "beta=0.3")
DEMO = ("demo", "--prompts", "1", "--max-new-tokens", "32")


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer32) -> tuple[str, ...]:
    """Options that name a tiny policy and a tiny reward model on disk."""
    folder = tmp_path_factory.mktemp("models")
    for name, model in (("policy", tiny_policy(32)), ("reward", tiny_reward(32, scale=3.0))):
        model.save_pretrained(folder / name)
    tokenizer32.save_pretrained(folder / "policy")
    return "--policy", str(folder / "policy"), "--reward", str(folder / "reward")


@pytest.fixture
def generate(models, tmp_path):
    """Run ``generate`` on rows (or raw lines) into a file; returns the result and the records."""

    def run(rows, *options, output="out.jsonl", settings=SETTINGS):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
        chosen = [part for setting in settings for part in ("--set", setting)]
        out = tmp_path / output
        result = invoke("generate", *models, "--input", tmp_path / "in.jsonl", "--output", out, *chosen, *options)
        return result, read(out) if out.exists() else []

    return run


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_same(records, others) -> None:
    """The same texts for the same ids; rewards up to what another batch rounds differently."""
    key = lambda record: (str(record["id"]), record["sample"])  # noqa: E731
    for one, other in zip(sorted(records, key=key), sorted(others, key=key), strict=True):
        rewards = one.pop("reward"), other.pop("reward")
        assert rewards == pytest.approx(rewards[::-1], abs=1e-4)
        for a, b in zip(one.pop("segments"), other.pop("segments"), strict=True):
            assert a == pytest.approx(b, abs=1e-4)
        assert one == other


# demo


def test_demo_shows_both_texts_the_segments_and_the_figures_in_80_columns():
    result = invoke(*DEMO)
    assert result.exit_code == 0, result.stderr
    shown = ["vanilla", "guided", "log-odds", "enough", "candidates per segment", "policy tokens per token returned"]
    assert [word for word in shown if word not in result.stdout] == []
    assert result.stdout.count("reward ") >= 3
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_demo_prints_python_that_does_the_same():
    output = invoke(*DEMO, "--seed", "3").stdout
    namespace = {}
    exec(output.partition("The same in Python:")[2], namespace)
    mean_reward = re.search(r"mean reward +(\S+) +(\S+)", output)[2]
    assert float(mean_reward) == pytest.approx(fmean(namespace["out"].rewards), abs=0.011)


@pytest.mark.parametrize("options", [("--prompts", 9), ("--candidates", "some"), ("--max-new-tokens", 5000)])
def test_demo_refuses_what_it_cannot_do_in_one_line(options):
    result = invoke("demo", *options)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert str(options[1]) in result.stderr


# fit


def test_a_fit_is_learned_once_and_serves_generate(generate, models, tmp_path):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"w{3 + i}"}) + "\n" for i in range(12)))
    chosen = ("--set", "max_new_tokens=14", "--set", "segment_length=4")
    made = invoke(
        "fit", *models, "--input", tmp_path / "prompts.jsonl", "--output", tmp_path / "fit", "--samples", 4, *chosen
    )
    assert made.exit_code == 0, made.stderr
    assert "12 prompts" in made.stdout
    assert [
        name for name in ("fit 1/3: unguided", "fit 2/3: best of 3", "fit 3/3: best of 4") if name not in made.stderr
    ] == []
    assert "over the one" not in made.stderr and f"--fit {tmp_path / 'fit'}\n" in made.stderr
    options = ("--fit", tmp_path / "fit", "--set", "method=optimal_stopping")
    result, records = generate(ROWS, *options)
    assert result.exit_code == 0, result.stderr
    assert len(records) == len(ROWS)
    assert (tmp_path / "out.jsonl.settings.json").stat().st_size < 2000, "a digest of the fit"
    again = invoke(
        *("fit", *models, "--input", tmp_path / "prompts.jsonl", "--output", tmp_path / "fit", "--samples", 4, *chosen),
        *("--seed", 1),
    )
    assert again.exit_code == 0 and "over the one that was there" in again.stderr
    result, _ = generate(ROWS, *options)
    assert result.exit_code == 2 and re.search("settings.json.: fit was '[0-9a-f]{16}' and is '", result.stderr)
    refused, _ = generate(ROWS, *options, "--set", "temperature=0.5", output="other.jsonl")
    assert refused.exit_code == 2
    assert "temperature is 0.5 here, 1.0 in the fit" in refused.stderr


def test_a_fit_of_a_bad_row_is_refused_by_line(models, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": 3}\n')
    result = invoke("fit", *models, "--input", tmp_path / "prompts.jsonl", "--output", tmp_path / "fit")
    assert result.exit_code == 2
    assert "line 1: prompt is a int" in result.stderr
    assert not (tmp_path / "fit").exists()


@pytest.mark.parametrize(
    "place, why", [("file", "is a file"), ("file/fit", "is a file"), ("shut/fit", "no permission to write")]
)
def test_a_fit_that_could_not_be_written_is_refused_before_it_is_made(models, tmp_path, monkeypatch, place, why):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "w3"}\n' * 12)
    (tmp_path / "file").touch()
    (tmp_path / "shut").mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, *args: path != tmp_path / "shut" and access(path, *args))
    monkeypatch.setattr("stars_fast.cli.models.load_engine", lambda *args: pytest.fail("models were loaded"))
    result = invoke("fit", *models, "--input", tmp_path / "prompts.jsonl", "--output", tmp_path / place)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert f"--output {tmp_path / place}: " in result.stderr and why in result.stderr


# generate


def test_a_chat_templates_variables_are_given_as_json(generate, models, monkeypatch):
    seen, prepare = [], StarsEngine.prepare

    def watch(self, arguments):
        seen.append(arguments.chat_template_kwargs)
        return prepare(self, arguments)

    monkeypatch.setattr(StarsEngine, "prepare", watch)
    result, records = generate(ROWS[2:3], "--chat-template-kwargs", '{"enable_thinking": false}')
    assert result.exit_code == 0 and records[0]["error"] is None and seen == [{"enable_thinking": False}]
    for wrong in ("{", "[1]", '{"tokenize": true}'):
        result, _ = generate(ROWS[2:3], "--chat-template-kwargs", wrong, output="other.jsonl")
        assert result.exit_code == 2 and "--chat-template-kwargs" in result.stderr


def test_every_row_of_the_input_has_a_row_in_the_output(generate):
    result, records = generate(ROWS)
    assert result.exit_code == 0, result.stderr
    assert {record["id"] for record in records} == {"a", 2, "chat", 17, "own seed"}
    assert result.stdout == "" and "5 rows written" in result.stderr
    for record in records:
        assert record["error"] is None and record["finish_reason"] in ("stop", "length")
        assert record["tokens"] == len(record["completion_ids"]) == sum(s["tokens"] for s in record["segments"])
        assert record["reward"] == record["segments"][-1]["reward"]
        assert record["completion"].startswith("w")


def test_a_row_gets_what_the_engine_gives_for_its_seed(generate, models):
    from stars_fast import StarsEngine

    _, records = generate(ROWS)
    own = next(record for record in records if record["id"] == "own seed")
    engine = StarsEngine(models[1], models[3])
    config = {"max_new_tokens": 14, "segment_length": 4, "max_attempts": 6, "beta": 0.3}
    assert own["seed"] == 5
    assert engine.generate("w3 w4", seed=[5], **config).completions[0] == own["completion_ids"]


def test_neither_order_nor_batches_change_a_text(generate):
    _, records = generate(ROWS)
    rows = [{"id": 2, **row} for row in reversed(ROWS)]  # the row that lived by its line number keeps it
    _, others = generate(rows, "--batch-size", 2, "--max-rows", 3, output="other.jsonl")
    assert_same(records, others)


def test_a_trace_holds_what_each_answer_was_chosen_from_and_changes_no_row(generate, tmp_path):
    rows, path = [*ROWS, {"id": "bad"}], tmp_path / "trace.jsonl"
    _, plain = generate(rows, "--n", 2, "--batch-size", 2)
    _, records = generate(rows, "--n", 2, "--batch-size", 2, "--trace", path, output="traced.jsonl")
    assert_same(plain, records)
    told = load_trace(path)
    places = [(one["row"], one["prompt_index"], one["sample_index"]) for one in told]
    assert places == [(row, row // 2, row % 2) for row in range(2 * len(ROWS))]
    ids = sorted(one["completion_ids"] for one in records if one["error"] is None)
    assert sorted(one["tokens"] for one in told) == ids
    assert all(len(segment["candidates"]) >= segment["attempts"] for one in told for segment in one["segments"])
    shown = invoke("trace", path, "--row", 3)
    assert shown.exit_code == 0 and "row 3, stars" in shown.stdout


def test_a_run_that_is_interrupted_leaves_the_trace_that_was_there(generate, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    path = tmp_path / "trace.jsonl"
    path.write_text("before")
    monkeypatch.setattr(responses, "_gathered", interrupt)
    result, _ = generate(ROWS, "--trace", path)
    assert result.exit_code == 130 and path.read_text() == "before"


def test_a_run_that_answers_nothing_leaves_the_trace_that_was_there(generate, tmp_path):
    for _ in range(2):  # the row without a prompt is tried again
        result, _ = generate([*ROWS[:1], {"id": "bad"}], "--trace", tmp_path / "trace.jsonl")
        assert result.exit_code == 1 and len(load_trace(tmp_path / "trace.jsonl")) == 1


@pytest.mark.parametrize("share", [0.0, 0.3, 0.55, 0.999])
def test_a_run_that_was_cut_off_ends_with_the_same_rows(generate, tmp_path, share):
    _, whole = generate(ROWS)
    contents = (tmp_path / "out.jsonl").read_bytes()
    cut = contents[: int(share * len(contents))]
    (tmp_path / "cut.jsonl").write_bytes(cut)
    result, records = generate(ROWS, output="cut.jsonl")
    assert result.exit_code == 0, result.stderr
    kept = cut[: cut.rfind(b"\n") + 1]
    assert (tmp_path / "cut.jsonl").read_bytes().startswith(kept)
    assert_same(records, whole)


def test_an_interrupted_run_says_how_to_go_on_and_does(generate, monkeypatch):
    _, whole = generate(ROWS, output="whole.jsonl")
    true_record, calls = responses.record, iter(range(99))

    def interrupted(*arguments, **fields):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return true_record(*arguments, **fields)

    monkeypatch.setattr(responses, "record", interrupted)
    result, records = generate(ROWS)
    assert result.exit_code == 130 and "run the same command again" in result.stderr
    assert len(records) == 2
    result, records = generate(ROWS)
    assert "3 rows written" in result.stderr and "2 were there before" in result.stderr
    assert_same(records, whole)


def test_a_finished_run_is_not_repeated(generate, tmp_path):
    generate(ROWS)
    before = (tmp_path / "out.jsonl").read_bytes()
    result, _ = generate(ROWS)
    assert result.exit_code == 0 and "nothing to do" in result.stderr
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_samples_of_a_row_are_cut_and_redone_together(generate, tmp_path):
    settings = (*SETTINGS, "num_return_sequences=3")
    _, whole = generate(ROWS[:2], settings=settings)
    assert [(record["id"], record["sample"]) for record in whole].count(("a", 2)) == 1
    lines = (tmp_path / "out.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "cut.jsonl").write_bytes(b"".join(lines[:5]) + lines[5][:20])
    _, records = generate(ROWS[:2], output="cut.jsonl", settings=settings)
    assert_same(records, whole)


def test_rows_that_failed_are_tried_again_and_the_others_stay(generate, tmp_path, monkeypatch):
    _, whole = generate(ROWS, output="whole.jsonl")
    true_record = responses.record

    def failing(row, *arguments, **fields):
        return {**true_record(row, *arguments, **fields), **({"error": "out of luck"} if row.id in (2, 17) else {})}

    monkeypatch.setattr(responses, "record", failing)
    result, records = generate(ROWS, output="out.jsonl")
    assert result.exit_code == 1 and "5 rows written" in result.stderr and "2 with an error" in result.stderr
    monkeypatch.undo()
    sound = [record for record in records if record["error"] is None]
    result, records = generate(ROWS)
    assert result.exit_code == 0 and "2 rows written" in result.stderr and "3 were there before" in result.stderr
    assert records[:3] == sound
    assert_same(records, whole)
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.jsonl", "out.jsonl.settings.json"]


def test_a_failed_row_that_this_input_lacks_stays(generate):
    _, (failed,) = generate([{"id": "bad"}])
    result, records = generate([ROWS[0]])
    assert result.exit_code == 0, result.stderr
    assert records[0] == failed and records[1]["id"] == "a"


@pytest.mark.parametrize(
    ("options", "settings", "named"),
    [
        (("--seed", 1), SETTINGS, "seed was 0 and is 1"),
        (("--reward-tail", "none"), SETTINGS, "reward_tail was 'auto' and is 'none'"),
        ((), (*SETTINGS, "method=best_of_n"), "method was 'stars' and is 'best_of_n'"),
    ],
)
def test_an_output_is_not_gone_on_with_under_other_settings(generate, tmp_path, options, settings, named):
    generate(ROWS[:2])
    before = (tmp_path / "out.jsonl").read_bytes()
    result, _ = generate(ROWS, *options, settings=settings)
    assert result.exit_code == 2 and named in result.stderr and result.stderr.count("\n") == 1
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_an_output_goes_on_where_its_settings_cannot_differ_in_a_text(generate, tmp_path):
    _, whole = generate(ROWS, output="whole.jsonl")
    generate(ROWS[:2])
    result, records = generate(ROWS, "--batch-size", 2, settings=(*SETTINGS, "candidates=2"))
    assert result.exit_code == 0, result.stderr
    assert_same(records, whole)
    (tmp_path / "out.jsonl.settings.json").unlink()  # as earlier versions left it
    result, _ = generate(ROWS, "--reward-tail", "none")
    assert result.exit_code == 0 and "nothing to do" in result.stderr
    (tmp_path / "out.jsonl").write_text("")
    assert generate(ROWS, "--seed", 1)[0].exit_code == 0


def test_answers_to_other_prompts_are_refused_by_id(generate, tmp_path):
    generate(ROWS[:2])
    before = (tmp_path / "out.jsonl").read_bytes()
    result, _ = generate([{"id": "a", "prompt": "w9"}, *ROWS[1:]])
    assert result.exit_code == 2 and "other prompts or seeds under id 'a':" in result.stderr
    assert (tmp_path / "out.jsonl").read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_an_output_that_is_a_link_stays_one(generate, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out.jsonl").symlink_to("elsewhere/true.jsonl")
    _, whole = generate(ROWS[:2])
    contents = (tmp_path / "elsewhere/true.jsonl").read_bytes()
    (tmp_path / "elsewhere/true.jsonl").write_bytes(contents[:-9])
    _, records = generate(ROWS[:2])
    assert_same(records, whole)
    assert (tmp_path / "out.jsonl").is_symlink() and sorted(
        path.name for path in (tmp_path / "elsewhere").iterdir()
    ) == [
        "true.jsonl",
        "true.jsonl.settings.json",
    ]


def test_a_run_beside_another_on_one_output_is_refused(generate, tmp_path):
    with sole_run(tmp_path / "out.jsonl"):
        result, records = generate(ROWS[:1])
    assert (result.exit_code, records) == (2, []) and "another run is writing to" in result.stderr


def test_an_answer_that_the_tokenizer_cannot_write_costs_one_row():
    class Fickle:
        def decode(self, tokens, **_):
            if 7 in tokens and len(tokens) > 1:  # no id by itself is to blame
                raise RuntimeError("not today")
            return " ".join(f"w{token}" for token in tokens)

    class Engine:
        tokenizer = Fickle()

    def event(place, tokens):
        return SegmentEvent(place, place, 0, SegmentTrace(tokens, 1.0, 0.0, 1, True, -1.0), None, "length")

    rows, config = read_rows(['{"prompt": "w3"}', '{"prompt": "w4"}'], 0), StarsConfig()
    events = [event(0, (7, 8)), event(1, (5,))]
    (bad,), (good,) = responses._gathered(Engine, events, rows, config, Progress(Stars()))
    assert bad["finish_reason"] == "length" and bad["reward"] == 1.0 and bad["completion"] == ""
    assert bad["error"] == "its text could not be decoded: the tokenizer raised RuntimeError: not today"
    assert bad["completion_ids"] == [7, 8] and good["completion"] == "w5" and good["error"] is None


@pytest.mark.parametrize(
    ("row", "cause"),
    [
        ("{not json", "not JSON"),
        ('{"messages": [{"role": "user", "content": NaN}]}', "messages: holds NaN"),
        ('["a list"]', "a JSON list"),
        (r'{"prompt": "\ud800"}', "surrogate"),
        ({"id": "x"}, "none of prompt, messages, prompt_ids"),
        ({"prompt": "w3", "prompt_ids": [3]}, "prompt and prompt_ids"),
        ({"prompt": 3}, "prompt is a int"),
        ({"prompt": ""}, "empty"),
        ({"prompt_ids": [3, 77]}, "id 77"),
        ({"prompt": "w3 " * 300}, "300 tokens"),
        ({"messages": [{"role": "user", "content": "w3"}, 3]}, "messages"),
        ({"prompt": "w3", "seed": "x"}, "seed='x'"),
        ({"prompt": "w3", "id": [1]}, "id=[1]"),
    ],
)
def test_a_bad_row_becomes_an_error_row_and_costs_no_other(generate, row, cause):
    result, records = generate([ROWS[0], row, ROWS[3]])
    assert result.exit_code == 1, result.stderr
    bad = next(record for record in records if record["id"] not in ("a", 17))
    assert cause in bad["error"] and bad["finish_reason"] == "error" and bad["reward"] is None
    assert [record["error"] for record in records if record is not bad] == [None, None]
    assert "1 with an error" in result.stderr


def test_the_bar_shows_an_acceptance_only_where_candidates_are_tested(generate):
    assert "acceptance" in generate(ROWS[:1])[0].stderr
    result, _ = generate(ROWS[:1], output="best.jsonl", settings=("max_new_tokens=4", "method={name: best_of_n, n: 2}"))
    assert result.exit_code == 0, result.stderr
    assert "tokens/s" in result.stderr and "acceptance" not in result.stderr


def test_a_method_with_parameters_can_be_set(generate):
    settings = ("max_new_tokens=4", "method={name: best_of_n, n: 3}")
    result, records = generate(ROWS[:1], settings=settings)
    assert result.exit_code == 0, result.stderr
    assert records[0]["segments"][0]["attempts"] == 3
    assert read_settings(None, ["stop_strings={w3}"]).config.stop_strings == ("{w3}",)  # a mapping in YAML, too


def test_rows_with_one_id_are_refused(generate):
    result, records = generate([ROWS[0], ROWS[0]])
    assert (result.exit_code, records) == (2, [])
    assert "lines 1 and 2 have the same id 'a'" in result.stderr


def test_answers_to_prompts_on_the_command_line_stand_alone_on_stdout(models):
    options = ("generate", *models, "--prompt", "w3", "--prompt", "w4", "--n", 2, "--set", "target_reward=-inf")
    result = invoke(*options)
    texts = [json.loads(line)["completion"] for line in invoke(*options, "--json").stdout.splitlines()]
    assert result.exit_code == 0 and len(texts) == 4
    assert sorted(result.stdout.splitlines()) == sorted(texts)
    assert result.stderr.count("reward ") == 4


def test_a_prompt_may_be_a_users_turn(generate, models):
    result = invoke("generate", *models, "--chat", "--prompt", "w6", "--json", "--max-new-tokens", 5)
    record = json.loads(result.stdout)
    assert record["prompt"] == [{"role": "user", "content": "w6"}]
    _, (row,) = generate([{"messages": record["prompt"], "seed": record["seed"]}], settings=("max_new_tokens=5",))
    assert row["completion_ids"] == record["completion_ids"]


def test_prompts_on_the_command_line_go_to_stdout_as_json_lines_where_asked(models):
    result = invoke("generate", *models, "--prompt", "w3", "--prompt", "w4", "--set", "target_reward=-inf", "--json")
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert {record["prompt"] for record in records} == {"w3", "w4"}
    assert records[0]["segments"][0]["threshold"] is None  # -inf, which JSON cannot say


def test_a_row_that_failed_shows_in_the_exit_status_on_stdout_too(models):
    result = invoke("generate", *models, "--prompt", "w3", "--prompt", "", "--set", "max_new_tokens=4")
    assert result.exit_code == 1 and "2 rows, 1 with an error" in result.stderr and "error: " in result.stderr
    assert len(result.stdout.splitlines()) == 1


def test_the_shipped_models_are_called_demo():
    result = invoke(
        *("generate", "--policy", "demo", "--reward", "demo", "--prompt", "The film", "--json"),
        *("--max-new-tokens", 8, "--method", "best_of_n", "--set", "n=2"),
    )
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["tokens"] <= 8


def test_a_yaml_file_sets_fields_and_models_and_the_command_line_wins(models, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(f"policy: {models[1]}\nreward: {models[3]}\nbeta: 1e-1\ntarget_reward: -.inf\nmax_new_tokens: 9\n")
    options = ("--config", file, "--prompt", "w3", "--set", "ignore_eos=true", "--json")
    assert json.loads(invoke("generate", *options).stdout)["tokens"] == 9
    assert json.loads(invoke("generate", *options, "--set", "max_new_tokens=5").stdout)["tokens"] == 5
    assert json.loads(invoke("generate", *options, "--max-new-tokens", 6).stdout)["tokens"] == 6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--set", "max_new_tokns=9"), ["unknown 'max_new_tokns'", "max_new_tokens"]),
        (("--set", "beta"), ["'beta'", "name=value"]),
        (("--set", "beta=-1"), ["beta=-1"]),
        (("--set", "target_reward=[1,2]"), ["target_reward is a list"]),
        (("--set", "method=guess"), ["--method guess is unknown"]),
        (("--method", "BestOfN"), ["did you mean 'best_of_n'?"]),
        (("--method", "best_of", "--set", "n=4"), ["n is a parameter of best_of_n"]),
        (("--set", "temperature=0"), ["--set temperature=0", "1e-06"]),
        (("--json", "--output", "out.jsonl"), ["--json", "--output"]),
        (("--input", "in.jsonl"), ["not both"]),
        (("--dtype", "int8"), ["'int8'", "bfloat16"]),
        (("--output", "no/such/out.jsonl"), ["no/such"]),
        (("--output", "/dev/null"), ["/dev/null", "not a file"]),
        (("--trace", "no/such/trace.jsonl"), ["--trace", "no/such"]),
        (("--trace", "no-such.jsonl", "--output", "./no-such.jsonl"), ["--trace", "also the output"]),
        (("--policy", "./no-such-model"), ["./no-such-model"]),
        (("--device", "abacus"), ["abacus"]),
    ],
)
def test_bad_usage_gets_one_line_and_exit_code_2(models, options, words):
    result = invoke("generate", *models, "--prompt", "w3", *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert [word for word in words if word not in result.stderr] == []


def test_unknown_keys_of_a_yaml_file_are_named(models, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("beta: 0.5\ntemprature: 1.0\nrewards: x\n")
    result = invoke("generate", *models, "--prompt", "w3", "--config", file)
    assert result.exit_code == 2
    said = "unknown 'rewards' (did you mean 'reward'?), 'temprature' (did you mean 'temperature'?)"
    assert said in result.stderr and "run.yaml" in result.stderr


def test_a_methods_parameter_in_a_file_is_told_its_place(models, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("method: treebon\nn: 8\n")
    result = invoke("generate", *models, "--prompt", "w3", "--config", file)
    assert result.exit_code == 2 and "write method: {name: treebon, n: 8}" in result.stderr


def test_a_trace_is_not_written_over_the_settings_that_it_is_made_with(models, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("max_new_tokens: 2\n")
    result = invoke("generate", *models, "--prompt", "w3", "--config", file, "--trace", file)
    assert result.exit_code == 2 and "is also the config" in result.stderr
    assert file.read_text() == "max_new_tokens: 2\n"


def test_a_setting_given_as_an_option_is_told_how_it_is_set(models):
    result = invoke("generate", *models, "--prompt", "w3", "--top-k", 5)
    assert result.exit_code == 2 and "--set top_k=VALUE" in result.stderr
    assert "--set" not in invoke("trace", "--top-k", 5).stderr


@pytest.mark.parametrize(
    "content", ['{"precious": "data"}\n', '{"my": "only copy"}'], ids=["a line", "a line without an end"]
)
def test_an_output_that_is_something_else_is_left_alone(models, tmp_path, content):
    (tmp_path / "out.jsonl").write_text(content)
    result = invoke("generate", *models, "--prompt", "w3", "--output", tmp_path / "out.jsonl")
    assert result.exit_code == 2 and "line 1" in result.stderr
    assert (tmp_path / "out.jsonl").read_text() == content


def test_seeds_depend_on_the_seed_and_the_id_only():
    lines = ['{"id": "a", "prompt": "x"}', '{"id": 1, "prompt": "x"}', '{"id": "1", "prompt": "x"}']
    seeds = [row.seed for row in read_rows(lines, 0)]
    assert [row.seed for row in read_rows(lines[::-1], 0)] == seeds[::-1]
    assert len({*seeds, *(row.seed for row in read_rows(lines, 1))}) == 6
    assert row_seed(0, "a") == 3241401261717813331  # files of earlier versions must stay resumable


# doctor


def test_doctor_reports_versions_kernels_and_both_demo_models():
    result = invoke("doctor", "--policy", "demo", "--reward", "demo", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert {"python", "torch", "transformers", "triton", "stars_fast"} <= report["versions"].keys()
    assert report["extension"]["built"] and report["devices"][0]["threads"] >= 1
    assert {"tree_attention", "sample_step", "select_and_commit"} <= report["kernels"].keys()
    for model in report["models"].values():
        assert model["path"] == "tree plug-in" and model["agrees"]
        assert model["max_difference"] < 1e-3
        assert model["layers"] > 0 and model["kv_bytes_per_token"] > 0 and model["max_positions"] > 0
    assert report["models"]["reward"]["reads"].endswith("with the policy's vocabulary: ids are shared")


def test_doctor_says_why_a_model_is_refused_and_exits_with_1(tmp_path):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    tiny_policy(32, rope_parameters=rope).save_pretrained(tmp_path)
    result = invoke("doctor", "--policy", tmp_path, "--json")
    assert result.exit_code == 1
    model = json.loads(result.stdout)["models"]["policy"]
    assert model["path"] == "refused" and "rope_type='dynamic'" in model["reason"]
    assert "refused" in invoke("doctor", "--policy", tmp_path).stdout


def test_doctor_says_why_a_reward_model_is_scored_in_full(tmp_path):
    config = BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=1
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    result = invoke("doctor", "--reward", tmp_path, "--json")
    assert result.exit_code == 0, result.stderr
    model = json.loads(result.stdout)["models"]["reward"]
    assert model["path"] == "scored in full" and model["reason"]


def test_doctor_needs_a_model_that_exists():
    result = invoke("doctor", "--policy", "./no-such-model")
    assert result.exit_code == 2 and "./no-such-model" in result.stderr


def test_version():
    import stars_fast

    assert invoke("--version").stdout == f"stars-fast {stars_fast.__version__}\n"


def test_a_parameter_of_a_method_is_set_beside_its_name(tmp_path):
    for assignments, options in (
        (["method={name: optimal_stopping, budget: 5}"], {}),
        (["method=optimal_stopping", "budget=5"], {}),
        (["budget=5"], {"method": "optimal_stopping"}),
        (["budget=5e0"], {"method": "{name: optimal_stopping, budget: 2}"}),
    ):
        assert read_settings(None, assignments, **options).config.method == OptimalStopping(budget=5)
    (tmp_path / "run.yaml").write_text("method: best_of_n\nnum_return_sequences: 3\n")
    config = read_settings(tmp_path / "run.yaml", ["n=6"], num_return_sequences=2).config
    assert config.method == BestOfN(n=6) and config.num_return_sequences == 2
    with pytest.raises(ValueError, match=r"budget is a parameter of optimal_stopping: .*--method optimal_stopping"):
        read_settings(None, ["budget=4"])


def test_a_file_whose_name_has_brackets_is_no_pattern_where_it_is_there(tmp_path):
    for name in ("rows[12].jsonl", "rows1.jsonl", "rows2.jsonl"):
        (tmp_path / name).touch()
    named = tmp_path / "rows[12].jsonl"
    assert batch._files(str(named), tmp_path / "out") == [named]
    named.unlink()
    assert batch._files(str(named), tmp_path / "out") == [tmp_path / "rows1.jsonl", tmp_path / "rows2.jsonl"]


def test_words_that_read_as_numbers_stay_words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known = Fit.from_pretrained(demo.FOLDER)
    known.save_pretrained("2026")
    for assignments, options in (([], {"fit": "2026"}), (["fit=2026"], {})):
        assert read_settings(None, assignments, **options).config.known == known
    assert read_settings(None, ["delimiter=7"], method="particle_filter").config.method.delimiter == "7"
    personas = ["draft_prompt=42", "judge_prompt=[1, 2]"]
    method = read_settings(None, personas, method="persona_judge").config.method
    assert (method.draft_prompt, method.judge_prompt) == ("42", (1, 2))


def test_a_field_is_given_once():
    with pytest.raises(ValueError, match="--max-new-tokens and --set max_new_tokens: give one of them"):
        read_settings(None, ["max_new_tokens=4"], max_new_tokens=5)

"""Evaluation: figures against hand-computed ones, records that survive a kill, tables, and the command."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_policy, tiny_reward, tiny_tokenizer
from safetensors.torch import save_file
from typer.testing import CliRunner

from stars_fast import StarsConfig, StarsEngine
from stars_fast.cli import app
from stars_fast.evaluation.cells import cells, share_a_target, steps
from stars_fast.evaluation.divergence import of_best
from stars_fast.evaluation.judging import judged
from stars_fast.evaluation.learned import Learned, shared_target
from stars_fast.evaluation.metrics import (
    bootstrap,
    distinct,
    outcomes,
    perplexity,
)
from stars_fast.evaluation.models import load_probe
from stars_fast.evaluation.prompts import read_prompts
from stars_fast.evaluation.recipe import Asked, Recipe, read_recipe
from stars_fast.evaluation.records import Records
from stars_fast.evaluation.runner import Evaluation, ended_by_eos
from stars_fast.evaluation.tables import at_compute, equal_compute, markdown, summarise, to_csv
from stars_fast.loop.pilot import Pilot, expected_acceptance, set_target
from stars_fast.methods import METHODS
from stars_fast.methods.fit import Fit
from stars_fast.methods.quantile import softness
from stars_fast.ops.philox import philox_key
from stars_fast.rewards import ClassifierReward, RewardPrompt, RuleReward

RECIPES = Path(__file__).parents[1] / "benchmarks" / "eval"
PROMPTS = [f"{a} {b}" for a in "abc" for b in "defg"]


# ---------------------------------------------------------------------------------------- metrics
def test_outcomes_count_wins_one_and_ties_half():
    assert outcomes([2.0, 1.0, 0.0, 1.3], [1.0, 1.0, 1.0, 1.0]) == [1.0, 0.5, 0.0, 1.0]
    assert outcomes([2.0, 1.0, 0.0, 1.3], [1.0, 1.0, 1.0, 1.0], tie=0.5) == [1.0, 0.5, 0.0, 0.5]
    with pytest.raises(ValueError, match="rewards has 1 entries, baseline 2"):
        outcomes([1.0], [1.0, 2.0])


def test_bootstrap_is_the_mean_with_a_percentile_interval_that_repeats():
    values = [0.0] * 50 + [1.0] * 50
    first, second = bootstrap(values), bootstrap(values)
    assert first == second
    assert first.value == 0.5
    # Normal approximation: 0.5 -+ 1.96 * sqrt(0.25 / 100).
    assert first.low == pytest.approx(0.402, abs=0.02) and first.high == pytest.approx(0.598, abs=0.02)
    assert bootstrap([3.0, 3.0]) == (3.0, 3.0, 3.0)
    with pytest.raises(ValueError, match="NaN"):
        bootstrap([1.0, math.nan])
    with pytest.raises(ValueError, match="0 entries"):
        bootstrap([])


def test_perplexity_is_over_tokens_and_not_over_texts():
    assert perplexity([[math.log(0.5)], [math.log(0.25)] * 3]) == pytest.approx((2 * 4**3) ** (1 / 4))
    assert math.isnan(perplexity([[], []]))


def test_distinct_counts_ngrams_of_all_texts_together():
    texts = [[1, 2, 1, 2], [1, 2, 3]]
    assert distinct(texts, 1) == 3 / 7
    assert distinct(texts, 2) == 3 / 5  # 12 21 12, 12 23
    assert math.isnan(distinct([[1], []], 2))


@pytest.mark.parametrize("name", METHODS)
def test_passes_are_about_the_tokens_that_the_models_read(name):
    policy, draft, tokenizer = tiny_policy(32), tiny_policy(32, seed=7), tiny_tokenizer(32)
    needs = {
        "rsd": {"draft": draft, "threshold": 0.0, "delimiter": None, "longest": 8},
        "mara": {"mlp": torch.nn.Linear(16, 2), "top_k": 4},
        "persona_judge": {"draft_prompt": "a b", "judge_prompt": "c d"},
        "cards": {"entropy": 2.0},
        "treebon": {"n": 4, "branching": 2},
        "best_of_n": {"n": 4},
        "blockwise_best_of_n": {"n": 4},
        "particle_filter": {"particles": 4},
        "args": {"top_k": 4},
    }
    method = METHODS[name](**needs.get(name, {}))
    config = StarsConfig(method=method, max_new_tokens=32, segment_length=8, candidates=1, ignore_eos=True)
    config = config.replace(target_reward=0.0) if method.has_target else config
    engine = StarsEngine(policy, tiny_reward(32), tokenizer=tokenizer)
    engine.generate(["a b c d", "d e f"], config)  # the models are checked when they are first used
    read = {policy: 0, draft: 0}
    for model in read:
        model.model.register_forward_hook(
            lambda module, args, inputs, out, model=model: read.__setitem__(
                model, read[model] + inputs["input_ids"].numel()
            ),
            with_kwargs=True,
        )
    out = engine.generate(["a b c d", "d e f"], config, seed=0)
    policy_passes, draft_passes = method.passes(out.stats["policy_tokens"], out.stats["committed_tokens"])
    prompts = len(tokenizer("a b c d")["input_ids"]) + len(tokenizer("d e f")["input_ids"])
    assert 0.7 < policy_passes / (read[policy] - prompts) < 1.4
    assert draft_passes == 0 or 0.7 < draft_passes / (read[draft] - prompts) < 1.4


# ---------------------------------------------------------------------------------------- parts
def test_prompts_are_fields_cut_and_put_into_a_template(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"word{i} two  three", "kind": "ab"[i % 2]} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    recipe = Recipe(prompts=str(path), field="text", words=2, template="Q: {}\n", where={"kind": "b"}, count=3)
    assert sorted(read_prompts(recipe)) == [f"Q: word{i} two\n" for i in (1, 3, 5)]
    with pytest.raises(ValueError, match=r"3 different prompts, fewer than 4 \(--count\): give 1 more, or less for "):
        read_prompts(dataclasses.replace(recipe, count=4))
    with pytest.raises(ValueError, match=r"row 1: prompt=None is neither text nor a chat; .* the row has text, kind"):
        read_prompts(Recipe(prompts=str(path)))


def test_prompts_are_chats_where_rows_have_messages(tmp_path):
    path = tmp_path / "rows.jsonl"
    chats = [[{"role": "user", "content": f"a{i}"}] for i in range(3)]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in [*chats, chats[0]]))
    assert sorted(map(str, read_prompts(Recipe(prompts=str(path), count=3)))) == sorted(map(str, chats))
    with pytest.raises(ValueError, match="messages is a chat: words and template are for text"):
        read_prompts(Recipe(prompts=str(path), count=3, words=2))


def test_a_recipe_names_what_it_does_not_know(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("policy: demo\nbudgets: [2, 4]\n")
    recipe = read_recipe(path, {"judge": "demo", "policy": None, "budgets": "8"})
    assert (recipe.policy, recipe.judge, recipe.budgets) == ("demo", "demo", (8.0,))
    path.write_text("polcy: demo\n")
    with pytest.raises(ValueError, match="unknown 'polcy'"):
        read_recipe(path, {})
    with pytest.raises(ValueError, match="budgets: 'x' is no number"):
        read_recipe(None, {"budgets": "2,x"})
    with pytest.raises(ValueError, match="budgets: 'inf' is not finite"):
        read_recipe(None, {"budgets": "2,inf"})
    for template in ("Q", "{{}}", "{question}", "{} {}", "{} {", 5):
        with pytest.raises(ValueError, match=r"template=.* must have \{\}"):
            read_recipe(None, {"template": template})
    for template in ("{{x}} {}", "{0}"):
        assert read_recipe(None, {"template": template}).template == template


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_name_every_method_and_make_cells(path):
    recipe = read_recipe(path, {})
    assert {"vanilla", *recipe.names} == set(METHODS) - {"plans"}  # which are for training
    made = cells(recipe.asked, StarsConfig(**recipe.settings), recipe.parameters)
    assert len({cell.name for cell in made}) == len(made)


def test_a_probe_is_read_as_it_was_saved(tmp_path):
    probe = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    save_file(probe.state_dict(), tmp_path / "probe.safetensors")
    states = torch.randn(3, 4)
    assert torch.equal(load_probe(tmp_path / "probe.safetensors")(states), probe(states))


def test_judged_is_the_models_own_score_of_the_finished_text():
    tokenizer, model = tiny_tokenizer(32), tiny_reward(32)
    prompt = tokenizer("a b")["input_ids"]
    asked, graphs = RewardPrompt(0, "a b", None, tokenizer=tokenizer), list[bool]()
    scorer = ClassifierReward(model)
    model.score.register_forward_hook(lambda module, given, value: graphs.append(value.requires_grad))
    ((score, error),) = judged(scorer, [asked], [[3, 4, 5]], [False])
    assert graphs == [False]  # nothing is kept for a gradient
    with torch.no_grad():
        expected = model(torch.tensor([[*prompt, 3, 4, 5]])).logits.item()
    assert error is None and score == pytest.approx(expected, abs=1e-5)


def test_an_interrupted_batch_is_dropped_and_other_settings_are_refused(tmp_path):
    records = Records(tmp_path, {"seed": 0})
    one = {"cell": "vanilla", "seed": 0, "batch": 0, "place": 0, "text": "\u2028 kept"}
    records.add([one], {"cell": "vanilla", "seed": 0, "batch": 0})
    with (tmp_path / "generations.jsonl").open("a") as file:
        file.write('{"cell": "vanilla", "seed": 0, "batch": 1, "place": 1}\n{"cell": "van')
    again = Records(tmp_path, {"seed": 0})
    assert again.generations == [one] and again.done == {("vanilla", 0, 0)}
    with pytest.raises(ValueError, match="other seed"):
        Records(tmp_path, {"seed": 1})


def test_records_are_read_again_without_being_written_anew(tmp_path, monkeypatch):
    row = {"cell": "vanilla", "seed": 0, "batch": 0}
    Records(tmp_path, {}).add([row], row)
    monkeypatch.setattr("stars_fast.evaluation.records.replacing", None)  # on a full disk there is no room for a copy
    assert Records(tmp_path, {}).done == {("vanilla", 0, 0)}


@pytest.mark.parametrize("name", ["generations.jsonl", "batches.jsonl"])
def test_a_folder_of_something_else_is_left_alone(tmp_path, name):
    (tmp_path / name).write_text('{"precious": "data"}\n')
    with pytest.raises(ValueError, match=f"{tmp_path / name} is of no run"):
        Records(tmp_path, {})
    (tmp_path / "settings.json").write_text("{}")
    with pytest.raises(ValueError, match=f"{tmp_path / name}, line 1, is not a row"):
        Records(tmp_path, {})
    assert (tmp_path / name).read_text() == '{"precious": "data"}\n'


def test_settings_that_a_kill_or_an_editor_left_broken_are_named(tmp_path):
    (tmp_path / "settings.json").write_text('{"seed"')
    with pytest.raises(ValueError, match=f"{tmp_path}/settings.json is not what this command wrote"):
        Records(tmp_path, {"seed": 0})


# ------------------------------------------------------------------------------------------- runs
@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    tokenizer = tiny_tokenizer(32)
    engine = StarsEngine(tiny_policy(32), tiny_reward(32, scale=4.0), tokenizer=tokenizer)
    judge = ClassifierReward(tiny_reward(32, seed=5))
    learned = Learned(tmp_path_factory.mktemp("learned"), lambda method: engine, PROMPTS[6:8], PROMPTS[:8], seed=0)
    return Evaluation(PROMPTS[:6], learned, lambda method: engine, engine.reward, judge, batch_size=2, seed=0)


def asked(*names, budgets=(2.0,)):
    return [Asked(name, budgets) for name in names]


CONFIG = StarsConfig(max_new_tokens=8, segment_length=4, candidates=1)


def test_a_chat_is_answered_and_judged_as_the_engine_reads_it(evaluation, tmp_path):
    chats = [[{"role": "user", "content": f"w{i}"}] for i in (3, 4)]
    own = dataclasses.replace(evaluation, prompts=chats)
    records = Records(tmp_path, {})
    own.run(cells([], CONFIG), records)
    engine = evaluation.engine("vanilla")
    seeds = [philox_key(0, place, 0) for place in range(2)]
    out = engine.generate(chats, CONFIG.replace(method="vanilla"), seed=seeds)
    assert [row["prompt"] for row in records.generations] == chats
    assert [row["completion_ids"] for row in records.generations] == out.completions
    assert [row["guide"] for row in records.generations] == pytest.approx(out.rewards, abs=1e-4)


def test_answers_that_the_guide_rejects_for_good_are_errors_and_do_not_keep_the_table_back(evaluation, tmp_path):
    guide = RuleReward(predicates={lambda text: len(text) % 2: -math.inf, len: 0.1})
    own, records = dataclasses.replace(evaluation, guide=guide), Records(tmp_path, {})
    own.run(cells([], CONFIG), records)
    rejected = [row for row in records.generations if row["guide"] is None]
    assert 0 < len(rejected) < len(records.generations)
    assert {row["error"] for row in rejected} == {"the reward of the guide is -inf, of which there is no mean"}
    (row,) = summarise(records.generations, records.batches)
    assert row.errors == len(rejected) and math.isfinite(row.guide.value)


def figures(folder):
    """What a run found, without how long it took."""
    records = Records(folder, {})
    timeless = [{**batch, "seconds": 1.0} for batch in records.batches]
    return to_csv(summarise(records.generations, timeless))


class _Killed(Exception):
    pass


def test_a_run_killed_half_way_ends_with_the_same_table(evaluation, tmp_path, monkeypatch):
    made = cells(asked("best_of_n", "stars", budgets=(2, 3)), CONFIG)
    evaluation.run(made, Records(tmp_path / "whole", {}))
    records, add = Records(tmp_path / "killed", {}), Records.add

    def add_until_killed(self, generations, batch):
        if len(self.batches) == 7:
            raise _Killed
        add(self, generations, batch)

    monkeypatch.setattr(Records, "add", add_until_killed)
    with pytest.raises(_Killed):
        evaluation.run(made, records)
    monkeypatch.setattr(Records, "add", add)
    evaluation.run(made, Records(tmp_path / "killed", {}))
    assert figures(tmp_path / "killed") == figures(tmp_path / "whole")


def test_a_prompt_that_is_refused_is_found_by_its_batch(evaluation, tmp_path):
    long = dataclasses.replace(evaluation, prompts=[*PROMPTS[:2], "w3 " * 300, PROMPTS[3]])
    with pytest.raises(ValueError, match=r"vanilla, prompts 2 to 3: prompts\[0\] has 300 tokens"):
        long.run(cells([], CONFIG), Records(tmp_path, {}))


def test_the_baseline_ties_with_itself_and_best_of_n_earns_more_for_its_tokens(evaluation, tmp_path):
    evaluation.run(cells(asked("best_of_n", budgets=(4,)), CONFIG), records := Records(tmp_path, {}))
    baseline, other = summarise(records.generations, records.batches)
    assert baseline.win == (0.5, 0.5, 0.5) and baseline.ties == 1.0
    assert other.guide.value > baseline.guide.value
    assert baseline.kl == 0.0 and other.kl == pytest.approx(of_best(4))
    drawn = [sum(batch["policy_tokens"] for batch in some) for some in (records.batches[:3], records.batches[3:])]
    assert baseline.answers == 1.0 and other.answers == drawn[1] / drawn[0]
    assert other.policy_tokens > 2 * baseline.policy_tokens == 2.0
    spent = [sum(batch[name] for batch in records.batches[3:]) for name in ("policy_passes", "reward_passes")]
    assert other.compute == sum(spent) / sum(batch["committed_tokens"] for batch in records.batches[3:])
    assert at_compute([baseline, other], other.compute) == [other]
    alone = equal_compute([baseline, other])
    assert alone.count("| best_of_n | 4 |") == 1 and "No other method is within a factor 1.5" in alone
    assert "No other method" not in equal_compute([dataclasses.replace(baseline, compute=other.compute), other])


def test_the_table_has_a_line_per_cell_and_the_csv_its_intervals(evaluation, tmp_path):
    evaluation.run(cells(asked("stars"), CONFIG), records := Records(tmp_path, {}))
    rows = summarise(records.generations, records.batches)
    assert [line.split("|")[1].strip() for line in markdown(rows).splitlines()[2:]] == ["vanilla", "stars"]
    read = list(csv.DictReader(to_csv(rows).splitlines()))
    assert float(read[1]["judge_low"]) <= float(read[1]["judge"]) <= float(read[1]["judge_high"])


def test_a_way_to_use_a_method_is_a_row_of_its_own(evaluation, tmp_path):
    """One target for all, a target for each prompt from pilots whose tokens count, and quantiles of a fit."""
    made = cells(asked("stars", "stars+pilots", "stars+fit", "optimal_stopping+fit"), CONFIG)
    assert [cell.name for cell in made[1:4]] == ["stars@2", "stars+pilots@2", "stars+fit@2"]
    assert (made[2].config.acceptance, made[2].acceptance, made[1].acceptance) == (0.5, None, 0.5)
    evaluation.run(made, records := Records(tmp_path, {}))
    _, stars, pilots, fitted, stopping = summarise(records.generations, records.batches)
    assert [row.method for row in (stars, pilots, fitted, stopping)] == [cell.label for cell in made[1:]]
    assert pilots.policy_tokens > 8 > 4 > max(stars.policy_tokens, fitted.policy_tokens, stopping.policy_tokens)
    assert all(abs(row.kl) < 4 for row in (stars, pilots, fitted)) and 0 < stopping.kl < 4 and stopping.kl_at_most
    betas = {
        name: {row["beta"] for row in records.generations if row["method"] == name}
        for name in ("stars", "stars+pilots")
    }
    assert len(betas["stars"]) == 1 and len(betas["stars+pilots"]) == 6  # of all prompts, of each


def test_accepted_segments_are_kept_with_the_probability_of_that(evaluation, tmp_path):
    evaluation.run(cells(asked("stars", "stars+fit", budgets=(8,)), CONFIG), records := Records(tmp_path, {}))
    fitted = evaluation.learned.config(cells(asked("stars+fit", budgets=(8,)), CONFIG)[1])
    for row in records.generations:
        before = 0.0
        for i, segment in enumerate(row["segments"]):
            if row["method"] == "stars":
                log = (segment["reward"] - segment["threshold"]) / row["beta"]
                assert segment["log_acceptance"] == pytest.approx(min(0.0, log), abs=1e-4)
            elif row["method"] == "stars+fit":
                level = fitted.fit.level(i, before, segment["reward"])
                assert row["beta"] == pytest.approx(softness(1 / 8), rel=1e-4)
                assert segment["log_acceptance"] == pytest.approx((level - 1) / row["beta"], abs=1e-3)
                before = segment["reward"]
            else:
                assert "log_acceptance" not in segment


def test_a_fit_is_learned_once_from_prompts_of_its_own_and_kept(evaluation, tmp_path):
    learned = dataclasses.replace(evaluation.learned, folder=tmp_path, _pilots={})
    cell = cells(asked("optimal_stopping+fit"), CONFIG)[1]
    known = learned.fit(cell)
    assert known.figures["prompts"] == 8 and known.figures["seconds"] > 0
    saved = (tmp_path / "fit" / "stars_fit.json").read_text()
    assert learned.fit(cells(asked("stars+fit"), CONFIG)[1]) == Fit.from_dict(json.loads(saved))
    with pytest.raises(ValueError, match=r"stars\+fit: give `fit:` in the recipe"):
        dataclasses.replace(learned, folder=tmp_path / "other", fit_prompts=()).fit(
            cells(asked("stars+fit"), CONFIG)[1]
        )


def test_a_table_of_two_seeds_has_their_means_and_is_the_same_when_the_second_is_added_later(evaluation, tmp_path):
    made = cells(asked("stars"), CONFIG)
    evaluation.run(made, Records(tmp_path / "added", {}))
    both = dataclasses.replace(evaluation, repeats=2)
    both.run(made, Records(tmp_path / "added", {}))
    both.run(made, records := Records(tmp_path / "whole", {}))
    assert figures(tmp_path / "added") == figures(tmp_path / "whole")
    row = summarise(records.generations, records.batches)[1]
    of = [[r["judge"] for r in records.generations if r["method"] == "stars" and r["seed"] == seed] for seed in (0, 1)]
    assert of[0] != of[1] and (row.prompts, row.seeds) == (6, 2)
    assert row.judge == bootstrap([(a + b) / 2 for a, b in zip(*of, strict=True)])


def test_budgets_of_one_method_and_parameters_of_one_way():
    recipe = read_recipe(None, {"methods": ["best_of_n", {"best_of_n": [64, 2]}, "args"], "budgets": [2]})
    names = [cell.name for cell in cells(recipe.asked, CONFIG)]
    assert names == ["vanilla", "best_of_n@2", "best_of_n@64", "args@2"]
    parameters = {"particle_filter": {"temperature": 2.0}, "particle_filter+cold": {"temperature": 0.5}}
    made = cells(asked("particle_filter", "particle_filter+cold"), CONFIG, parameters)
    assert [cell.config.chosen_method.temperature for cell in made[1:]] == [2.0, 0.5]
    for name, said in {
        "args+fit": "no use for a fit",
        "args+pilots": "no target",
        "args+x": "'args.x' is in none",
    }.items():
        with pytest.raises(ValueError, match=said):
            cells(asked(name), CONFIG)
    with pytest.raises(ValueError, match="neither a name nor"):
        read_recipe(None, {"methods": [{"stars": 2}]})


def test_steps_of_a_chain_redraw_as_much_as_its_budget_says():
    # With four segments a redraw is of 4, 3, 2 or 1 of them: 5 / 8 of an answer on average.
    assert steps(1, 4) == 0 and steps(6, 4) == 8 and steps(4, 1) == 3


@pytest.mark.parametrize("acceptance", [0.5, 0.25, 0.05])
def test_one_target_gives_the_acceptance_asked_for_beyond_the_pilots_too(acceptance):
    pilots = [Pilot([[(4, 0.1 * i), (8, 0.1 * i + j)] for i in range(8)]) for j in range(3)]
    config = shared_target(CONFIG, pilots, acceptance)
    pooled = Pilot([run for pilot in pilots for run in pilot.responses], empty=config.base_reward, beta=config.beta)
    set_target(pooled, CONFIG, config.target_reward)
    assert expected_acceptance(pooled, CONFIG) == pytest.approx(acceptance, abs=1e-3)


@pytest.mark.parametrize("eos", [[3, 7], None], ids=["the settings' own", "the model's"])
def test_answers_ended_by_whatever_is_an_eos_are_seen_as_ended(evaluation, eos):
    engine, config = evaluation.engine("vanilla"), CONFIG.replace(method="vanilla", max_new_tokens=64, eos_token_id=eos)
    out = engine.generate(PROMPTS, config, seed=0)
    assert ended_by_eos(out, config, engine) == [reason == "stop" for reason in out.finish_reasons]
    assert "stop" in out.finish_reasons
    config = config.replace(ignore_eos=True, stop_strings=("w3",))  # what a stop string ends has no EOS to leave out
    stopped = engine.generate(PROMPTS, config, seed=0)
    assert "stop" in stopped.finish_reasons and not any(ended_by_eos(stopped, config, engine))


def test_cells_refuse_unknown_methods_and_budgets_below_one():
    with pytest.raises(ValueError, match="'starz' is unknown; known are vanilla"):
        cells(asked("starz"), CONFIG)
    with pytest.raises(ValueError, match=r"budgets: 0.5 is below 1"):
        cells(asked("stars", budgets=(0.5,)), CONFIG)
    with pytest.raises(ValueError, match=r"budgets: 1 leaves power_sampling no step"):
        cells(asked("power_sampling", budgets=(1,)), CONFIG)


def test_the_command_writes_table_and_plot_and_has_nothing_to_do_twice(tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"prompt": f"This film number {i}"}) + "\n" for i in range(4))
    )  # none left over
    command = f"eval --policy demo --guide demo --judge demo --prompts {prompts} --count 4 --methods best_of_n"
    command += f" --budgets 2 --set max_new_tokens=4 --batch-size 4 --output {tmp_path / 'out'}"
    first = CliRunner().invoke(app, command.split())
    assert first.exit_code == 0, first.output
    assert "| best_of_n | 2 |" in first.stdout and "the judge is not independent" in first.stderr
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())["settings"]
    assert settings["candidates"] == 1  # what is drawn in vain would count as the method's cost
    lines = (tmp_path / "out" / "generations.jsonl").read_text()
    again = CliRunner().invoke(app, command.split())
    assert again.stdout == first.stdout
    assert (tmp_path / "out" / "generations.jsonl").read_text() == lines
    pytest.importorskip("matplotlib")
    assert (tmp_path / "out" / "quality_against_answers.png").stat().st_size > 1000
    other = CliRunner().invoke(app, [*command.split(), "--seed", "1"])
    assert other.exit_code == 2 and "other" in other.stderr
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    without = CliRunner().invoke(app, command.split())
    assert without.exit_code == 0 and "pip install -e '.[report]'" in without.stderr


def test_a_judge_that_always_fails_is_said_in_a_line(tmp_path):
    (tmp_path / "judges.py").write_text("def absent(completions):\n    raise RuntimeError('no judge today')\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "This film"}\n')
    command = f"eval --policy demo --guide demo --judge {tmp_path}/judges.py:absent --prompts {tmp_path}/prompts.jsonl"
    command += f" --count 1 --methods vanilla --set max_new_tokens=2 --output {tmp_path / 'out'}"
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 2 and result.stderr.splitlines()[-1].startswith("error: vanilla: all 1 responses failed")


def test_a_fit_of_no_prompts_is_refused_before_any_model_is_loaded():
    models = ("--policy", "none", "--guide", "none", "--judge", "none", "--prompts", "none")
    result = CliRunner().invoke(app, ["eval", *models, "--methods", "best_of_n,stars+fit"])
    assert result.exit_code == 2 and "--methods stars+fit: give --fit" in result.stderr


def test_help_shows_how_many_prompts_are_drawn():
    assert re.search(r"--count.*default: \(100\)", CliRunner().invoke(app, ["eval", "--help"]).stdout, re.S)


def test_prompts_for_a_target_are_demanded_where_a_method_shares_one(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{i}"}) + "\n" for i in range(30)))
    recipe = Recipe(prompts=str(path), count=6, fit=10)
    few = (
        r"fewer than 6 \(--count\) \+ 10 \(--fit\) \+ 16 \(for one target of stars, cards\): give 2 more, or less for "
    )
    with pytest.raises(ValueError, match=few + "--count or --fit$"):
        read_prompts(recipe, 16, share_a_target(asked("stars", "stars+fit", "cards", "best_of_n")))
    assert share_a_target(asked("stars+fit", "cards+pilots", "best_of_n")) == []
    assert sorted(read_prompts(recipe, 16, [])) == sorted(f"p{i}" for i in range(30))
    # A run's prompts do not depend on whether its methods share one, so that such a method can be added.
    enough = dataclasses.replace(recipe, count=4)
    assert read_prompts(enough, 16, []) == read_prompts(enough, 16, ["stars"])

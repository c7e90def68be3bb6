"""Guided answers in lm-evaluation-harness: repeats differ, settings do not mix, log-likelihoods are the policy's."""

import json
import sys

import pytest
from conftest import tiny_policy, tiny_reward, tiny_tokenizer

lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.model import CachingLM  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from stars_fast import StarsConfig  # noqa: E402
from stars_fast.integrations import lm_eval as plugin  # noqa: E402
from stars_fast.integrations.lm_eval import StarsLM  # noqa: E402

SETTINGS = {"segment_length": 4, "max_attempts": 5, "target_reward": 1.0, "beta": 0.4}
SAMPLED = {"until": ["w2"], "max_gen_toks": 10, "do_sample": True, "temperature": 1.0}
DOCUMENTS = ["w3 w4", "w5", "w6 w7 w8"]
TASKS = {
    "tiny_answers": "generate_until\nrepeats: 2\ngeneration_kwargs: " + json.dumps(SAMPLED),
    "tiny_choices": 'multiple_choice\ndoc_to_choice: ["w5", "w6 w7"]',
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A policy and a reward model, and two tasks that need no network."""
    folder = tmp_path_factory.mktemp("lm_eval")
    for name, model in (("policy", tiny_policy(32, hidden=32)), ("reward", tiny_reward(32, hidden=32, scale=3.0))):
        model.save_pretrained(folder / name)
        tiny_tokenizer(32).save_pretrained(folder / name)
    rows = ({"text": text, "answer": "w5"} for text in DOCUMENTS)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks").mkdir()
    for name, rest in TASKS.items():
        metric = "bypass, aggregation: bypass" if "generate" in rest else "acc"
        (folder / "tasks" / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'rows.jsonl'}}}}}\n"
            f'test_split: test\ndoc_to_text: "{{{{text}}}}"\ndoc_to_target: "{{{{answer}}}}"\n'
            f"metric_list: [{{metric: {metric}}}]\noutput_type: {rest}\n"
        )
    return folder


@pytest.fixture(scope="module")
def make(folder):
    def make(reward=None, **settings) -> StarsLM:
        reward = str(folder / "reward") if reward is None else reward
        return StarsLM(str(folder / "policy"), reward, device="cpu", **{**SETTINGS, **settings})

    return make


def asked(kwargs=SAMPLED, repeats=2, texts=DOCUMENTS):
    """What the harness asks for: the same request once for each repeat."""
    made = [Instance("generate_until", {}, (text, kwargs), 0, ("tiny", i, repeats)) for i, text in enumerate(texts)]
    return [one for one in made for _ in range(repeats)]


def test_the_harness_runs_offline_and_rewards_lie_beside_its_samples(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(
        "lm_eval.evaluator.add_env_info", lambda results: None
    )  # asks pip and the compiler, for seconds
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    given = ",".join(f"{name}={value}" for name, value in SETTINGS.items())
    names = f"pretrained={folder / 'policy'},reward={folder / 'reward'},{given}"
    command = ["run", "--model", "stars-fast", "--model_args", names, "--tasks", "tiny_answers,tiny_choices"]
    where = ["--include_path", str(folder / "tasks"), "--output_path", str(tmp_path / "out"), "--log_samples"]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *command, *where, "--device", "cpu"])
    plugin.main()
    (answers,) = (tmp_path / "out").glob("answers_*.jsonl")
    logged = [json.loads(line) for line in answers.read_text().splitlines()]
    (samples,) = (tmp_path / "out").glob("*/samples_tiny_answers_*.jsonl")
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        own = [row for row in logged if row["doc_id"] == sample["doc_id"]]
        assert [row["answer"] for row in own] == sample["resps"][0] and len({row["seed"] for row in own}) == 2
        assert all(row["reward"] == row["segments"][-1]["reward"] for row in own)
    (results,) = (tmp_path / "out").glob("*/results_*.json")
    spent = json.loads(results.read_text())["config"]["stars_fast"]
    assert spent["answers"] == len(logged) == 6 and spent["policy_tokens"] > spent["committed_tokens"] > 0


def test_repeats_differ_and_neither_windows_nor_order_change_a_text(make):
    lm = make()
    texts = lm.generate_until(asked())
    assert texts[0] != texts[1] and texts == lm.generate_until(asked())
    lm.window = 2
    assert texts == lm.generate_until(asked())
    last = lm.generate_until(asked()[-1:])
    assert last == texts[-2:-1], "the first of a document's repeats, whatever was asked before"
    assert texts != make(seed=1).generate_until(asked())


def test_answers_of_other_settings_cannot_come_from_a_cache(make, tmp_path):
    with pytest.raises(ValueError, match=r"use_cache: .* answers of another reward, target, seed or repeat"):
        CachingLM(make(), str(tmp_path / "cache.db"))


def test_log_likelihoods_are_those_of_hf(folder, make):
    asked = [Instance("loglikelihood", {}, ("w3 w4", f" w{i}"), i, ("tiny", i, 1)) for i in range(5, 9)]
    plain = HFLM(str(folder / "policy"), device="cpu")
    assert make().loglikelihood(asked) == plain.loglikelihood(asked)


def test_an_answer_ends_in_front_of_what_the_task_stops_at(make):
    lm, stop = make(), "w2"
    texts = lm.generate_until(asked({**SAMPLED, "until": [stop], "max_gen_toks": 40}, repeats=4))
    assert any(texts) and not any(stop in text.split() for text in texts)
    assert max(len(text.split()) for text in texts) <= 40


@pytest.mark.parametrize(
    ("settings", "length"),
    [
        ({}, 256),
        ({"max_new_tokens": 7}, 7),
        ({"max_new_tokens": 128}, 128),
        ({"stars_config": {"max_new_tokens": 128}}, 128),
        ({"stars_config": StarsConfig(max_new_tokens=9)}, 9),
        ({"stars_config": StarsConfig()}, 256),
    ],
)
def test_a_length_that_was_given_holds_even_where_it_is_the_default(make, settings, length):
    assert make(**settings).max_gen_toks == length


def test_a_greedy_task_is_sampled_by_the_arguments_and_says_so_once(make):
    greedy = {"until": [], "max_gen_toks": 8, "do_sample": False, "temperature": 0.0, "num_beams": 1}
    lm = make(temperature=0.8)
    with pytest.warns(UserWarning) as heard:
        texts = lm.generate_until(asked(greedy))
        lm.generate_until(asked(greedy))
    words = [str(one.message) for one in heard]
    assert (
        sum("greedy decoding" in one for one in words) == 1 == sum("num_beams have no effect" in one for one in words)
    )
    like_it = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 0.8}
    assert texts == make().generate_until(asked(like_it))


def test_a_reward_reads_the_messages_of_a_chat(make):
    seen = []

    def reward(prompts, completions):
        seen.extend(prompts)
        return [float(len(completion)) for completion in completions]

    lm = make(reward)
    chat = [{"role": "user", "content": "w6"}]
    lm.generate_until(asked(texts=[lm.apply_chat_template(chat)]))
    assert seen and all(prompt == chat for prompt in seen)


def test_an_answer_that_fails_is_named(make, tmp_path):
    def reward(prompts, completions):
        if any(prompt == "w5" for prompt in prompts):
            raise RuntimeError("out of luck")
        return [0.0] * len(completions)

    lm = make(reward, answers=tmp_path / "answers.jsonl")
    with pytest.raises(RuntimeError, match=r"task tiny, document 1: .*out of luck"), pytest.warns(UserWarning):
        lm.generate_until(asked())
    logged = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [row["error"] is None for row in logged] == [True, True, False, False, True, True]


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"target_rewrd": 1.0}, TypeError, r"'target_rewrd' is no argument .*did you mean 'target_reward'"),
        ({"num_return_sequences": 2}, ValueError, "num_return_sequences=2: .* the task's `repeats`"),
    ],
)
def test_what_an_argument_cannot_be_is_said_before_models_are_loaded(settings, error, said):
    with pytest.raises(error, match=said):
        StarsLM("no-such-model", "no-such-reward", **settings)


def test_a_config_is_given_as_an_object_a_path_or_its_fields(make, tmp_path):
    config = StarsConfig(alpha=0.25, **SETTINGS)
    config.save_pretrained(tmp_path)
    for given in (config, str(tmp_path), {"alpha": 0.25}):
        assert make(stars_config=given).stars_config == config

"""``stars-fast doctor`` on a pair: what the reward model sees, its score computed twice, and what both need."""

import dataclasses
import json

import pytest
from conftest import tiny_policy, tiny_reward, tiny_tokenizer
from test_cli import invoke
from tiny_pictures import gemma3, gemma3_processor
from transformers import Gemma3ForSequenceClassification

from stars_fast.cli.pair import trouble
from stars_fast.rewards import ClassifierReward


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """A policy and a reward model with a tokenizer, and a chat template, beside each."""
    folder = tmp_path_factory.mktemp("pair")
    for name, model in (("policy", tiny_policy(32)), ("reward", tiny_reward(32))):
        model.save_pretrained(folder / name)
        tiny_tokenizer(32).save_pretrained(folder / name)
    return ["doctor", "--policy", str(folder / "policy"), "--reward", str(folder / "reward")]


def test_the_reward_model_is_shown_a_chat_as_it_sees_it(chatty):
    result = invoke(*chatty, "--json")
    assert result.exit_code == 0, result.stderr
    pair = json.loads(result.stdout)["pair"]
    question, answer = "w0 w0 w0", "w0 w0 w0 w0"  # words that this tokenizer does not know
    assert (pair["seen"], pair["tail"]) == (f"w1 {question} w2 w1 {answer} w2", "w2")
    assert pair["ids"] == 11
    assert pair["score"]["engine"] == pytest.approx(pair["score"]["plain"], abs=1e-5) and pair["score"]["agrees"]
    assert pair["whole"]["same"] and pair["whole"]["score"] == pair["score"]["plain"]
    assert pair["tokenizers"]["policy"].endswith("of 32 ids")
    assert "ids are shared" in pair["tokenizers"]["why"]
    memory = pair["memory"]
    assert memory["weights_bytes"]["policy"] == 4 * tiny_policy(32).num_parameters()
    assert memory["kv_bytes_per_token"] == 2 * 2 * 2 * 8 * 4  # models, layers, keys and values, numbers, bytes
    assert memory["tokens"] > 0
    told = invoke(*chatty).stdout
    assert "equal within rounding" in told and "the same ids" in told and "rolled back" in told


def test_text_without_a_template_is_read_as_one_piece():
    result = invoke("doctor", "--policy", "demo", "--reward", "demo", "--json")
    assert result.exit_code == 0, result.stderr
    pair = json.loads(result.stdout)["pair"]
    assert pair["seen"] == "<s>Name three fruits. Apples, pears and plums." and pair["tail"] == ""
    assert pair["whole"]["same"]


def test_a_score_that_is_not_the_models_own_is_loud_and_exits_with_1(chatty, monkeypatch):
    read = ClassifierReward.read
    monkeypatch.setattr(ClassifierReward, "read", lambda *arguments: read(*arguments) + 0.1)
    result = invoke(*chatty, "--json")
    assert result.exit_code == 1 and "more than rounding explains" in result.stderr
    score = json.loads(result.stdout)["pair"]["score"]
    assert not score["agrees"] and score["engine"] == pytest.approx(score["plain"] + 0.1, abs=1e-5)
    assert "NOT EQUAL" in invoke(*chatty).stdout


def test_a_pair_without_tokenizers_is_shown_ids(tmp_path):
    tiny_policy(32).save_pretrained(tmp_path / "policy")
    tiny_reward(32).save_pretrained(tmp_path / "reward")
    result = invoke("doctor", "--policy", tmp_path / "policy", "--reward", tmp_path / "reward", "--json")
    assert result.exit_code == 0, result.stderr
    pair = json.loads(result.stdout)["pair"]
    assert pair["seen"] == str([*range(12)]) and pair["whole"] is None and pair["score"]["agrees"]


def test_other_ids_than_the_tokenizers_own_are_said(chatty, monkeypatch):
    monkeypatch.setattr("stars_fast.cli.pair._at_once", lambda *_: [1, 2, 3])
    result = invoke(*chatty)
    assert result.exit_code == 0 and "other ids, of score" in result.stdout


def test_what_cannot_be_scored_is_trouble(chatty, monkeypatch):
    def refuse(*_):
        raise ValueError("this prompt does not fit")

    monkeypatch.setattr(ClassifierReward, "context", refuse)
    result = invoke(*chatty, "--json")
    assert result.exit_code == 1 and "this prompt does not fit" in result.stderr
    assert "this prompt does not fit" in trouble(json.loads(result.stdout)["pair"])


def test_which_model_reads_pictures_and_by_which_processor_is_said(tmp_path):
    def told(*options):
        result = invoke("doctor", *options, "--json")
        assert result.exit_code == 0, result.stderr
        return [model["pictures"] for model in json.loads(result.stdout)["models"].values()]

    gemma3().save_pretrained(tmp_path / "policy")
    config = dataclasses.replace(gemma3().config, num_labels=1)
    Gemma3ForSequenceClassification(config).save_pretrained(tmp_path / "reward")
    both = ("--policy", tmp_path / "policy", "--reward", tmp_path / "reward")
    policy, reward = told(*both)
    assert "need processor=" in policy and "as the policy reads them" in reward
    for name in ("policy", "reward"):
        gemma3_processor().save_pretrained(tmp_path / name)
    assert all("Gemma3Processor" in one for one in told(*both))
    assert all("not read" in one for one in told("--policy", "demo", "--reward", "demo"))

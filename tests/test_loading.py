"""Models by name go where they are told; a tokenizer beside one is loaded, and if it cannot be, never passed over."""

import pytest
import torch
from conftest import sum_reward
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError
from transformers import BertConfig, BertForSequenceClassification

from stars_fast import StarsEngine
from stars_fast.inputs import models as loading
from stars_fast.inputs.models import load_classifier, load_policy, placement


@pytest.fixture
def folder(tmp_path, reward32):
    reward32.save_pretrained(tmp_path)
    return tmp_path


def test_a_folder_without_a_tokenizer_has_none(folder):
    assert load_classifier(folder, None)[1] is None


def test_a_family_with_an_empty_tokenizer_of_its_own_has_none(tmp_path):
    config = BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, num_labels=1)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    assert load_classifier(tmp_path, None)[1] is None


@pytest.mark.parametrize(
    "file, content",
    [("tokenizer.json", "{"), ("tokenizer_config.json", '{"tokenizer_class": "NoSuchTokenizer"}')],
    ids=["broken", "unknown class"],
)
def test_a_tokenizer_that_cannot_be_loaded_is_an_error_with_name_and_cause(folder, policy32, file, content):
    (folder / file).write_text(content)
    with pytest.raises(OSError, match=rf"{folder}.*reward_tokenizer=.*: \S") as caught:
        StarsEngine(policy32, folder)
    assert str(caught.value.__cause__) in str(caught.value)


def test_a_policys_tokenizer_that_cannot_be_loaded_is_an_error_too(tmp_path, policy32):
    policy32.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(OSError, match=rf"{tmp_path}.*pass tokenizer="):
        StarsEngine(tmp_path, sum_reward)


def repository(files, otherwise):
    def download(name, file):
        if file not in files:
            raise otherwise("the hub's answer")
        return file

    return download


class Gated(GatedRepoError):
    def __init__(self, message):
        Exception.__init__(self, message)


@pytest.mark.parametrize("otherwise", [Gated, LocalEntryNotFoundError], ids=["gated", "offline"])
def test_a_repository_that_does_not_tell_is_an_error(monkeypatch, otherwise):
    monkeypatch.setattr(loading, "hf_hub_download", repository((), otherwise))
    with pytest.raises(OSError, match=r"some/model.*the hub's answer"):
        loading._tokenizer_beside("some/model", "tokenizer")


def test_a_repository_has_a_tokenizer_where_it_has_one_of_its_files(monkeypatch):
    monkeypatch.setattr(loading, "hf_hub_download", repository(("spiece.model",), LocalEntryNotFoundError))
    assert loading._has_tokenizer("some/model")
    monkeypatch.setattr(loading, "hf_hub_download", repository((), EntryNotFoundError))
    assert not loading._has_tokenizer("some/model")


@pytest.fixture
def accelerator(monkeypatch):
    """Let torch name an accelerator."""

    def name(kind):
        named = kind and torch.device(kind)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: named)

    return name


def test_models_go_to_an_accelerator_that_the_operators_have_kernels_for(accelerator):
    for kind, place in (("cuda", "cuda"), ("mps", "cpu"), (None, "cpu")):
        accelerator(kind)
        assert placement() == placement("auto") == torch.device(place)
        assert placement("meta") == torch.device("meta")


def test_models_given_by_name_are_placed_and_objects_stay(tmp_path, monkeypatch, policy32, reward32):
    policy32.save_pretrained(tmp_path / "policy")
    reward32.save_pretrained(tmp_path / "reward")
    monkeypatch.setattr(loading, "placement", lambda device=None: torch.device(device or "meta"))
    for load, role, object_ in ((load_policy, "policy", policy32), (load_classifier, "reward", reward32)):
        assert load(tmp_path / role, None)[0].device.type == "meta"
        assert load(tmp_path / role, None, "cpu")[0].device.type == "cpu"
        assert object_.device.type == "cpu"
    assert load_policy(policy32, None)[0] is policy32
    engine = StarsEngine(policy32, tmp_path / "reward", device="cpu")
    assert engine.reward.model.device.type == "cpu"


def test_a_device_is_refused_where_nothing_is_loaded_or_none_is_there(tmp_path, policy32):
    with pytest.raises(ValueError, match="device='cpu': policy and reward are objects"):
        StarsEngine(policy32, sum_reward, device="cpu")
    policy32.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="device='abacus'"):
        StarsEngine(tmp_path, sum_reward, device="abacus")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_this_machine_lacks_is_named(tmp_path, policy32):
    policy32.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="device='cuda'"):
        load_policy(tmp_path, None, "cuda")


def test_the_models_of_the_package_are_called_demo():
    policy, tokenizer = load_policy("demo", None, "cpu")
    reward, own = load_classifier("demo", None, "cpu", dtype="bfloat16")
    assert policy.dtype == torch.float32 and reward.dtype == torch.bfloat16
    assert tokenizer.get_vocab() == own.get_vocab()


def test_a_folder_that_is_not_there_is_said_in_one_line():
    with pytest.raises(FileNotFoundError, match=r"no folder \./nowhere: give a model's folder, a hub id or 'demo'$"):
        load_policy("./nowhere", None)

"""The tokenizer of a folder or repository: there, not there, or an error where that cannot be told."""

from types import SimpleNamespace

import pytest
from conftest import tiny_tokenizer

from stars_fast.text import tokenizers


class Hub:
    """What huggingface_hub would say of a repository: its files, or an error; which files were downloaded before."""

    def __init__(self, monkeypatch, files=(), error=None, cached=()):
        self.files, self.error, self.asked = files, error, 0
        monkeypatch.setattr(tokenizers, "HfApi", lambda: self)
        monkeypatch.setattr(tokenizers, "try_to_load_from_cache", lambda name, file: file if file in cached else None)

    def model_info(self, name, timeout):
        self.asked += 1
        if self.error is not None:
            raise self.error
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in self.files])


@pytest.mark.parametrize("error", [PermissionError("gated"), ConnectionError("offline")], ids=str)
def test_a_repository_that_does_not_tell_is_an_error_and_is_asked_once(monkeypatch, error):
    hub = Hub(monkeypatch, error=error)
    with pytest.raises(OSError, match=f"some/model.*pass tokenizer=.*{error}"):
        tokenizers.tokenizer_beside("some/model", "tokenizer")
    assert hub.asked == 1


def test_a_repository_has_a_tokenizer_where_it_has_one_of_its_files(monkeypatch):
    Hub(monkeypatch, files=("config.json", "spiece.model"))
    assert tokenizers.has_tokenizer("some/model")
    Hub(monkeypatch, files=("config.json",))
    assert not tokenizers.has_tokenizer("some/model")


def test_the_hub_is_not_asked_of_what_was_downloaded_before(monkeypatch):
    hub = Hub(monkeypatch, error=ConnectionError("offline"), cached=("tokenizer.json",))
    assert tokenizers.has_tokenizer("some/model") and not hub.asked


class PanicException(BaseException):
    """As what pyo3 raises where Rust panics."""


@pytest.mark.parametrize("error", [PanicException("ouch"), ImportError("ouch")], ids=str)
def test_a_tokenizer_given_by_name_that_cannot_be_loaded_is_named(monkeypatch, tmp_path, error):
    def load(name):
        raise error

    monkeypatch.setattr(tokenizers.AutoTokenizer, "from_pretrained", load)
    with pytest.raises(OSError, match=f"reward_tokenizer='{tmp_path}' cannot be loaded: ouch"):
        tokenizers.named_tokenizer("reward_tokenizer", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(OSError, match=r"pass tokenizer=\): ouch"):
        tokenizers.tokenizer_beside(str(tmp_path), "tokenizer")
    with pytest.raises(TypeError, match="tokenizer is a int, 7: give a tokenizer"):
        tokenizers.named_tokenizer("tokenizer", 7)


def test_vocabularies_are_the_same_where_every_id_means_the_same():
    assert tokenizers.same_vocabulary(tiny_tokenizer(32), tiny_tokenizer(32))
    assert not tokenizers.same_vocabulary(tiny_tokenizer(32), tiny_tokenizer(31))
    assert not tokenizers.same_vocabulary(tiny_tokenizer(32), None)

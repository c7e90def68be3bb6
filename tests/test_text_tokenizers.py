"""The tokenizer of a folder or repository: there, not there, or an error where that cannot be told."""

import pytest
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError

from stars_fast.text import tokenizers


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
    monkeypatch.setattr(tokenizers, "hf_hub_download", repository((), otherwise))
    with pytest.raises(OSError, match=r"some/model.*the hub's answer"):
        tokenizers.tokenizer_beside("some/model", "tokenizer")


def test_a_repository_has_a_tokenizer_where_it_has_one_of_its_files(monkeypatch):
    monkeypatch.setattr(tokenizers, "hf_hub_download", repository(("spiece.model",), LocalEntryNotFoundError))
    assert tokenizers.has_tokenizer("some/model")
    monkeypatch.setattr(tokenizers, "hf_hub_download", repository((), EntryNotFoundError))
    assert not tokenizers.has_tokenizer("some/model")

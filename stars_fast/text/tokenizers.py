"""Tokenizers that lie beside models: found, loaded, compared."""

from __future__ import annotations

import os
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

# What a tokenizer is saved as, by any of transformers' classes; the usual ones first.
_FILES = (
    *("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "spm.model", "sentencepiece.model", "tekken.json"),
)


def same_vocabulary(a: Any, b: Any) -> bool:
    """Whether the ids of two tokenizers, of which either may be None, mean the same."""
    return a is not None and b is not None and (a is b or a.get_vocab() == b.get_vocab())


def tokenizer_beside(name: str, argument: str) -> Any:
    """The tokenizer in a model's folder or repository; None if there is none.

    One that is there and cannot be loaded is an OSError that names ``argument``: without it, a model would read ids of
    another vocabulary.
    """
    from transformers import AutoTokenizer

    try:
        # Asked first: of some families, transformers makes an empty tokenizer where there are no files.
        return AutoTokenizer.from_pretrained(name) if has_tokenizer(name) else None
    except Exception as error:  # it needs packages, a connection, permission, code
        raise OSError(f"the tokenizer of {name!r} cannot be loaded (or pass {argument}=): {error}") from error


def has_tokenizer(name: str) -> bool:
    """Whether a folder or repository holds any of a tokenizer's files; raises where that cannot be told."""
    if os.path.isdir(name):
        return any(os.path.isfile(os.path.join(name, file)) for file in _FILES)
    unknown = None
    for file in _FILES:
        try:
            hf_hub_download(name, file)
            return True
        except LocalEntryNotFoundError as error:  # no connection, and not in the cache
            unknown = error
        except EntryNotFoundError:
            continue
    if unknown is not None:
        raise unknown
    return False

"""Tokenizers by name and beside models: found, loaded, compared."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from huggingface_hub import HfApi, try_to_load_from_cache
from transformers import AutoProcessor, AutoTokenizer

from stars_fast.methods.numbers import shown
from stars_fast.names import near
from stars_fast.notices import warn
from stars_fast.text.tokens import is_panic

# What a tokenizer is saved as, by any of transformers' classes; the usual ones first.
_FILES = (
    *("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "spm.model", "sentencepiece.model", "tekken.json"),
)
_SECONDS = 5.0  # for the hub to answer


def check_tokenizer(argument: str, tokenizer: Any, needed: str = "") -> None:
    """Raise TypeError for anything but a tokenizer, or None where it is not ``needed`` for something."""
    if tokenizer is None and not needed:
        return
    if not isinstance(tokenizer, type) and is_processor(tokenizer):
        raise TypeError(
            f"{argument} is a {type(tokenizer).__name__}, which reads pictures, too: give it as processor=, or its "
            "tokenizer, processor.tokenizer"
        )
    if not callable(tokenizer) or not hasattr(tokenizer, "decode") or isinstance(tokenizer, type):
        raise TypeError(f"{argument} is a {type(tokenizer).__name__}, {shown(tokenizer)}: give a tokenizer{needed}")


def same_vocabulary(a: Any, b: Any) -> bool:
    """Whether the ids of two tokenizers, of which either may be None, mean the same."""
    return a is not None and b is not None and (a is b or a.get_vocab() == b.get_vocab())


def check_beside(argument: str, tokenizer: Any, processor: Any) -> None:
    """Raise ValueError where a tokenizer gives other ids than the processor that reads what it does not."""
    if hasattr(tokenizer, "get_vocab") and not same_vocabulary(tokenizer, processor.tokenizer):
        raise ValueError(
            f"{argument} has another vocabulary ({len(tokenizer.get_vocab())} ids) than the tokenizer of processor= "
            f"({len(processor.tokenizer.get_vocab())}), and a prompt is read in one: leave {argument}= out"
        )


def tokenizer_beside(name: str, argument: str = "", cached: bool = False) -> Any:
    """The tokenizer in a model's folder or repository; None if there is none.

    One that is there and cannot be loaded is an OSError that names ``argument``, if it may be passed instead: without
    it, a model would read ids of another vocabulary. ``cached``: files that were downloaded before will do, without
    asking for newer ones.
    """
    remedy = f" (or pass {argument}=)" if argument else ""
    no_folder = f"{name!r} is no folder{near(name, ['demo'])}, and the hub"  # in a folder there is nothing to fail
    with _said(f"{no_folder} could not be asked for its tokenizer{remedy}"):
        # Asked first: of some families, transformers makes an empty tokenizer where there are no files.
        if not has_tokenizer(name):
            return None
    with _said(f"the tokenizer of {name!r} cannot be loaded{remedy}"):
        if cached:
            with suppress(Exception):  # some of them lack
                return AutoTokenizer.from_pretrained(name, local_files_only=True)
        return AutoTokenizer.from_pretrained(name)


def named_tokenizer(argument: str, tokenizer: Any) -> Any:
    """``tokenizer``, loaded where it is a path or hub id.

    Raises
    ------
    OSError, TypeError
        Where it cannot be loaded; for what is neither.
    """
    tokenizer = _loaded(AutoTokenizer, argument, tokenizer)
    check_tokenizer(argument, tokenizer)
    return tokenizer


def named_processor(processor: Any) -> Any:
    """``processor`` of texts and pictures, or None; loaded where it is a path or hub id.

    Raises
    ------
    OSError, TypeError
        Where it cannot be loaded; for what is none.
    """
    processor = _loaded(AutoProcessor, "processor", processor)
    if processor is not None and (isinstance(processor, type) or not (callable(processor) and is_processor(processor))):
        kind = type(processor).__name__
        raise TypeError(
            f"processor is a {kind}, {shown(processor)}: give a transformers processor, which has a tokenizer"
        )
    return processor


def _loaded(auto: Any, argument: str, given: Any) -> Any:
    """What is given, loaded by transformers' class ``auto`` where it is a path or hub id."""
    if not isinstance(given, (str, os.PathLike)):
        return given
    name = os.fspath(given)
    with _said(f"{argument}={name!r} cannot be loaded"):
        return auto.from_pretrained(name)


def processor_beside(places: Sequence[str], role: str, argument: str) -> Any:
    """The processor of a model that takes pictures, in the first of these folders or repositories that has one; None,
    with a warning of what to pass, where none loads.
    """
    cause: BaseException | None = None
    for place in places:
        try:
            with _said("cannot be loaded"):
                processor = AutoProcessor.from_pretrained(place)
        except OSError as error:
            cause = cause or error.__cause__
        else:
            if is_processor(processor):
                return processor
    if cause is not None:
        warn(
            f"{role}={places[0]!r} takes pictures, and its processor cannot be loaded, so that chats with pictures are "
            f"refused: pass {argument}= ({type(cause).__name__}: {' '.join(str(cause).split())})"
        )
    return None


def is_processor(candidate: Any) -> bool:
    """Whether it makes more of a prompt than ids: where there is nothing but a tokenizer, AutoProcessor loads that, and
    some tokenizers have one of another library.
    """
    return getattr(candidate, "tokenizer", None) is not None and not hasattr(candidate, "get_vocab")


@contextmanager
def _said(what: str) -> Iterator[None]:
    """Whatever loading a tokenizer raises is an OSError: it needs packages, a connection, permission, code."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise OSError(f"{what}: {error}") from error


def has_tokenizer(name: str) -> bool:
    """Whether a folder or repository holds any of a tokenizer's files; raises where that cannot be told.

    The hub is asked once, and only where none was downloaded before: without a connection, each file would be tried for
    half a minute.
    """
    if os.path.isdir(name):
        return any(os.path.isfile(os.path.join(name, file)) for file in _FILES)
    if any(isinstance(try_to_load_from_cache(name, file), str) for file in _FILES):
        return True
    files = HfApi().model_info(name, timeout=_SECONDS).siblings or []
    return any(file.rfilename in _FILES for file in files)

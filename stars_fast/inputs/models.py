"""Models as users name them: objects, local folders, hub ids."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers import PreTrainedModel

from stars_fast import demo
from stars_fast.inputs.repositories import read
from stars_fast.policy.policy import Policy
from stars_fast.rewards import CallableReward, ClassifierReward, Reward
from stars_fast.rewards.classifier import ONE_LABEL
from stars_fast.tree.support import vocabulary

# What a tokenizer is saved as, by any of transformers' classes; the usual ones first.
_TOKENIZER_FILES = (
    *("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "spm.model", "sentencepiece.model", "tekken.json"),
)


DEMO, _DEMO_FOLDER = "demo", os.path.dirname(demo.__file__)
Device = str | torch.device | None


def placement(device: Device = None) -> torch.device:
    """The device of that name. None and "auto": the accelerator that torch names, if the operators have kernels for it
    (CUDA, ROCm), else the CPU. Raises ValueError for what is no device.
    """
    if device is None or device == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator if accelerator is not None and accelerator.type == "cuda" else torch.device("cpu")
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device!r}: {error}") from error


def load_policy(
    policy: PreTrainedModel | str | os.PathLike[str], tokenizer: Any, device: Device = None, dtype: str = "auto"
) -> tuple[PreTrainedModel, Any]:
    """The policy and its tokenizer.

    Parameters
    ----------
    policy : transformers causal LM, path, hub id or "demo"
        An object is left where it is. By name it is loaded with transformers' Auto classes.
    tokenizer : transformers tokenizer, path or hub id, optional
        Default: the one beside a policy given by name, if there is one.
    device : str or torch.device, optional
        Of a policy given by name; see :func:`placement`.
    dtype : str
        Of a policy given by name, as torch calls it; "auto" is that of its weights.

    Raises
    ------
    OSError, ValueError, TypeError
        As transformers says, for what it cannot load; for a device that is not there; for a model without an LM head.
    """
    if isinstance(policy, (str, os.PathLike)):
        from transformers import AutoModelForCausalLM

        name = _named(policy, "policy")
        if tokenizer is None:
            tokenizer = _tokenizer_beside(name, "tokenizer")
        policy = _loaded(AutoModelForCausalLM, name, device, dtype)
    if not hasattr(policy, "config") or not hasattr(policy, "get_output_embeddings"):
        raise TypeError(f"policy is a {type(policy).__name__}: give a transformers causal LM, a path or a hub id")
    if isinstance(tokenizer, (str, os.PathLike)):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    if policy.get_output_embeddings() is None:
        raise TypeError(f"policy is a {type(policy).__name__} without a language-model head")
    return policy, tokenizer


def draft_policy(draft: Any, kept: Policy | None, policy: Policy, tokenizer: Any) -> Policy:
    """``draft`` (a model, path or hub id) beside ``policy``; ``kept`` where it is that already.

    Raises
    ------
    ValueError
        Where the two do not have the same vocabulary.
    """
    if kept is not None and draft in (kept.model, kept.source):
        return kept
    model, own = load_policy(draft, None, policy.device)
    ids, ours = vocabulary(model), policy.vocab_size
    # Tables of one vocabulary may be padded to different sizes, if a tokenizer says how many ids are in use.
    same = ids == ours or (tokenizer is not None and len(tokenizer) <= min(ids, ours))
    if not same or (own is not None and tokenizer is not None and own.get_vocab() != tokenizer.get_vocab()):
        raise ValueError(
            f"draft: {type(model).__name__} has {ids} ids and the policy {ours}: their vocabularies must be the same"
        )
    made = Policy(model, policy.graphs.enabled, policy.torch_compile)
    made.source = draft
    return made


def load_reward(
    reward: Any,
    tokenizer: Any,
    reward_tokenizer: Any,
    tail: str | Sequence[int],
    policy: PreTrainedModel,
    device: Device = None,
) -> Reward:
    """A :class:`Reward` from a Reward, a sequence classifier, what :func:`load_classifier` takes, or a plain function.

    A classifier that reads the policy's ids must have an embedding for each that is expected (its tokenizer's, where
    there is one). A padded vocabulary's further ids are caught when they are scored.
    """
    if isinstance(reward, type):
        raise TypeError(f"reward is a class: give an instance, {reward.__name__}(...)")
    if isinstance(reward_tokenizer, (str, os.PathLike)):
        from transformers import AutoTokenizer

        reward_tokenizer = AutoTokenizer.from_pretrained(reward_tokenizer)
    if isinstance(reward, (str, os.PathLike)):
        reward, reward_tokenizer = load_classifier(reward, reward_tokenizer, device)
    if not isinstance(reward, Reward) and hasattr(reward, "config") and hasattr(reward, "base_model_prefix"):
        reward = ClassifierReward(reward, reward_tokenizer, tokenizer, tail)
    if isinstance(reward, Reward):
        reward.check_vocabulary(vocabulary(policy) if tokenizer is None else len(tokenizer), policy)
        return reward
    if callable(reward):
        return CallableReward(reward, tokenizer)
    raise TypeError(
        f"reward is a {type(reward).__name__}: give a sequence-classification model with one label, "
        "a stars_fast.rewards.Reward, a function, a path or a hub id"
    )


def load_classifier(
    name: str | os.PathLike[str], tokenizer: Any, device: Device = None, dtype: str = "auto"
) -> tuple[PreTrainedModel, Any]:
    """A sequence classifier by path, hub id or "demo", and the tokenizer beside it, if there is one and none is given.

    ``device``, ``dtype`` and errors are those of :func:`load_policy`.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    name = _named(name, "reward")
    config = read(AutoConfig, name)
    if config.num_labels != 1:
        raise ValueError(f"reward={name!r} has num_labels={config.num_labels}; {ONE_LABEL}")
    if tokenizer is None:
        tokenizer = _tokenizer_beside(name, "reward_tokenizer")
    return _loaded(AutoModelForSequenceClassification, name, device, dtype), tokenizer


def _named(name: str | os.PathLike[str], role: str) -> str:
    """The folder or hub id. transformers takes a folder that does not exist for a hub id, and says so at length."""
    path = os.fspath(name)
    if path == DEMO:
        path = os.path.join(_DEMO_FOLDER, role)
        if not os.path.exists(os.path.join(path, "model.safetensors")):
            raise FileNotFoundError(f"the demo models are missing here: examples/train_demo.py makes them (in {path})")
    elif path.startswith((".", "/", "~")) and not os.path.isdir(path):
        raise FileNotFoundError(f"no folder {path}: give a model's folder, a hub id or {DEMO!r}")
    return path


def _loaded(auto: Any, name: str, device: Device, dtype: str) -> PreTrainedModel:
    place = placement(device)
    if dtype == "auto" and os.path.dirname(name) == _DEMO_FOLDER:
        dtype = "float32"  # the files hold half of that, to be small
    model = read(auto, name, dtype=dtype)
    try:
        placed: PreTrainedModel = model.to(place)
        return placed
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={str(place)!r}: {error}") from error


def _tokenizer_beside(name: str, argument: str) -> Any:
    """The model's own tokenizer. None if there is none: a policy then takes ids, a reward model reads the policy's.

    One that is there and cannot be loaded is an error: without it, a reward model would read ids of another vocabulary.
    """
    from transformers import AutoTokenizer

    try:
        # Asked first: of some families, transformers makes an empty tokenizer where there are no files.
        return AutoTokenizer.from_pretrained(name) if _has_tokenizer(name) else None
    except Exception as error:  # it needs packages, a connection, permission, code
        raise OSError(f"the tokenizer of {name!r} cannot be loaded (or pass {argument}=): {error}") from error


def _has_tokenizer(name: str) -> bool:
    """Whether a folder or repository holds any of a tokenizer's files; raises where that cannot be told."""
    if os.path.isdir(name):
        return any(os.path.isfile(os.path.join(name, file)) for file in _TOKENIZER_FILES)
    unknown = None
    for file in _TOKENIZER_FILES:
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

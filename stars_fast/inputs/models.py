"""Models as users name them: objects, local folders, hub ids."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from stars_fast import demo
from stars_fast.inputs.repositories import adapted, read
from stars_fast.methods.numbers import shown
from stars_fast.notices import warn
from stars_fast.policy.policy import Policy
from stars_fast.rewards import CallableReward, ClassifierReward, Reward
from stars_fast.rewards.classifier import AS_CAUSAL, ONE_LABEL
from stars_fast.rewards.ids import POLICYS, check_draft
from stars_fast.text.media import ABOUT_TEXT, forward_arguments
from stars_fast.text.tokenizers import (
    check_beside,
    is_processor,
    named_processor,
    named_tokenizer,
    processor_beside,
    tokenizer_beside,
)
from stars_fast.tree.lack import is_lack_of_memory
from stars_fast.tree.media import takes_media
from stars_fast.tree.support import place, unwrapped

# Heads that a causal LM has no use for, and no model has that was trained as one.
_HEADS = ("score.weight", "classifier.weight")
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
        said = str(error).partition("\n")[0]
        raise ValueError(f"device={shown(device)} must be a torch device, such as 'cpu' or 'cuda:0': {said}") from error


def load_policy(
    policy: PreTrainedModel | str | os.PathLike[str],
    tokenizer: Any,
    device: Device = None,
    dtype: str = "auto",
    processor: Any = None,
) -> tuple[PreTrainedModel, Any, Any]:
    """The policy, its tokenizer, and what reads its pictures.

    Parameters
    ----------
    policy : transformers causal LM or encoder-decoder, path, hub id or "demo"
        An object is left where it is. By name it is loaded with transformers' Auto classes.
    tokenizer : transformers tokenizer, path or hub id, optional
        Default: the processor's; else the one beside a policy given by name, if there is one. An adapter is read with
        its own where it has one, else with that of the model that it changes.
    device : str or torch.device, optional
        Of a policy given by name; see :func:`placement`.
    dtype : str
        Of a policy given by name, as torch calls it; "auto" is that of its weights.
    processor : transformers processor, path or hub id, optional
        Default: the one beside a policy given by name, where that takes pictures.

    Raises
    ------
    OSError, ValueError, TypeError
        As transformers says, for what it cannot load; for a device that is not there; for a model without an LM head;
        for a tokenizer and a processor of two vocabularies.
    """
    processor = named_processor(processor)
    if isinstance(policy, (str, os.PathLike)):
        from transformers import AutoModelForImageTextToText

        name = _named(policy, "policy")
        auto = _auto_class(name)
        if processor is None and auto is AutoModelForImageTextToText:
            places = list(_places(name))
            processor = processor_beside(places, "policy", "processor")
            if processor is not None and tokenizer is None and len(places) > 1:  # an adapter may have learned tokens
                processor.tokenizer = tokenizer_beside(name, "tokenizer") or processor.tokenizer
        if tokenizer is None and processor is None:
            found = (tokenizer_beside(place, "tokenizer") for place in _places(name))
            tokenizer = next((one for one in found if one is not None), None)
        policy, loading = _loaded(auto, name, device, dtype)
        _refuse_random("policy", name, policy, loading["missing_keys"], "give a causal LM with its language-model head")
        if heads := sorted(key for key in loading["unexpected_keys"] if key.endswith(_HEADS)):
            raise ValueError(f"policy={name!r} is a classifier (its checkpoint has {heads[0]}): give a causal LM")
    _refuse_wrapper(policy, "policy")
    if not hasattr(policy, "config") or not hasattr(policy, "get_output_embeddings"):
        raise TypeError(f"policy is a {type(policy).__name__}: give a transformers causal LM, a path or a hub id")
    if tokenizer is None and processor is not None:
        tokenizer = processor.tokenizer
    tokenizer = named_tokenizer("tokenizer", tokenizer)
    if processor is not None:
        check_beside("tokenizer", tokenizer, processor)
    if isinstance(policy, type):
        raise TypeError(f"policy is the class {policy.__name__}: give a model, a path or a hub id")
    if policy.get_output_embeddings() is None:
        raise TypeError(f"policy is a {type(policy).__name__} without a language-model head")
    if processor is not None:
        _warn_of_unread(processor, policy)
    return policy, tokenizer, processor


def _warn_of_unread(processor: Any, policy: PreTrainedModel) -> None:
    """Say it where a policy reads nothing that its processor makes of a picture."""
    made = set(getattr(processor, "model_input_names", ())) - ABOUT_TEXT
    if made and not made & forward_arguments(unwrapped(policy)):
        warn(
            f"processor= is a {type(processor).__name__}, and of what it makes besides ids ({', '.join(sorted(made))}) "
            f"the policy, a {type(policy).__name__}, reads nothing: chats with pictures are refused"
        )


def _auto_class(name: str) -> Any:
    """Which of transformers' Auto classes loads a policy: where both know its config, the one that knows what it was
    saved as.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM

    config = _config(name)
    if config is None:  # what is broken is said when the model is read
        return AutoModelForCausalLM
    text, pictures, sources = (
        {known.__name__ for known in _several(auto._model_mapping[type(config)])}
        if type(config) in auto._model_mapping
        else set[str]()
        for auto in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM)
    )
    saved = set(config.architectures or ())
    if sources and (saved & sources - text - pictures or not text | pictures):
        return AutoModelForSeq2SeqLM
    if not text and not pictures:
        raise ValueError(f"policy={name!r} has a {type(config).__name__}, of which transformers makes no causal LM")
    only_text = not pictures or bool(saved & text - pictures)
    return AutoModelForCausalLM if only_text else AutoModelForImageTextToText


def _places(name: str) -> Iterator[str]:
    """Where what a model is read with may lie: beside it and, of an adapter, beside the model that it changes."""
    yield name
    base = None
    with suppress(Exception):  # an adapter's settings may hold anything
        base = adapted(name)
    if base is not None:
        yield base


def _config(name: str) -> Any:
    """A model's config, of an adapter that of the model which it changes; None where it cannot be read."""
    from transformers import AutoConfig

    with suppress(OSError, ValueError, ImportError):
        return read(AutoConfig, name)
    with suppress(Exception):  # an adapter's settings may hold anything
        return read(AutoConfig, adapted(name))
    return None


def _several(classes: Any) -> Sequence[type]:
    return classes if isinstance(classes, (list, tuple)) else (classes,)


def second_policy(named: Any, kept: Iterable[Policy], policy: Policy, tokenizer: Any, role: str = "draft") -> Policy:
    """A model, path or hub id beside ``policy``; one of ``kept`` where it is that already.

    Raises
    ------
    ValueError
        Where the two are known not to have the same vocabulary.
    """
    for one in kept:
        same = named is one.model or (isinstance(named, (str, os.PathLike)) and named == one.source)
        if same and place(one.model) == one.made_for:
            return one
    model, *_ = load_policy(named, None, policy.device)
    check_draft(model, policy.model, tokenizer, role)
    made = Policy(model, policy.graphs.enabled, policy.torch_compile, role)
    made.bar([] if policy.barred is None else policy.barred.tolist())  # which the policy could not go on from
    made.source = named
    return made


def load_reward(
    reward: Any,
    tokenizer: Any,
    reward_tokenizer: Any,
    tail: str | Sequence[int],
    policy: PreTrainedModel,
    device: Device = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Reward:
    """A :class:`Reward` from a Reward, a sequence classifier, what :func:`load_classifier` takes, or a plain function.

    Whose ids a classifier reads is found out here (:func:`stars_fast.rewards.ids.reading`); ``reward_tokenizer`` may be
    "policy". One that reads the policy's must have an embedding for each that is expected (its tokenizer's, where there
    is one). A padded vocabulary's further ids are caught when they are scored.
    """
    if isinstance(reward, type):
        raise TypeError(f"reward is a class: give an instance, {reward.__name__}(...)")
    if reward_tokenizer != POLICYS and not is_processor(reward_tokenizer):
        reward_tokenizer = named_tokenizer("reward_tokenizer", reward_tokenizer)
    if isinstance(reward, (str, os.PathLike)):
        reward, reward_tokenizer = load_classifier(reward, reward_tokenizer, device)
    _refuse_modules(reward)
    if not isinstance(reward, Reward) and hasattr(reward, "config") and hasattr(reward, "base_model_prefix"):
        own, processor = (None, reward_tokenizer) if is_processor(reward_tokenizer) else (reward_tokenizer, None)
        reward = ClassifierReward(
            reward, own, tokenizer, tail, chat_template_kwargs=chat_template_kwargs, processor=processor
        )
    elif chat_template_kwargs is not None:
        raise ValueError(
            f"reward_chat_template_kwargs={chat_template_kwargs!r:.80}: reward is a {type(reward).__name__}, which is "
            "given its template's variables where it is made"
        )
    elif reward_tokenizer is not None:
        warn(f"reward_tokenizer= has no effect on a {type(reward).__name__}: it has its own, or needs none")
    if not isinstance(reward, Reward) and callable(reward):
        reward = CallableReward(reward, tokenizer)
    if isinstance(reward, Reward):
        reward.check_policy(policy, tokenizer)
        return reward
    several = " (several at once: stars_fast.rewards.WeightedSum)" if isinstance(reward, (list, tuple, dict)) else ""
    raise TypeError(
        f"reward is a {type(reward).__name__}: give a sequence-classification model with one label, "
        f"a stars_fast.rewards.Reward, a function, a path or a hub id{several}"
    )


def _refuse_wrapper(model: Any, role: str) -> None:
    """Raise TypeError for what spreads a model over devices: its parts are not where a model's are."""
    name, inner = type(model).__name__, getattr(model, "module", None)
    if isinstance(model, nn.Module) and not isinstance(model, PreTrainedModel) and isinstance(inner, PreTrainedModel):
        raise TypeError(f"{role} is a {name} around a {type(inner).__name__}: give the model itself, its .module")


def _refuse_modules(reward: Any) -> None:
    """Raise TypeError for networks that would be called as functions of prompts and completions, and are none."""
    if not isinstance(reward, nn.Module) or hasattr(reward, "base_model_prefix"):
        return
    _refuse_wrapper(reward, "reward")
    name = type(reward).__name__
    takes = list(inspect.signature(reward.forward).parameters)
    if not {"prompts", "completions", "completion_ids"} & set(takes):
        raise TypeError(
            f"reward is a {name}, whose forward takes {', '.join(takes) or 'nothing'} and none of prompts, completions "
            "and completion_ids: give a function of these, or (a network on the policy's hidden state) a "
            "stars_fast.rewards.HiddenStateProbe"
        )


def load_classifier(
    name: str | os.PathLike[str], tokenizer: Any, device: Device = None, dtype: str = "auto"
) -> tuple[PreTrainedModel, Any]:
    """A sequence classifier by path, hub id or "demo", and what lies beside it, if it does and none is given: the
    processor of one that takes pictures, else the tokenizer.

    ``device``, ``dtype`` and errors are those of :func:`load_policy`.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    name = _named(name, "reward")
    given = tokenizer
    if given is None:
        tokenizer = tokenizer_beside(name, "reward_tokenizer")
    config = read(AutoConfig, name)
    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        raise ValueError(
            f"reward={name!r} has a {type(config).__name__}, of which transformers makes no sequence classifier: "
            f"{AS_CAUSAL}"
        )
    labels = config.num_labels
    # Two labels stand in no config.json: whether the head has one row is seen when it is loaded.
    one = {} if labels == 1 else {"num_labels": 1, "ignore_mismatched_sizes": True}
    model, loading = _loaded(AutoModelForSequenceClassification, name, device, dtype, **one)
    if loading["mismatched_keys"]:
        raise ValueError(f"reward={name!r} has num_labels={labels}; {ONE_LABEL}")
    _refuse_random("reward", name, model, loading["missing_keys"], ONE_LABEL)
    if given is None and takes_media(model):
        tokenizer = processor_beside([name], "reward", "reward_tokenizer") or tokenizer
    return model, tokenizer


def _named(name: str | os.PathLike[str], role: str) -> str:
    """The folder or hub id. transformers takes a folder that does not exist for a hub id, and says so at length."""
    path = os.fspath(name)
    if path == demo.NAME:
        path = os.path.join(demo.FOLDER, role)
        if not os.path.exists(os.path.join(path, "model.safetensors")):
            raise FileNotFoundError(f"the demo models are missing here: examples/train_demo.py makes them (in {path})")
    elif path.startswith((".", "/", "~")) and not os.path.isdir(path):
        raise FileNotFoundError(f"no folder {path}: give a model's folder, a hub id or {demo.NAME!r}")
    return path


def _refuse_random(role: str, name: str, model: PreTrainedModel, missing: Iterable[str], remedy: str) -> None:
    """Raise ValueError for a head that is not in the checkpoint; warn of other weights that are not."""
    keys = sorted(missing)
    heads = [key for key in keys if not key.startswith(f"{model.base_model_prefix}.")]
    if heads:
        raise ValueError(
            f"{role}={name!r}: its checkpoint lacks {', '.join(heads)}, so its {type(model).__name__} would have a "
            f"random head; {remedy}"
        )
    if keys:
        more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
        warn(f"{role}={name!r}: its checkpoint lacks {', '.join(keys[:3])}{more}, which are random now")


def _loaded(
    auto: Any, name: str, device: Device, dtype: str, **options: Any
) -> tuple[PreTrainedModel, dict[str, Iterable[str]]]:
    """The model, and what transformers says of its loading."""
    where = placement(device)
    if dtype == "auto" and Path(name).parent == demo.FOLDER:
        dtype = "float32"  # the files hold half of that, to be small
    model, loading = read(auto, name, dtype=dtype, output_loading_info=True, **options)
    try:
        return model.to(where), loading
    except (RuntimeError, AssertionError) as error:
        if is_lack_of_memory(error):
            raise
        raise ValueError(f"device={str(where)!r}: {error}") from error

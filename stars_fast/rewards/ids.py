"""Whose ids a scorer reads, and how that is known: another tokenizer's would be scored without an error."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from stars_fast.notices import warn
from stars_fast.text.tokenizers import check_tokenizer, same_vocabulary, tokenizer_beside
from stars_fast.tree.support import unwrapped, vocabulary

POLICYS = "policy"  # in a tokenizer's place: the scorer reads the policy's ids
# How many more embeddings two models of one tokenizer may have: vocabularies are padded to multiples of up to 512 and
# grow by some hundred reserved ids. Those of different tokenizers lie thousands apart.
_MOST_PADDING = 512
_warned: set[str] = set()  # what was said of models of which nothing is known
_without: dict[str, str] = {}  # why there is no tokenizer in a repository: engines do not ask, and wait, again


class Reading(NamedTuple):
    """What a scorer reads prompts and answers with."""

    tokenizer: Any  # its own; None: it reads the policy's ids as they are
    why: str


class _Beside(NamedTuple):
    tokenizer: Any
    why: str  # where it lies, or why there is none


def first_reading(given: Any, argument: str) -> Reading:
    """What is known while no engine has asked; raises for what is neither a tokenizer nor "policy"."""
    if isinstance(given, str):
        if given != POLICYS:
            raise ValueError(f"{argument}={given!r}: must be a tokenizer, or 'policy' where the policy's ids are read")
        return Reading(None, "")
    check_tokenizer(argument, given)
    return Reading(given, "" if given is None else f"{argument}= was given")


def reading(
    models: Sequence[PreTrainedModel],
    given: Any,
    policy: PreTrainedModel,
    policy_tokenizer: Any,
    argument: str,
    before: Reading,
) -> Reading:
    """Whose ids the models of one scorer read.

    The policy's where ``given`` says so, and where one of the models is the policy or was loaded from where the policy
    was; else those of the tokenizer that lies where a model was loaded from. Where none does, nothing is known: ids
    are shared unless sizes or settings speak against it, with a warning but for a model that was made of a
    configuration of as many ids.

    Parameters
    ----------
    models : sequence of transformers models, the most telling first
    given : "policy", optional
    policy_tokenizer : transformers tokenizer, optional
        None: the policy is asked for ids alone.
    argument : str
        What ``given`` is called where it is given.
    before : Reading
        What an engine was told that asked earlier, or :func:`first_reading`.

    Raises
    ------
    ValueError
        For models that have no embedding for some of the policy's ids, or that are likely to have been trained on
        another tokenizer's, with what to pass; for a scorer that reads an earlier engine's ids and not this one's.
    """
    if given is None:
        found = _known(models, policy, policy_tokenizer, argument)
    else:
        found = Reading(None, f"{argument}={POLICYS!r} says so")
    if found.tokenizer is None:
        _check_embeddings(models, policy, policy_tokenizer, argument)
    elif before.why:
        if same_vocabulary(found.tokenizer, policy_tokenizer):
            return before
        raise ValueError(
            f"this reward reads the ids of an earlier engine's policy ({before.why}), and of this one's it would read "
            f"the text ({found.why}): give each engine a scorer of its own"
        )
    return found


def _known(models: Sequence[PreTrainedModel], policy: PreTrainedModel, policy_tokenizer: Any, argument: str) -> Reading:
    if relation := _related(models, policy):
        return Reading(None, relation)
    own = _beside(*models)
    if own.tokenizer is not None and policy_tokenizer is not None:
        return Reading(own.tokenizer, own.why)
    theirs = _beside(policy)
    if own.tokenizer is not None and theirs.tokenizer is not None:
        if same_vocabulary(own.tokenizer, theirs.tokenizer):
            return Reading(None, f"its tokenizer ({own.why}) has the vocabulary of the policy's ({theirs.why})")
        raise ValueError(
            f"the reward model's tokenizer ({own.why}) has another vocabulary than the policy's ({theirs.why}), which "
            f"is asked for ids alone: pass the policy's as tokenizer=, or {argument}='policy' if they are shared"
        )
    _check_embeddings(models, policy, policy_tokenizer, argument)
    return _unknown(models, policy, policy_tokenizer, own.why, argument)


def _unknown(
    models: Sequence[PreTrainedModel], policy: PreTrainedModel, policy_tokenizer: Any, cause: str, argument: str
) -> Reading:
    """Nothing says whose ids are read: the policy's, unless that is likely to be wrong."""
    model, doubt = models[0], _doubt(models[0], policy)
    name, policys = (f"a {type(unwrapped(one)).__name__} of {vocabulary(one)} embeddings" for one in (model, policy))
    said = f"nothing says that the reward model, {name}, reads the ids of the policy, {policys} ({cause})"
    said += "" if doubt is None else f", and it has {doubt}"
    remedy = f"pass {argument}='policy' if it does, else its own tokenizer (to a scorer of yours, as its tokenizer=)"
    if doubt is not None and policy_tokenizer is not None:
        raise ValueError(f"{said}: {remedy}")
    if loaded_from(model) or doubt is not None or vocabulary(model) != vocabulary(policy):
        _warn_unknown(f"{said}; it is given them: {remedy}")
    return Reading(None, "nothing says otherwise")


def check_own(model: PreTrainedModel, tokenizer: Any, policy: PreTrainedModel, policy_tokenizer: Any) -> None:
    """Of a scorer with a tokenizer, to which ids of a policy without one are its own.

    Raises ValueError where they are known to be another's; warns where nothing is known.
    """
    if policy_tokenizer is not None or _related([model], policy):
        return
    theirs = _beside(policy)
    if theirs.tokenizer is None:
        _warn_unknown(
            f"nothing says whose ids the policy is asked for ({theirs.why}); a {type(unwrapped(model)).__name__} reads "
            "them with its own tokenizer: pass the policy's as tokenizer=",
        )
    elif not same_vocabulary(tokenizer, theirs.tokenizer):
        raise ValueError(
            f"the policy is asked for ids alone, and its tokenizer ({theirs.why}) has another vocabulary than the "
            "reward's: pass the policy's as tokenizer="
        )


def check_draft(model: PreTrainedModel, policy: PreTrainedModel, policy_tokenizer: Any, role: str = "draft") -> None:
    """Of a model that writes ids for the policy: ValueError where their vocabularies are known to differ, a warning
    where nothing is known.
    """
    ids, ours = vocabulary(model), vocabulary(policy)
    name, cause = type(unwrapped(model)).__name__, f"has {ids} ids and the policy {ours}"
    # Tables of one vocabulary may be padded to different sizes, if a tokenizer says how many ids are in use.
    same = ids == ours or (policy_tokenizer is not None and len(policy_tokenizer) <= min(ids, ours))
    if same and not _related([model], policy):
        own = _beside(model)
        theirs = _beside(policy) if policy_tokenizer is None else _Beside(policy_tokenizer, "given as tokenizer=")
        known = own.tokenizer is not None and theirs.tokenizer is not None
        same = not known or same_vocabulary(own.tokenizer, theirs.tokenizer)
        cause = f"has a tokenizer ({own.why}) of another vocabulary than the policy's ({theirs.why})"
        if not known and loaded_from(model):
            why = own.why if own.tokenizer is None else theirs.why
            _warn_unknown(
                f"nothing says that {role}, a {name}, has the policy's vocabulary ({why}): it is taken to be the same"
            )
    if not same:
        raise ValueError(f"{role}: {name} {cause}: their vocabularies must be the same")


def _warn_unknown(message: str) -> None:
    """Once in a process."""
    if message not in _warned:
        warn(message)
        _warned.add(message)  # last: a warning may be an error


def loaded_from(model: PreTrainedModel) -> str:
    """The folder or hub id that a model was loaded from; empty for one that was made of a configuration."""
    return str(getattr(model.config, "_name_or_path", None) or "")


def _related(models: Sequence[PreTrainedModel], policy: PreTrainedModel) -> str | None:
    """Why the models must have the policy's vocabulary, by what they are and where they came from."""
    for model in models:
        if _innermost(model) is _innermost(policy):
            return "it is the policy"
        if loaded_from(model) and loaded_from(model) == loaded_from(policy):
            return f"it was loaded from {loaded_from(policy)!r}, as the policy was"
    return None


def _innermost(model: PreTrainedModel) -> PreTrainedModel:
    """What torch.compile and PEFT have wrapped."""
    return unwrapped(getattr(model, "_orig_mod", model))


def _beside(*models: PreTrainedModel) -> _Beside:
    """The first tokenizer that lies where a model was loaded from. One that cannot be loaded is none."""
    names = list(map(loaded_from, models))
    for name in names:
        if name and (os.path.isdir(name) or name not in _without):
            cause = f"there is no tokenizer beside {name!r}"
            try:
                if (tokenizer := tokenizer_beside(name, cached=True)) is not None:
                    return _Beside(tokenizer, f"beside {name!r}")
            except OSError as error:
                cause = str(error).splitlines()[0]
            _without[name] = cause
    return _Beside(None, _without.get(names[0], "it was made of a configuration"))


def _check_embeddings(
    models: Sequence[PreTrainedModel], policy: PreTrainedModel, policy_tokenizer: Any, argument: str
) -> None:
    embeddings = min(map(vocabulary, models))
    ids = vocabulary(policy) if policy_tokenizer is None else len(policy_tokenizer)
    if embeddings < ids:
        raise ValueError(
            f"the reward model has {embeddings} embeddings, fewer than the {ids} ids of the policy: pass its own "
            f"tokenizer as {argument}= (or, where both share one, tokenizer=)"
        )


def _doubt(model: PreTrainedModel, policy: PreTrainedModel) -> str | None:
    """What makes it likely that the model was trained on another tokenizer's ids, in words."""
    size, reward_size = vocabulary(policy), vocabulary(model)
    ends, reward_ends = _ends_of_texts(policy), _ends_of_texts(model)
    if reward_size > size + _MOST_PADDING:
        return f"{reward_size - size} embeddings more"
    # Base and tuned models of a family differ in one of the two, not in both.
    if all(a and b and not set(a) & set(b) for a, b in zip(ends, reward_ends, strict=True)):
        return "bos and eos ids {} and {}, the policy {} and {}".format(*reward_ends, *ends)
    return None


def _ends_of_texts(model: PreTrainedModel) -> list[list[int]]:
    """The ids that begin and those that end a text, by the model's config."""
    config = model.config.get_text_config()
    ids = [getattr(config, name, None) for name in ("bos_token_id", "eos_token_id")]
    return [[one] if isinstance(one, int) else list(one or ()) for one in ids]

"""A call of transformers' ``generate`` under guidance: which of its settings hold, beside those of StarsConfig."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedModel

from stars_fast.config import StarsConfig
from stars_fast.inputs.generation_settings import NAMED, unapplied, warn_of_unapplied
from stars_fast.inputs.sampling import NEUTRAL, SAMPLING_FIELDS, ids_of
from stars_fast.methods.numbers import shown
from stars_fast.text.media import forward_arguments
from stars_fast.tree.media import takes_media
from stars_fast.tree.support import unwrapped

_CACHES = ("past_key_values", "cache")  # until transformers 5.23, and from 5.24 on
# What transformers hands to every decoding loop.
_PREPARED = ("attention_mask", "position_ids", *_CACHES, "use_cache", "logits_to_keep", "cache_position")
_ENCODED = "mm_encoder_outputs"  # pictures that have been through the vision tower: from 5.24 on
_FIELDS = tuple(field.name for field in dataclasses.fields(StarsConfig))


class GenerateCall(NamedTuple):
    """What is handed to transformers, and what its answer to it is read with."""

    generation_config: GenerationConfig | None
    kwargs: dict[str, Any]
    config: StarsConfig
    explicit: set[str]  # settings that win over the config's


def check_ids(name: str, value: Any) -> None:
    """Raise TypeError for anything but a tensor of ids, which is what transformers takes."""
    if value is None or isinstance(value, torch.Tensor):
        return
    raise TypeError(
        f"{name}={shown(value)} is a {type(value).__name__}: give a tensor of ids [batch, length], such as "
        "**tokenizer(text, return_tensors='pt'); text and chats are for StarsEngine(model, reward).generate"
    )


def merge(
    model: PreTrainedModel, config: StarsConfig, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
) -> GenerateCall:
    """The call as transformers gets it: with the config's settings where it leaves them open.

    Raises
    ------
    TypeError
        For a setting of guidance among ``kwargs``.
    ValueError
        For greedy decoding, an assistant, and anything to start from besides ids.
    """
    for name in kwargs.keys() - vars(GenerationConfig()).keys():
        refuse_setting(name, kwargs[name])
    given = {**({} if generation_config is None else generation_config.to_dict()), **kwargs}
    given = {name: value for name, value in given.items() if value is not None}
    if given.get("do_sample") is False:
        raise ValueError("do_sample=False: reward-guided decoding samples; leave do_sample unset or pass True")
    for name in ("assistant_model", "prompt_lookup_num_tokens"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{name} is set: assisted decoding and reward-guided decoding cannot be combined")
    for name in ("inputs_embeds", "position_ids", *_CACHES):
        if kwargs.get(name) is not None:
            called = {"logits_processor", "stopping_criteria"} <= kwargs.keys()  # by transformers
            inside = "; as custom_generate, give decoding(reward_model)" if called else ""
            raise ValueError(f"{name} is given: reward-guided decoding starts from token ids alone{inside}")
    explicit = given.keys() | _models_own(model, config)
    if (stop_strings := given.get("stop_strings")) is not None:
        config = config.replace(stop_strings=stop_strings)
        explicit.discard("stop_strings")  # they are the config's now; what transformers prepares are the model's
    settings = _left_open(explicit, config)
    kwargs = {name: value for name, value in kwargs.items() if name != "stop_strings" and name not in settings}
    if generation_config is None:
        return GenerateCall(None, kwargs | settings, config, explicit)
    generation_config = copy.deepcopy(generation_config)  # transformers wants no settings beside one
    for name, value in {**settings, "stop_strings": None}.items():
        setattr(generation_config, name, value)
    return GenerateCall(generation_config, kwargs, config, explicit)


def refuse_setting(name: str, value: Any) -> None:
    """Raise TypeError for a field of StarsConfig that was given beside it."""
    if name in _FIELDS:
        raise TypeError(f"{name} is a setting of StarsConfig: pass stars_config=StarsConfig({name}={shown(value)})")


def _left_open(explicit: set[str], config: StarsConfig) -> dict[str, Any]:
    """Settings of the config where the call has none of its own."""
    names = (*SAMPLING_FIELDS, "eos_token_id", "max_new_tokens", "num_return_sequences")
    settings = {"do_sample": True, **{name: getattr(config, name) for name in names}}
    if "max_length" in explicit:
        del settings["max_new_tokens"]
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in settings.items()
        if value is not None and name not in explicit
    }


def _models_own(model: PreTrainedModel, config: StarsConfig) -> set[str]:
    """Lengths and counts that the model's generation_config sets, where the StarsConfig leaves its defaults."""
    own, default = model.generation_config, StarsConfig()
    names = []
    if config.max_new_tokens == default.max_new_tokens:
        names += ["max_new_tokens", "max_length"]
    if config.num_return_sequences == default.num_return_sequences:
        names.append("num_return_sequences")
    return {name for name in names if getattr(own, name, None) is not None}


def with_methods_sampling(config: StarsConfig) -> StarsConfig:
    """Sampling settings of its own that a method has, such as CARDS' top_k, win over what the model brings."""
    ruled = config.chosen_method.rule(config)
    return config.replace(**{name: getattr(ruled, name) for name in SAMPLING_FIELDS})


def settled(
    config: StarsConfig,
    explicit: set[str] | None,
    model: PreTrainedModel,
    generation_config: GenerationConfig,
    prompt_length: int,
) -> StarsConfig:
    """Settings of the transformers call over those of the StarsConfig, over the model's.

    Parameters
    ----------
    explicit : set of str, optional
        Settings of the call's own. None: not known, to be told from the ``generation_config``.
    generation_config : GenerationConfig
        As transformers has prepared it.
    prompt_length : int
        Tokens, padding included.
    """
    if explicit is None:
        explicit = _differing(model, generation_config, prompt_length) | _models_own(model, config)
    values: dict[str, Any] = {"num_return_sequences": generation_config.num_return_sequences or 1}
    for name in SAMPLING_FIELDS:
        value = getattr(generation_config, name, None)
        if value is not None and (name in explicit or getattr(config, name) is None):
            values[name] = value
    if "eos_token_id" in explicit or config.eos_token_id is None:
        eos = generation_config._eos_token_tensor
        values["eos_token_id"] = None if eos is None else ids_of(model, eos.tolist())
        if not values["eos_token_id"]:
            values["ignore_eos"] = True
    if explicit & {"max_new_tokens", "max_length"}:
        values["max_new_tokens"] = max(generation_config.max_length - prompt_length, 1)
    if generation_config.stop_strings is not None and ("stop_strings" in explicit or config.stop_strings is None):
        values["stop_strings"] = generation_config.stop_strings
    return config.replace(**values)


def _differing(model: PreTrainedModel, generation_config: GenerationConfig, prompt_length: int) -> set[str]:
    """Settings that the model's own generation_config and transformers' defaults do not explain."""
    own, defaults = model.generation_config, generation_config._get_default_generation_params()
    differing = set()
    for name in _FIELDS:
        value = getattr(generation_config, name, None)
        expected = getattr(own, name, None)
        expected = defaults.get(name) if expected is None else expected
        if value is not None and value != expected:
            differing.add(name)
    # By now transformers has put the prompt's length on top of its default.
    unset = (own.max_length, defaults["max_length"] + prompt_length)
    if generation_config.max_new_tokens is None and generation_config.max_length not in unset:
        differing.add("max_length")
    return differing


def taken_media(model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a processor has made besides ids and mask, taken out of the arguments of a transformers call.

    Left in, transformers would encode it before the custom method runs (from 5.24 on), and repeat it for each sample by
    rules of the model's own. Of a model that reads nothing but text it is left in, to be refused by name.
    """
    names = forward_arguments(unwrapped(model)) - {_ENCODED} if takes_media(model) else ()
    return {name: kwargs.pop(name) for name in names if kwargs.get(name) is not None}


def refuse_modes(generation_config: GenerationConfig) -> None:
    """Raise ValueError for modes of ``generate`` that guidance cannot have."""
    beams = generation_config.num_beams or 1
    if beams > 1:
        raise ValueError(f"num_beams={beams}: beam search and reward-guided decoding cannot be combined")
    if getattr(generation_config, "prompt_lookup_num_tokens", None) or getattr(generation_config, "is_assistant", None):
        raise ValueError("prompt_lookup_num_tokens is set: assisted decoding cannot be combined with guidance")
    if not generation_config.do_sample:
        raise ValueError("do_sample=False: reward-guided decoding samples; pass do_sample=True")
    for name, value in unapplied(generation_config).items():
        if name in NAMED:
            raise ValueError(f"{name}={value!r:.60} asks for another way of decoding: pass {name}={NAMED[name]}")
    warn_of_unapplied(generation_config)
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(generation_config, name, False):
            raise ValueError(f"{name}=True is not supported: use StarsEngine, whose output has log-probabilities")


def refuse_inputs(model_kwargs: dict[str, Any], media: Mapping[str, Any]) -> None:
    """Raise ValueError for anything to start from besides ids, mask and media, or what transformers itself adds."""
    if model_kwargs.get("encoder_outputs") is not None:  # the source's ids are not there any more
        raise ValueError(
            "the model is an encoder-decoder, whose source a reward could not see from here: use "
            "StarsEngine(model, reward).generate(sources)"
        )
    for name in _CACHES:
        if model_kwargs.get(name) is not None and model_kwargs[name].get_seq_length():
            raise ValueError(f"{name} holds tokens: reward-guided decoding starts from token ids alone")
    for name, value in model_kwargs.items():
        nothing = value is None or (name == _ENCODED and not value)  # {}, of a model that could take some
        if not nothing and name not in _PREPARED:
            raise ValueError(f"{name} is given: reward-guided decoding starts from token ids alone")
    for name, value in media.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{name} is given: besides ids, reward-guided decoding takes the tensors of a processor")


def check_in_force(config: StarsConfig, generation_config: GenerationConfig) -> None:
    """Raise ValueError for settings of the StarsConfig that a list of processors, built already, does not have."""
    for name, neutral in NEUTRAL.items():
        value, built = getattr(config, name), getattr(generation_config, name, None)
        if value is not None and value != (neutral if built is None else built):
            raise ValueError(
                f"{name}={value!r} of the StarsConfig comes too late for the logits processors of this call: "
                f"pass {name} to model.generate, or use stars_fast.generate"
            )

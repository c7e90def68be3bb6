"""Which sampling settings hold: the call's, the config's, the model's own, or none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from transformers import PreTrainedModel

from stars_fast.config import StarsConfig
from stars_fast.methods.numbers import MOST, integer, plain
from stars_fast.policy.leaf import Sampling
from stars_fast.tree.support import vocabulary

# Field -> the value that switches it off.
NEUTRAL: dict[str, Any] = {field.name: field.default for field in fields(Sampling) if field.name != "eos_token_ids"}
SAMPLING_FIELDS = tuple(NEUTRAL)


def resolve_sampling(config: StarsConfig, model: PreTrainedModel, tokenizer: Any) -> Sampling:
    """Settings for one call. Of the model's own generation_config only what it sets counts, no defaults."""
    own = getattr(model, "generation_config", None)
    models = {name: getattr(own, name, None) for name in SAMPLING_FIELDS if getattr(config, name) is None}
    try:
        config = config.replace(**models)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the model's generation_config: {error}") from error
    values: dict[str, Any] = {}
    for name, neutral in NEUTRAL.items():
        value = getattr(config, name)
        values[name] = neutral if value is None else value
    values["top_k"] = min(values["top_k"], MOST)  # beyond the vocabulary it is all the same
    return Sampling(**values, eos_token_ids=_eos_token_ids(config, model, tokenizer))


def _eos_token_ids(config: StarsConfig, model: PreTrainedModel, tokenizer: Any) -> tuple[int, ...]:
    if config.ignore_eos:
        return ()
    sources = {
        "the StarsConfig": config,
        "the model's generation_config": getattr(model, "generation_config", None),
        "the model's config": model.config,
        "the tokenizer": tokenizer,
    }
    for name, source in sources.items():
        eos = getattr(source, "eos_token_id", None)
        if eos is not None:
            vocab = vocabulary(model)
            try:
                return tuple(token for token in as_ids(eos) if 0 <= token < vocab)
            except TypeError as error:
                raise ValueError(f"{name}: {error}") from error
    return ()


def as_ids(ids: int | Sequence[int]) -> tuple[int, ...]:
    """One id or several, as transformers' configs have them, each once."""
    ids = plain(ids)
    several = dict.fromkeys(ids) if isinstance(ids, (list, tuple)) else [ids]
    return tuple(integer("eos_token_id", token) for token in several)

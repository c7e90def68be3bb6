"""Which sampling settings hold: the call's, the config's, the model's own, or none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from stars_fast.config import StarsConfig
from stars_fast.methods.numbers import MOST, integer, plain
from stars_fast.policy.leaf import Sampling
from stars_fast.tree.support import vocabulary

# Field -> the value that switches it off.
NEUTRAL: dict[str, Any] = {field.name: field.default for field in fields(Sampling) if field.name != "eos_token_ids"}
SAMPLING_FIELDS = tuple(NEUTRAL)


def resolve_sampling(
    config: StarsConfig, model: PreTrainedModel, tokenizer: Any, own: GenerationConfig | None = None
) -> Sampling:
    """Settings for one call. Of the model's generation_config, or ``own`` in its place, only what it sets counts, no
    defaults.
    """
    own = getattr(model, "generation_config", None) if own is None else own
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
    return Sampling(**values, eos_token_ids=_eos_token_ids(config, model, tokenizer, own))


def _eos_token_ids(config: StarsConfig, model: PreTrainedModel, tokenizer: Any, own: Any) -> tuple[int, ...]:
    if config.ignore_eos:
        return ()
    if config.eos_token_id is not None:
        return as_ids(config.eos_token_id)
    sources = {"the model's generation_config": own, "the model's config": model.config, "the tokenizer": tokenizer}
    for name, source in sources.items():
        eos = getattr(source, "eos_token_id", None)
        if eos is not None:
            try:
                return ids_of(model, as_ids(eos))
            except TypeError as error:
                raise ValueError(f"{name}: {error}") from error
    return ()


def ids_of(model: PreTrainedModel, ids: Sequence[int]) -> tuple[int, ...]:
    """Those that the model can write: to transformers, a -1 or an id past the vocabulary ends no text."""
    size = vocabulary(model)
    return tuple(token for token in ids if 0 <= token < size)


def as_ids(ids: int | Sequence[int]) -> tuple[int, ...]:
    """One id or several, as transformers' configs have them, each once."""
    ids = plain(ids)
    several = dict.fromkeys(ids) if isinstance(ids, (list, tuple)) else [ids]
    return tuple(integer("eos_token_id", token) for token in several)

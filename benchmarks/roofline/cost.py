"""What a forward pass of a model reads and computes, counted from its config without its weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from stars_fast import demo
from stars_fast.report.weights import Weights, head_weights

_CONFIGS = Path(__file__).parent / "configs"
_ROLES: dict[str, tuple[Any, str]] = {
    "policy": (AutoModelForCausalLM, "a causal language model"),
    "reward": (AutoModelForSequenceClassification, "a sequence classifier"),
}


@dataclass(frozen=True)
class AttentionLayer:
    """Shapes of one attention layer; ``window`` is the number of keys a query sees, itself included."""

    query_heads: int
    kv_heads: int
    key_size: int
    value_size: int
    window: int | None = None

    @property
    def kv_elements(self) -> int:
        """Numbers that one token leaves in the cache."""
        return self.kv_heads * (self.key_size + self.value_size)

    @property
    def operations_per_key(self) -> int:
        """Operations of one query token, all heads, with one key and its value."""
        return 2 * self.query_heads * (self.key_size + self.value_size)


@dataclass(frozen=True)
class ModelCost(Weights):
    """Weights of a model, and what else its forward passes read and compute. Numbers, unless a name says bytes."""

    name: str  # class of the model
    hidden: int  # numbers gathered per token from the embedding table
    vocab: int  # numbers the head leaves per row
    layers: tuple[AttentionLayer, ...]
    dtype: torch.dtype  # of keys and values, and logits

    @classmethod
    def of(cls, model: nn.Module) -> ModelCost:
        """Count a causal model of transformers, which may lie on the ``meta`` device."""
        causal = cast(PreTrainedModel, model)
        return cls(
            **asdict(Weights.of(model)),
            name=type(model).__name__,
            hidden=int(cast(nn.Embedding, causal.get_input_embeddings()).weight.shape[1]),
            vocab=max((int(p.shape[0]) for p in head_weights(model)), default=0),
            layers=_attention_layers(causal.config),
            dtype=causal.dtype,
        )

    @classmethod
    def from_config(
        cls, config: PreTrainedConfig, role: str = "policy", dtype: torch.dtype = torch.bfloat16
    ) -> ModelCost:
        """Build the model on the ``meta`` device, where weights have shapes and no storage, and count.

        Parameters
        ----------
        config : transformers config
            Of a multimodal model the text part is counted.
        role : str
            "policy" (with its output embedding) or "reward" (with a head of one score).
        dtype : torch.dtype

        Raises
        ------
        ValueError
            For a config that has no causal model of this role, or keeps a state other than keys and values.
        """
        config = _text_config(config, role)
        with torch.device("meta"):
            model = _ROLES[role][0].from_config(config, dtype=dtype)
        _refuse_bidirectional(model, role)
        return cls.of(model)

    @classmethod
    def named(cls, name: str, role: str) -> ModelCost:
        """In 16 bits, of the config that :func:`config_named` finds."""
        return cls.from_config(config_named(name, role), role)

    def quantised(self, bytes_per_weight: float) -> ModelCost:
        """With so many bytes for each weight of its layers; tables and head stay as they are, as quantisers leave them.

        Raises
        ------
        ValueError
            Unless it is above 0.
        """
        if not bytes_per_weight > 0:
            raise ValueError(f"{bytes_per_weight} bytes a weight: above 0 (8-bit weights have 1)")
        body = round(self.body * bytes_per_weight)
        return replace(self, body_bytes=body, bytes=self.bytes - self.body_bytes + body)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that one token takes, all layers, whatever their windows."""
        return sum(layer.kv_elements for layer in self.layers) * self.dtype.itemsize


def short_names() -> list[str]:
    """Names of the configs that lie beside this module."""
    return sorted(path.stem for path in _CONFIGS.glob("*.json"))


def config_named(name: str, role: str = "policy") -> PreTrainedConfig:
    """The config behind a short name, a folder, a ``config.json`` or a hub id; of the demo model of that role: "demo".

    Raises
    ------
    OSError, ValueError
        As transformers says.
    """
    if name in short_names():
        return AutoConfig.from_pretrained(_CONFIGS / f"{name}.json")
    if name == "demo":
        return AutoConfig.from_pretrained(Path(demo.__file__).parent / role)
    path = Path(name).expanduser()
    try:
        return AutoConfig.from_pretrained(path if path.exists() else name)
    except OSError as error:
        raise OSError(f"{name}: {error} (short names: {', '.join(short_names())})") from error


def _text_config(config: PreTrainedConfig, role: str) -> PreTrainedConfig:
    """The config of the decoder, or ValueError for what is none."""
    if role not in _ROLES:
        raise ValueError(f"role={role!r}: choose from {', '.join(_ROLES)}")
    named = f"the {role}'s config (model_type={config.model_type!r})"
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{named} is an encoder-decoder: only decoder-only models are supported")
    text = config.get_text_config()
    auto, what = _ROLES[role]
    if type(text) not in auto._model_mapping:
        raise ValueError(f"{named} is not the config of {what} that transformers knows")
    stateful = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if stateful or not getattr(text, "num_attention_heads", None):
        what = f"layers of type {', '.join(sorted(stateful))}" if stateful else "no attention heads"
        raise ValueError(f"{named} has {what}: only keys and values are counted, no other state")
    return text


def _refuse_bidirectional(model: PreTrainedModel, role: str) -> None:
    if not all(getattr(module, "is_causal", True) for module in model.modules()):
        raise ValueError(
            f"the {role}'s config (model_type={model.config.model_type!r}) makes a {type(model).__name__} that is not "
            "causal: it reads a text in full each time, and this model counts new tokens only"
        )


def _attention_layers(config: Any) -> tuple[AttentionLayer, ...]:
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    if getattr(config, "kv_lora_rank", None):  # transformers caches latent attention expanded, per query head
        shapes = heads, heads, config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    else:
        shapes = heads, getattr(config, "num_key_value_heads", None) or heads, size, size
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return tuple(AttentionLayer(*shapes, window=window if kind == "sliding_attention" else None) for kind in kinds)

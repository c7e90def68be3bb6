"""Which transformers models a tree of keys and values can hold, and within which limits."""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers import PreTrainedModel

from stars_fast.notices import warn


def described(model: PreTrainedModel, role: str) -> str:
    """What error messages call a model: "policy is a LlamaForCausalLM (model_type='llama')"."""
    return f"{role} is a {type(model).__name__} (model_type={model.config.model_type!r})"


def unwrapped(model: PreTrainedModel) -> PreTrainedModel:
    """The model whose parts are base model and head: PEFT wraps one whose layers it has changed in place."""
    inner: PreTrainedModel = getattr(model, "get_base_model", lambda: model)()
    return inner


def is_encoder_decoder(model: PreTrainedModel) -> bool:
    """Whether its answers are written behind a source that an encoder reads."""
    return bool(getattr(model.config, "is_encoder_decoder", False))


def vocabulary(model: PreTrainedModel) -> int:
    """Ids the model has embeddings for."""
    return int(cast(torch.Tensor, model.get_input_embeddings().weight).shape[0])


def written(model: PreTrainedModel) -> int:
    """Ids the model gives a logit for: some have embeddings for more, which can be read and not be written."""
    head = cast(Any, model.get_output_embeddings())
    return int(getattr(head, "out_features", None) or head.weight.shape[0])  # packed weights have another shape


def refuse_unsupported(model: PreTrainedModel, role: str, encoder_decoders: bool = False) -> None:
    """Raise NotImplementedError, by name, for models that a tree of keys and values cannot represent."""
    config = model.config.get_text_config()
    name = f"the {described(model, role)}"
    refuse_offloaded(model, role)
    adapter = getattr(model, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False):
        raise NotImplementedError(
            f"{name} with a learned prompt ({type(adapter).__name__}): its virtual tokens are outside the tree"
        )
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1 or torch.device("meta") in devices:
        where = ", ".join(sorted(str(device) for device in devices))
        raise NotImplementedError(f"{name} spread over devices ({where}): keys and values lie on one device")
    if not encoder_decoders and is_encoder_decoder(model):
        raise NotImplementedError(f"{name}, an encoder-decoder: those are supported as the policy alone")
    kinds = set(getattr(config, "layer_types", None) or ())
    stateful = sorted(kinds - {"full_attention", "sliding_attention"})
    if getattr(model, "_is_stateful", False) or stateful:
        what = f"layers of type {', '.join(stateful)}" if stateful else "a recurrent state"
        raise NotImplementedError(f"{name} with {what}: a state cannot be forked and rolled back token by token")
    refuse_dynamic_rope(model, role)


def refuse_offloaded(model: PreTrainedModel, role: str) -> None:
    """Raise NotImplementedError for weights that accelerate's hooks fetch for each forward pass."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            runs_on = getattr(one, "execution_device", None)
            lies_on = next((parameter.device for parameter in module.parameters()), None)
            moved = runs_on is not None and lies_on is not None and torch.device(runs_on).type != lies_on.type
            if moved or getattr(one, "offload", False):
                raise NotImplementedError(
                    f"the {described(model, role)} with weights that accelerate offloads from {runs_on}: load it whole "
                    "onto one device (device_map='auto' offloads what does not fit)"
                )


def refuse_dynamic_rope(model: PreTrainedModel, role: str) -> None:
    """Raise NotImplementedError for frequencies that depend on the longest row of a batch."""
    if any(_rope_type(rope) == "dynamic" for rope in _rope_parameters(model.config.get_text_config())):
        raise NotImplementedError(
            f"the {described(model, role)} with rope_type='dynamic': one long row of a batch would change every row's "
            "frequencies"
        )


def warn_of_shared_scales(model: PreTrainedModel, role: str) -> None:
    """Warn of activations that are quantised with one scale for all rows of a pass, as torchao's ``PerTensor`` does."""
    for name, parameter in model.named_parameters():
        granularity = getattr(getattr(parameter, "act_quant_kwargs", None), "granularity", None)
        constant = getattr(parameter, "act_quant_scale", None) is not None
        if type(granularity).__name__ == "PerTensor" and not constant:
            warn(
                f"the {role}'s activations are quantised with one scale for all rows of a pass ({name} and others: "
                "PerTensor), so each text depends on those beside it: quantise with granularity=PerRow()"
            )
            return


def place(model: PreTrainedModel) -> str:
    """Dtype, device and vocabulary of a model, in words."""
    parameter = next(model.parameters())
    return f"{str(parameter.dtype).removeprefix('torch.')} on {parameter.device}, over {vocabulary(model)} ids"


def hidden_window(config: Any, seen: dict[int, int]) -> int | None:
    """The config's sliding window, where some layer it applies to did not ask for one."""
    window = getattr(config, "sliding_window", None)
    if not window or getattr(config, "use_sliding_window", True) is False:
        return None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * len(seen)
    slides = (layer for layer, kind in enumerate(kinds) if kind == "sliding_attention")
    return window if any(not seen.get(layer) for layer in slides) else None


def max_positions(config: Any) -> int | None:
    """Positions a row may use. Past the switch of ``longrope`` one row would change the frequencies of all."""
    limit = getattr(config, "max_position_embeddings", None)
    for rope in _rope_parameters(config):
        if _rope_type(rope) == "longrope":
            original = rope.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", limit
            )
            limit = min(limit, original) if limit else original
    return limit


def _rope_parameters(config: Any) -> list[dict[str, Any]]:
    """Every rotary setting of a config; newer transformers nest one per kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return [value for value in parameters.values() if isinstance(value, dict)] or [parameters]


def _rope_type(rope: dict[str, Any]) -> str:
    return str(rope.get("rope_type", rope.get("type", "default")))

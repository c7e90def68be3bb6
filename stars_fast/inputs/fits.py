"""What a fit was made for, and whether that is what is at hand."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch

from stars_fast.config import StarsConfig
from stars_fast.methods.base import Method
from stars_fast.methods.fit import Fit
from stars_fast.notices import warn
from stars_fast.policy.leaf import Sampling
from stars_fast.policy.policy import Policy
from stars_fast.rewards import Reward

# Parameters of a model that are looked at, besides its last ones, and numbers of each.
_PARAMETERS, _LAST, _NUMBERS = 12, 4, 4
# How far apart copies in float32, float16 and bfloat16 may be: bfloat16 rounds by up to 2**-8 of a number.
_RELATIVE, _ABSOLUTE = 0.005, 1e-6
# What a fit records and other calls may differ in: weights within rounding, answers' length, a calibration's prompts.
_APART = ("policy_weights", "reward_weights", "max_new_tokens", "prompts", "targets")

_looked_at: WeakKeyDictionary[torch.nn.Module, list[float] | None] = WeakKeyDictionary()
_told: WeakSet[Policy] = WeakSet()


def made_for(config: StarsConfig, sampling: Sampling, policy: Policy, reward: Reward) -> dict[str, Any]:
    """Models, segmenter and sampling, as plain values: rewards of a segment have another law under any other.

    ``policy_weights`` and ``reward_weights`` are some of the models' weights, left out where they cannot be read, and
    ``max_new_tokens`` is the length of the longest answers.
    """
    segments = config.chosen_method.segments()
    filters = {name: value for name, value in vars(sampling).items() if name != "eos_token_ids"}
    scorers = [tree.model for tree in reward.tree_models] or [_own_model(reward)]
    read = {"policy_weights": _weights([policy.model]), "reward_weights": _weights(scorers)}
    return {
        "policy": described(policy.model),
        "reward": ", ".join([reward.described, *(described(tree.model) for tree in reward.tree_models)]),
        **{name: numbers for name, numbers in read.items() if numbers},
        "segment_length": config.segment_length,
        "max_new_tokens": config.max_new_tokens,
        **{name: value for name, value in segments._asdict().items() if value != segments._field_defaults[name]},
        **filters,
        **({"mix": _mix(config.whole_method)} if config.whole_method.guides else {}),
    }


def _mix(method: Method) -> str:
    """Who draws the candidates, in words."""
    parts = [f"{method.own_weight:g} policy"]
    for model, weight, transform in method.guides:
        name = "policy" if model is None else model if isinstance(model, str) else described(model)
        under = "" if transform is None else f" under {getattr(transform, '__qualname__', type(transform).__name__)}"
        parts.append(f"{weight:g} {name}{under}")
    return " + ".join(parts)


def described(model: Any) -> str:
    """A transformers model: its class and its sizes."""
    config = model.config.get_text_config()
    sizes = [getattr(config, name, None) for name in ("num_hidden_layers", "hidden_size", "vocab_size")]
    return f"{type(model).__name__}({', '.join(map(str, sizes))})"


def check_fit(config: StarsConfig, sampling: Sampling, policy: Policy, reward: Reward) -> None:
    """Raise ValueError for a fit that was made for something else; warn of one that the method has no use for, and once
    of answers that may be longer than those it was made from.
    """
    known = config.known
    if known is None:
        return
    if not config.chosen_method.uses_fit:
        warn(f"method={config.chosen_method.name!r} has no use for a fit")
        return
    if not config.chosen_method.has_target and len(known.prefixes[0][0].rewards) == 1:
        raise ValueError(
            f"fit: a calibration's, which serves 'stars' and 'cards': method={config.chosen_method.name!r} needs one "
            "of stars_fast.fit(engine, prompts)"
        )
    here = made_for(config, sampling, policy, reward)
    recorded = {name: known.made_for[name] for name in _APART if name in known.made_for}
    differences = known.differences({**{name: here[name] for name in here if name not in _APART}, **recorded})
    differences += [
        f"the {model}'s weights are others here"
        for model in ("policy", "reward")
        if not _alike(recorded.get(f"{model}_weights"), here.get(f"{model}_weights"))
    ]
    if differences:
        raise ValueError(
            f"fit: made for something else ({'; '.join(differences)}): give {_as_made(known, here)}, or make one anew "
            "with stars_fast.fit(engine, prompts)"
        )
    longest = recorded.get("max_new_tokens", config.max_new_tokens)
    if config.max_new_tokens > longest and policy not in _told:
        _told.add(policy)
        warn(
            f"max_new_tokens={config.max_new_tokens}, and the fit was made with max_new_tokens={longest}: later "
            "segments are taken to be like the last of those. Make one at this length where that matters"
        )


def _as_made(known: Fit, here: dict[str, Any]) -> str:
    """The settings to pass for a fit; of what is no setting, such as the models, that they are to be its own."""
    settings = {field.name for field in fields(StarsConfig)} - set(_APART)
    named = [name for name in here if name not in _APART and known.made_for.get(name) != here[name]]
    if named and settings.issuperset(named) and set(named) <= set(known.made_for):
        return ", ".join(f"{name}={known.made_for[name]}" for name in named)
    return "what it was made for"


def _alike(then: list[float] | None, now: list[float] | None) -> bool:
    """Whether these may be the same weights in two dtypes, as far as both are known."""
    if then is None or now is None:
        return True
    return len(then) == len(now) and all(
        abs(a - b) <= _RELATIVE * max(abs(a), abs(b)) + _ABSOLUTE for a, b in zip(then, now, strict=True)
    )


def _own_model(reward: Reward) -> Any:
    """What a reward without a tree scores with, where that is a module."""
    return getattr(reward, "model", None) or getattr(reward, "probe", None)


def _weights(models: Iterable[Any]) -> list[float] | None:
    """Of each model some weights, to five digits. None where those of one cannot be read."""
    numbers = list[float]()
    for model in models:
        if not isinstance(model, torch.nn.Module):
            return None
        # Kept as they were first seen: a policy that is trained in place keeps its fit.
        if model not in _looked_at:
            _looked_at[model] = _some_weights(model)
        if (own := _looked_at[model]) is None:
            return None
        numbers += own
    return numbers


@torch.no_grad()
def _some_weights(model: torch.nn.Module) -> list[float] | None:
    """Numbers of parameters from the first to the last, adapters' included; None for quantised or divided weights."""
    parameters = list(model.parameters())
    readable = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    if getattr(getattr(model, "config", None), "quantization_config", None) is not None or not all(
        one.dtype in readable and one.numel() and not one.is_meta and type(one).__name__ != "DTensor"
        for one in parameters
    ):
        return None
    end = len(parameters) - 1
    chosen = {round(i * end / (_PARAMETERS - 1)) for i in range(_PARAMETERS)} | set(range(max(end + 1 - _LAST, 0), end))
    values = list[torch.Tensor]()
    for one in (parameters[i] for i in sorted(chosen) if end >= 0):
        places = [(2 * i + 1) * one.numel() // (2 * _NUMBERS) for i in range(_NUMBERS)]
        values += [one.detach().flatten()[places].float().cpu()]
    return [float(f"{number:.5g}") for number in torch.cat(values).tolist()] if values else None

"""What a fit was made for, and whether that is what is at hand."""

from __future__ import annotations

from typing import Any

from stars_fast.config import StarsConfig
from stars_fast.notices import warn
from stars_fast.policy.leaf import Sampling
from stars_fast.policy.policy import Policy
from stars_fast.rewards import Reward


def made_for(config: StarsConfig, sampling: Sampling, policy: Policy, reward: Reward) -> dict[str, Any]:
    """Models, segmenter and sampling, as plain values: rewards of a segment have another law under any other."""
    segments = config.chosen_method.segments()
    filters = {name: value for name, value in vars(sampling).items() if name != "eos_token_ids"}
    return {
        "policy": described(policy.model),
        "reward": ", ".join([reward.described, *(described(tree.model) for tree in reward.tree_models)]),
        "segment_length": config.segment_length,
        **{name: value for name, value in segments._asdict().items() if value != segments._field_defaults[name]},
        **filters,
    }


def described(model: Any) -> str:
    """A transformers model: its class and its sizes."""
    config = model.config.get_text_config()
    sizes = [getattr(config, name, None) for name in ("num_hidden_layers", "hidden_size", "vocab_size")]
    return f"{type(model).__name__}({', '.join(map(str, sizes))})"


def check_fit(config: StarsConfig, sampling: Sampling, policy: Policy, reward: Reward) -> None:
    """Raise ValueError for a fit that was made for something else; warn of one that the method has no use for."""
    if config.known is None:
        return
    if not config.chosen_method.uses_fit:
        warn(f"method={config.chosen_method.name!r} has no use for a fit")
    elif not config.chosen_method.has_target and len(config.known.prefixes[0][0].rewards) == 1:
        raise ValueError(
            f"fit: a calibration's, which serves 'stars' and 'cards': method={config.chosen_method.name!r} needs one "
            "of stars_fast.fit(engine, prompts)"
        )
    elif differences := config.known.differences(made_for(config, sampling, policy, reward)):
        raise ValueError(
            f"fit: made for something else ({'; '.join(differences)}); make one with stars_fast.fit(engine, prompts)"
        )

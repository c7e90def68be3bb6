"""What a prompt has to keep to: the models' vocabulary and positions, and the slots that there are."""

from __future__ import annotations

from collections.abc import Sequence

from stars_fast.config import StarsConfig
from stars_fast.loop.scheduler import persona_slots, response_slots
from stars_fast.policy.policy import Policy
from stars_fast.text.prompts import Prompt
from stars_fast.tree.model import TreeModel


def check_prompt(
    index: int,
    prompt: Prompt,
    personas: Sequence[list[int]],
    config: StarsConfig,
    policy: Policy,
    kv_cache_tokens: int | None,
) -> None:
    """Raise ValueError where a prompt, or one of its personas, is too much for the policy or for the slots."""
    for ids, under in [(prompt.ids, ""), *((ids, ", under a preference,") for ids in personas)]:
        bad = [token for token in ids if not 0 <= token < policy.vocab_size]
        if bad:
            raise ValueError(
                f"prompts[{index}]{under} holds id {bad[0]}, outside the policy's vocabulary of {policy.vocab_size}"
            )
    length = max(map(len, [prompt.ids, *personas]))
    check_positions(index, length, config, policy, "policy")
    slots = most_slots(prompt.ids, personas, config)
    if kv_cache_tokens is not None and slots > kv_cache_tokens:
        raise ValueError(
            f"prompts[{index}] has {length} tokens and needs {slots} slots with max_new_tokens="
            f"{config.max_new_tokens} and segment_length={config.segment_length}; kv_cache_tokens={kv_cache_tokens}"
        )


def check_positions(index: int, length: int, config: StarsConfig, model: TreeModel, role: str) -> None:
    """Raise ValueError where a prompt of so many tokens and its answer may outgrow the model's positions."""
    positions = model.max_positions
    if positions is not None and length + config.max_new_tokens > positions:
        raise ValueError(
            f"prompts[{index}] has {length} tokens, which with max_new_tokens={config.max_new_tokens} exceeds the "
            f"limit of the {role}'s {positions} positions"
        )


def most_slots(prompt_ids: Sequence[int], personas: Sequence[Sequence[int]], config: StarsConfig) -> int:
    """Slots that a request may take by itself, its prompt or its personas included."""
    return persona_slots(personas, config) if personas else len(prompt_ids) + response_slots(config)

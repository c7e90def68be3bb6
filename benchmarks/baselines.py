"""What the engine is compared with, written as a careful user of transformers would."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache, PreTrainedModel

from stars_fast import StarsConfig
from stars_fast.methods.stars import acceptance_probability, base_reward, threshold


@dataclass
class Text:
    """One response and what it cost."""

    tokens: list[int] = field(default_factory=list)
    reward: float = math.nan
    attempts: int = 0
    segments: int = 0


@torch.no_grad()
def plain(
    policy: PreTrainedModel, reward: PreTrainedModel, prompt: list[int], config: StarsConfig, eos: set[int]
) -> Text:
    """STARS one prompt and one attempt at a time: a DynamicCache for the policy, cropped after a rejection; the
    reward model reads the whole text for every attempt.

    Samples the law of :class:`stars_fast.StarsEngine` (``finished_threshold="target"``, temperature and top_k only).
    """
    target = float(config.target_reward)  # type: ignore[arg-type]
    base = base_reward(score(reward, prompt), target, config.alpha)
    text, cache = Text(), DynamicCache()
    logits = policy(torch.tensor([prompt]), past_key_values=cache).logits[0, -1]
    while len(text.tokens) < config.max_new_tokens and not (text.tokens and text.tokens[-1] in eos):
        length = min(config.segment_length, config.max_new_tokens - len(text.tokens))
        best: tuple[float, list[int]] | None = None
        for _ in range(config.max_attempts):
            segment = draw_segment(policy, cache, logits, length, config, eos)
            value = score(reward, prompt + text.tokens + segment)
            ended = segment[-1] in eos
            tau = target if ended else threshold(len(text.tokens) + len(segment), config.max_new_tokens, base, target)
            text.attempts += 1
            if best is None or value > best[0]:
                best = (value, segment)
            if torch.rand(()).item() < acceptance_probability(value, tau, config.beta):
                best = (value, segment)
                break
            crop(cache, len(prompt) + len(text.tokens))
        assert best is not None
        text.reward, segment = best
        crop(cache, len(prompt) + len(text.tokens))
        text.tokens += segment
        text.segments += 1
        logits = policy(torch.tensor([segment]), past_key_values=cache).logits[0, -1]
    return text


def draw_segment(
    policy: PreTrainedModel, cache: DynamicCache, logits: torch.Tensor, length: int, config: StarsConfig, eos: set[int]
) -> list[int]:
    """Sample up to ``length`` tokens; the cache then holds all of them but the last."""
    segment: list[int] = []
    while True:
        segment.append(sample(logits, config))
        if len(segment) == length or segment[-1] in eos:
            return segment
        logits = policy(torch.tensor([segment[-1:]]), past_key_values=cache).logits[0, -1]


def sample(logits: torch.Tensor, config: StarsConfig) -> int:
    """One token id from logits ``[V]`` under temperature and top-k."""
    logits = logits.float() / (config.temperature or 1.0)
    if config.top_k:
        values, ids = logits.topk(config.top_k)
        return int(ids[torch.multinomial(values.softmax(-1), 1)])
    return int(torch.multinomial(logits.softmax(-1), 1))


def score(reward: PreTrainedModel, ids: list[int]) -> float:
    """The reward of a text, all of it encoded."""
    hidden = getattr(reward, reward.base_model_prefix)(torch.tensor([ids]), use_cache=False).last_hidden_state
    return float(reward.score(hidden[0, -1])[0])  # type: ignore[operator]


def crop(cache: DynamicCache, length: int) -> None:
    """Roll the cache back to its first ``length`` tokens."""
    surplus = cache.get_seq_length() - length
    if surplus:
        cache.crop(-surplus)

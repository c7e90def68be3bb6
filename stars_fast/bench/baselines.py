"""What the engine is compared with, written as a careful user of transformers would.

:func:`plain` and :func:`strong` sample the law of :class:`stars_fast.StarsEngine` (``finished_threshold="target"``,
temperature and top_k only); :func:`best_of_n` is what is used in practice instead. All run on whatever device the
models are; the tests hold each to its enumerated law.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from stars_fast import StarsConfig
from stars_fast.methods.stars import acceptance_probability, base_reward, threshold


class Segment(NamedTuple):
    """One committed segment."""

    tokens: list[int]
    attempts: int
    accepted: bool  # False for the best of the rejected ones


@dataclass
class Text:
    """One response and what it cost."""

    tokens: list[int] = field(default_factory=list)
    reward: float = math.nan
    history: list[Segment] = field(default_factory=list)

    @property
    def attempts(self) -> int:
        """Candidates drawn, all segments together."""
        return sum(segment.attempts for segment in self.history)

    @property
    def segments(self) -> int:
        """Segments committed."""
        return len(self.history)

    def commit(self, tokens: list[int], reward: float, attempts: int, accepted: bool) -> None:
        self.tokens += tokens
        self.reward = reward
        self.history.append(Segment(tokens, attempts, accepted))

    def finished(self, config: StarsConfig, eos: set[int]) -> bool:
        return len(self.tokens) >= config.max_new_tokens or (bool(self.tokens) and self.tokens[-1] in eos)


@dataclass
class Trial:
    """The attempts at one segment of one text, so far."""

    text: Text
    base: float  # r0
    target: float  # r_star
    attempts: int = 0
    accepted: bool = False
    reward: float = -math.inf  # of `tokens`
    tokens: list[int] = field(default_factory=list)  # the accepted segment, or the best rejected one

    def judge(self, tokens: list[int], reward: float, config: StarsConfig, eos: set[int]) -> bool:
        """Look at one more candidate; True where the segment is decided."""
        length = len(self.text.tokens) + len(tokens)
        tau = self.target if tokens[-1] in eos else threshold(length, config.max_new_tokens, self.base, self.target)
        self.attempts += 1
        self.accepted = torch.rand(()).item() < acceptance_probability(reward, tau, config.beta)
        if self.accepted or not self.tokens or reward > self.reward:
            self.tokens, self.reward = tokens, reward
        return self.accepted or self.attempts == config.max_attempts

    def commit(self) -> None:
        self.text.commit(self.tokens, self.reward, self.attempts, self.accepted)


@torch.no_grad()
def plain(
    policy: PreTrainedModel, reward: PreTrainedModel, prompt: list[int], config: StarsConfig, eos: set[int]
) -> Text:
    """STARS one prompt and one attempt at a time: a DynamicCache for the policy, cropped after a rejection; the
    reward model reads the whole text for every attempt.
    """
    (target,) = targets(config, 1)
    (base,) = _bases(reward, [prompt], [target], config)
    text, cache = Text(), DynamicCache()
    logits = _encode(policy, cache, prompt)
    while not text.finished(config, eos):
        length = min(config.segment_length, config.max_new_tokens - len(text.tokens))
        trial, decided = Trial(text, base, target), False
        while not decided:
            crop(cache, len(prompt) + len(text.tokens))
            segment = draw_segment(policy, cache, logits, length, config, eos)
            decided = trial.judge(segment, score_batch(reward, [prompt + text.tokens + segment])[0], config, eos)
        crop(cache, len(prompt) + len(text.tokens))
        trial.commit()
        if not text.finished(config, eos):
            logits = _encode(policy, cache, trial.tokens)
    return text


@torch.no_grad()
def strong(
    policy: PreTrainedModel,
    reward: PreTrainedModel,
    prompts: Sequence[list[int]],
    config: StarsConfig,
    eos: set[int],
) -> list[Text]:
    """STARS for a batch, from batched parts: ``generate`` of K tokens, and a reward pass over whole texts.

    All prompts are at the same segment. In each round, every text without an accepted candidate gets one more:
    ``generate`` encodes prompt and accepted text (left-padded) and draws K tokens with its cache; the reward model
    (causal) reads prompt, accepted text and candidate of all these rows in one right-padded pass. Texts that have
    accepted leave the batch of the later rounds, which shrinks, and wait until the last one has accepted or used up its
    attempts. That is how published implementations are built, and as far as a script goes that keeps to ``generate``:
    between rounds it drops the cache, and no text runs ahead of the others.
    """
    goals = targets(config, len(prompts))
    bases = _bases(reward, prompts, goals, config)
    texts = [Text() for _ in prompts]
    while running := [i for i, text in enumerate(texts) if not text.finished(config, eos)]:
        length = min(config.segment_length, config.max_new_tokens - len(texts[running[0]].tokens))
        trials = {i: Trial(texts[i], bases[i], goals[i]) for i in running}
        undecided = running
        while undecided:
            contexts = [list(prompts[i]) + texts[i].tokens for i in undecided]
            segments = generate_batch(policy, contexts, length, config, eos)
            wholes = [context + segment for context, segment in zip(contexts, segments, strict=True)]
            scored = zip(undecided, segments, score_batch(reward, wholes), strict=True)
            undecided = [i for i, segment, value in scored if not trials[i].judge(segment, value, config, eos)]
        for trial in trials.values():
            trial.commit()
    return texts


def best_of_n(
    policy: PreTrainedModel,
    reward: PreTrainedModel,
    prompts: Sequence[list[int]],
    config: StarsConfig,
    eos: set[int],
    n: int,
    rows: int,
) -> list[Text]:
    """The best of ``n`` independent texts per prompt, by their final reward; of equal ones the first."""
    drawn = scored_texts(policy, reward, [prompt for prompt in prompts for _ in range(n)], config, eos, rows)
    best = [max(drawn[start : start + n], key=lambda one: one[1]) for start in range(0, len(drawn), n)]
    return [Text(tokens, value, [Segment(tokens, n, True)]) for tokens, value in best]


@torch.no_grad()
def scored_texts(
    policy: PreTrainedModel,
    reward: PreTrainedModel,
    prompts: Sequence[list[int]],
    config: StarsConfig,
    eos: set[int],
    rows: int,
) -> list[tuple[list[int], float]]:
    """A text for each prompt, and its final reward.

    ``generate`` draws ``rows`` texts at a time (left-padded), and the reward model reads as many whole texts in one
    right-padded pass: each text is encoded once by either model, and no step waits for a decision.
    """
    scored: list[tuple[list[int], float]] = []
    for start in range(0, len(prompts), rows):
        batch = prompts[start : start + rows]
        drawn = generate_batch(policy, batch, config.max_new_tokens, config, eos)
        wholes = [prompt + tokens for prompt, tokens in zip(batch, drawn, strict=True)]
        scored += zip(drawn, score_batch(reward, wholes), strict=True)
    return scored


def targets(config: StarsConfig, prompts: int) -> list[float]:
    """r_star of each prompt."""
    given = config.target_reward
    if given is None:
        raise ValueError("target_reward is None: the baselines calibrate nothing, so give a number, or one per prompt")
    each = list(given) if isinstance(given, Sequence) else [given] * prompts
    if len(each) != prompts:
        raise ValueError(f"target_reward has {len(each)} entries for {prompts} prompts")
    return [float(target) for target in each]


def _bases(
    reward: PreTrainedModel, prompts: Sequence[list[int]], goals: Sequence[float], config: StarsConfig
) -> list[float]:
    """r0 of each prompt, which with alpha = 1 needs no reward of the empty answer."""
    if config.alpha == 1.0:
        return list(goals)
    empty = score_batch(reward, prompts)
    return [base_reward(value, target, config.alpha) for value, target in zip(empty, goals, strict=True)]


def _encode(policy: PreTrainedModel, cache: DynamicCache, tokens: list[int]) -> torch.Tensor:
    """Append tokens to the cache; the next token's logits ``[V]``."""
    ids = torch.tensor([tokens], device=policy.device)
    return policy(ids, **{_cache_argument(type(policy).forward): cache}, logits_to_keep=1).logits[0, -1]


@functools.lru_cache
def _cache_argument(forward: Callable[..., Any]) -> str:
    """transformers 5.23 calls it ``cache``, and complains about the name it had before."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def draw_segment(
    policy: PreTrainedModel, cache: DynamicCache, logits: torch.Tensor, length: int, config: StarsConfig, eos: set[int]
) -> list[int]:
    """Sample up to ``length`` tokens; the cache then holds all of them but the last."""
    segment: list[int] = []
    while True:
        segment.append(sample(logits, config))
        if len(segment) == length or segment[-1] in eos:
            return segment
        logits = _encode(policy, cache, segment[-1:])


def sample(logits: torch.Tensor, config: StarsConfig) -> int:
    """One token id from logits ``[V]`` under temperature and top-k."""
    logits = logits.float() / (config.temperature or 1.0)
    if config.top_k:
        values, ids = logits.topk(min(config.top_k, logits.shape[-1]))
        return int(ids[torch.multinomial(values.softmax(-1), 1)])
    return int(torch.multinomial(logits.softmax(-1), 1))


def crop(cache: DynamicCache, length: int) -> None:
    """Roll the cache back to its first ``length`` tokens."""
    surplus = cache.get_seq_length() - length
    if surplus:
        cache.crop(-surplus)


def generate_batch(
    policy: PreTrainedModel, contexts: Sequence[list[int]], length: int, config: StarsConfig, eos: set[int]
) -> list[list[int]]:
    """Sample ``length`` tokens after each context, fewer where an EOS comes first (it is kept)."""
    width = max(len(context) for context in contexts)
    ids = torch.tensor([[0] * (width - len(context)) + context for context in contexts], device=policy.device)
    lengths = torch.tensor([len(context) for context in contexts], device=policy.device)
    mask = (torch.arange(width, device=policy.device) >= width - lengths[:, None]).long()
    settings = GenerationConfig(
        do_sample=True,
        temperature=config.temperature or 1.0,
        top_k=config.top_k or 0,
        max_new_tokens=length,
        # None would stand for the model's own: without an EOS, an id that no token has.
        eos_token_id=sorted(eos) or [policy.config.get_text_config().vocab_size],
        pad_token_id=0,
    )
    generate = cast(Any, policy).generate
    drawn = generate(input_ids=ids, attention_mask=mask, generation_config=settings)[:, width:].tolist()
    ends = [next((place for place, token in enumerate(row, 1) if token in eos), length) for row in drawn]
    return [row[:end] for row, end in zip(drawn, ends, strict=True)]


def score_batch(reward: PreTrainedModel, rows: Sequence[list[int]]) -> list[float]:
    """The rewards of whole texts in one pass, each at its last token; what pads them lies behind it, unseen."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([list(row) + [0] * (width - len(row)) for row in rows], device=reward.device)
    hidden = getattr(reward, reward.base_model_prefix)(ids, use_cache=False).last_hidden_state  # [B, T, H]
    last = torch.tensor([len(row) - 1 for row in rows], device=reward.device)
    ends = hidden[torch.arange(len(rows), device=reward.device), last]
    rewards: list[float] = cast(nn.Linear, reward.score)(ends)[:, 0].float().tolist()
    return rewards

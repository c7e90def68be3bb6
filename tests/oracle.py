"""The law of the output by enumeration, the same algorithm as a plain sampler, and the test that compares counts to it.

Nothing here knows the engine: next-token probabilities come from plain forward passes, the rest is arithmetic on
dictionaries. A completion is a tuple of ids; the EOS that ended it is its last id.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import chi2

Completion = tuple[int, ...]
Segment = tuple[Completion, int, bool]  # tokens, attempts, accepted
Law = Mapping[Hashable, float]


@dataclass(frozen=True)
class Rule:
    """What decides the law besides the two models."""

    segment_length: int
    max_attempts: int
    max_new_tokens: int
    target_reward: float
    alpha: float
    beta: float
    eos: int
    finished_threshold: str = "target"

    def stars_config(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "eos"} | {"eos_token_id": self.eos}

    def threshold(self, completion: Completion, reward: Callable[[Completion], float]) -> float:
        if math.isinf(self.target_reward):
            return self.target_reward  # plain sampling, or the best of max_attempts
        base = (1 - self.alpha) * reward(()) + self.alpha * self.target_reward
        if completion[-1] == self.eos and self.finished_threshold == "target":
            return self.target_reward
        ramp = base + (self.target_reward - base) * len(completion) / self.max_new_tokens
        return min(ramp, self.target_reward)

    def acceptance(self, completion: Completion, reward: Callable[[Completion], float]) -> float:
        return math.exp(min(0.0, (reward(completion) - self.threshold(completion, reward)) / self.beta))

    def finished(self, completion: Completion) -> bool:
        return len(completion) == self.max_new_tokens or completion[-1:] == (self.eos,)


def prefixes(vocab: int, eos: int, length: int) -> list[Completion]:
    return list(itertools.product([token for token in range(vocab) if token != eos], repeat=length))


def completions(vocab: int, eos: int, max_new_tokens: int) -> list[Completion]:
    """Every text that a run can pass through: unfinished ones of each length, and those that EOS ended."""
    open_ones = [y for length in range(max_new_tokens + 1) for y in prefixes(vocab, eos, length)]
    return open_ones + [(*y, eos) for y in open_ones if len(y) < max_new_tokens]


@torch.no_grad()
def next_token_probabilities(
    policy, prompt: list[int], rule: Rule, temperature: float = 1.0, top_k: int | None = None
) -> dict[Completion, np.ndarray]:
    """Unfinished completion -> probabilities of the next token after temperature and top-k, float64 ``[vocab]``."""
    table = {}
    for length in range(rule.max_new_tokens):
        batch = prefixes(policy.config.vocab_size, rule.eos, length)
        logits = policy(torch.tensor([[*prompt, *y] for y in batch]), use_cache=False).logits[:, -1].double()
        logits /= temperature
        if top_k is not None and top_k < logits.shape[-1]:
            kth = logits.topk(top_k).values[:, -1:]
            logits[logits < kth] = -math.inf
        table.update(zip(batch, logits.softmax(-1).numpy(), strict=True))
    return table


@torch.no_grad()
def classifier_rewards(reward_model, prompt: list[int], texts: list[Completion]) -> dict[Completion, float]:
    """Completion -> reward of prompt + completion, pooled at the last token, by full forward passes."""
    table = {}
    for _, group in itertools.groupby(sorted(texts, key=len), key=len):
        batch = list(group)
        hidden = reward_model.model(torch.tensor([[*prompt, *y] for y in batch]), use_cache=False).last_hidden_state
        table.update(zip(batch, reward_model.score(hidden[:, -1])[:, 0].tolist(), strict=True))
    return table


@dataclass(frozen=True)
class Oracle:
    """The exact law for one prompt: ``probabilities`` as above, ``reward`` of a completion, and the rule."""

    probabilities: Mapping[Completion, np.ndarray]
    reward: Callable[[Completion], float]
    rule: Rule

    def candidates(self, y: Completion) -> dict[Completion, float]:
        """Segment -> policy probability, for all segments that can follow ``y``."""
        limit = min(self.rule.segment_length, self.rule.max_new_tokens - len(y))
        growing, done = {(): 1.0}, {}
        for _ in range(limit):
            longer = {}
            for s, p in growing.items():
                for token, conditional in enumerate(self.probabilities[y + s]):
                    (done if token == self.rule.eos else longer)[(*s, token)] = p * float(conditional)
            growing = longer
        return {s: p for s, p in (done | growing).items() if p > 0}

    def committed(self, y: Completion) -> Iterator[tuple[float, Segment]]:
        """``(probability, segment)`` of what is committed after ``y``: accepted at each attempt, or the fallback."""
        pi, attempts = self.candidates(y), self.rule.max_attempts
        accept = {s: self.rule.acceptance(y + s, self.reward) for s in pi}
        a = sum(pi[s] * accept[s] for s in pi)
        for s in pi:
            for k in range(1, attempts + 1):
                yield (1 - a) ** (k - 1) * pi[s] * accept[s], (s, k, True)
        # The best of m independent rejected ones lies in the highest group of equal rewards that occurs at all.
        groups = defaultdict(dict)
        for s in pi:
            groups[self.reward(y + s)][s] = pi[s] * (1 - accept[s])
        below = 0.0
        for score in sorted(groups):
            mass = sum(groups[score].values())
            for s, rejected in groups[score].items():
                if rejected > 0:
                    yield ((below + mass) ** attempts - below**attempts) * rejected / mass, (s, attempts, False)
            below += mass

    def paths(self, y: Completion = (), history: tuple[Segment, ...] = ()) -> Iterator[tuple[float, tuple]]:
        """``(probability, segments)`` of every whole run."""
        if y and self.rule.finished(y):
            yield 1.0, history
            return
        for p, segment in self.committed(y):
            if p > 0:
                for rest, whole in self.paths(y + segment[0], (*history, segment)):
                    yield p * rest, whole

    def law(self, view: Callable[[tuple[Segment, ...]], Hashable]) -> dict[Hashable, float]:
        """The law of any function of the run, say of ``text`` or ``attempts`` below."""
        law = defaultdict(float)
        for p, segments in self.paths():
            law[view(segments)] += p
        return dict(law)

    def sample(self, rng: np.random.Generator) -> tuple[Segment, ...]:
        """One run of the one-at-a-time algorithm, as METHODS describe it and nothing cleverer."""
        rule, y, segments = self.rule, (), []
        while not (y and rule.finished(y)):
            best, attempt, accepted = None, 0, False
            while not accepted and attempt < rule.max_attempts:
                attempt, s = attempt + 1, ()
                while len(s) < rule.segment_length and not (y + s and rule.finished(y + s)):
                    s += (int(np.searchsorted(np.cumsum(self.probabilities[y + s]), rng.random(), side="right")),)
                score = self.reward(y + s)
                accepted = rng.random() < rule.acceptance(y + s, self.reward)
                if accepted or best is None or score > best[0]:
                    best = (score, s)
            y += best[1]
            segments.append((best[1], attempt, accepted))
        return tuple(segments)


def text(segments: tuple[Segment, ...]) -> Completion:
    return tuple(itertools.chain.from_iterable(tokens for tokens, _, _ in segments))


def attempts(segments: tuple[Segment, ...]) -> tuple:
    return tuple((count, accepted) for _, count, accepted in segments)


def chi_square(counts: Mapping[Hashable, int], law: Law, smallest: float = 10.0) -> tuple[float, int]:
    """Statistic and degrees of freedom; cells expected less often than ``smallest`` are pooled."""
    assert abs(sum(law.values()) - 1) < 1e-9, f"the law sums to {sum(law.values())}"
    total = sum(counts.values())
    if any(law.get(cell, 0.0) <= 0.0 for cell in counts):
        return math.inf, 1  # something happened that cannot happen
    cells = sorted(((total * p, counts.get(cell, 0)) for cell, p in law.items()), reverse=True)
    kept = [cell for cell in cells if cell[0] >= smallest]
    rest = [cell for cell in cells if cell[0] < smallest]
    if rest:
        pooled = (sum(e for e, _ in rest), sum(o for _, o in rest))
        if pooled[0] < smallest and kept:
            last = kept.pop()
            pooled = (pooled[0] + last[0], pooled[1] + last[1])
        kept.append(pooled)
    return sum((o - e) ** 2 / e for e, o in kept), len(kept) - 1


def p_value(samples: Mapping[Hashable, list], laws: Mapping[Hashable, Law]) -> float:
    """P-value that every group of samples (one per prompt, say) follows its law."""
    parts = [chi_square(Counter(samples[group]), laws[group]) for group in laws]
    return float(chi2.sf(sum(statistic for statistic, _ in parts), sum(freedom for _, freedom in parts)))

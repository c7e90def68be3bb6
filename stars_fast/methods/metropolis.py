"""Samplers of the whole text's law: chains that draw the end of an answer anew, and keep the new one or the old."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from stars_fast.methods.base import Method, Settings, SettingsT
from stars_fast.methods.numbers import MOST_ANSWERS


class Ending(NamedTuple):
    """A finished answer, and its part behind a cut."""

    reward: float  # of the answer; NaN where none was asked for
    segments: int  # of the answer
    logprob: float  # of the part behind the cut, by the raw policy, nats
    sampling_logprob: float  # of that part, by what it is drawn from


@dataclass(frozen=True)
class SuffixChain(Method):
    """A Metropolis-Hastings chain over finished answers y of n(y) segments of ``segment_length`` tokens.

    A step cuts the answer at the start of a segment, c ~ U{0 .. n(y) - 1}, draws all behind the cut anew, as the call
    samples, and keeps the new answer with the probability ``min(1, exp(log_ratio))``, else the old one. The first state
    is drawn likewise, and the last is the answer. For each cut alone the step leaves the law as it is, since a cut that
    y has is one that y' has, too: hence n(y) / n(y') in the ratio, and nothing about what lies before the cut.
    """

    loop: ClassVar[str] = "chains"
    scores_unfinished: ClassVar[bool] = False
    has_target: ClassVar[bool] = False

    @property
    def steps(self) -> int:
        """Answers proposed after the first."""
        raise NotImplementedError

    @property
    def chains(self) -> int:
        """Independent chains of a request; its answer is the last state of one of them, each as likely."""
        return 1

    def log_ratio(self, new: Ending, old: Ending, beta: float) -> float:
        """Log of the acceptance probability of ``new`` in the place of ``old``, where that is below 1.

        ``beta`` is StarsConfig's.
        """
        raise NotImplementedError

    def rule(self, config: SettingsT) -> SettingsT:
        return config.replace(target_reward=-math.inf, base_reward=None)

    def rows(self, config: Settings) -> int:
        most = self.steps if config.candidates == "auto" else min(self.steps, int(config.candidates))
        return self.chains * most

    def slots(self, config: Settings) -> int:
        """A state and what is proposed in its place: at least one chain goes on at a time."""
        return 2 * config.max_new_tokens


@dataclass(frozen=True)
class MetropolisHastings(SuffixChain):
    """Suffix Metropolis-Hastings: draws from ``pi(y) exp(r(y) / beta)`` over whole answers (QAlign, arXiv 2504.03790).

    ``steps`` times the end of the answer is drawn anew (:class:`SuffixChain`), and accepted with probability
    ``min(1, exp((r(y') - r(y)) / beta) n(y) / n(y'))``. pi is the policy as the call samples it, temperature and
    filters included. Only finished answers are scored, so any reward serves. The answer's law is pi at first and tends
    to the tilted one as ``steps`` grow; a step draws (n + 1) / (2 n) of an answer on average.

    ``beta`` is StarsConfig's, in the reward's own units. An answer whose reward is -inf has no place in the law: it is
    never accepted, and a chain that begins with one leaves it for whatever comes next.

    ``chains`` independent chains, at most 65,536, run side by side, and the answer is the last state of one of them,
    each as likely: the law is that of one chain, however many there are, and ``trace=True`` shows what all of them
    proposed. For several answers to a prompt ask for ``num_return_sequences``, each of which has chains of its own.
    """

    name: ClassVar[str] = "metropolis_hastings"
    steps: int = 8
    chains: int = 1

    def __post_init__(self) -> None:
        self._check_integer("steps")
        self._check_integer("chains", MOST_ANSWERS)

    def log_ratio(self, new: Ending, old: Ending, beta: float) -> float:
        if old.reward == -math.inf:
            return 0.0
        return (new.reward - old.reward) / beta + math.log(old.segments / new.segments)


@dataclass(frozen=True)
class PowerSampling(SuffixChain):
    """Draws from ``p(y)^alpha`` over whole answers, p being the raw policy (power sampling, arXiv 2510.14901).

    The chain of :class:`SuffixChain` with
    ``log_ratio = alpha (L(y') - L(y)) + Q(y) - Q(y') + log(n(y) / n(y'))``, of the parts behind the cut: L their
    log-probability under the raw policy, Q under what they are drawn from. The paper resamples blocks of a growing
    answer; here every step cuts a whole one. No reward takes part: finished answers are scored for the output's sake.

    They are drawn at the temperature 1 / ``alpha`` where StarsConfig leaves it open, which comes nearest to the law;
    any other changes how often answers are accepted, and not the law. top_k, top_p, min_p and logits processors do
    change it: what they forbid has no place there, and the rest keeps its proportions. ``alpha`` lies in [1e-6, 1e6]; 1
    is plain sampling.
    """

    name: ClassVar[str] = "power_sampling"
    alpha: float = 4.0
    steps: int = 8

    def __post_init__(self) -> None:
        self._check_real("alpha", 1e-6, 1e6)
        self._check_integer("steps")

    def rule(self, config: SettingsT) -> SettingsT:
        return (
            super()
            .rule(config)
            .replace(temperature=1 / self.alpha if config.temperature is None else config.temperature)
        )

    def log_ratio(self, new: Ending, old: Ending, beta: float) -> float:
        gained = self.alpha * (new.logprob - old.logprob)
        return gained + old.sampling_logprob - new.sampling_logprob + math.log(old.segments / new.segments)

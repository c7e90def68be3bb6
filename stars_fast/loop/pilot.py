"""Choosing r_star and beta from a few unguided responses to a prompt.

A Bradley-Terry reward is defined up to a constant per prompt, so r_star is per prompt; beta means nothing without the
reward's scale, so it is chosen in units of the pilot's spread; and a target beyond what the policy reaches buys
nothing, so r_star is capped at a high quantile of the pilot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, pstdev

from stars_fast.config import StarsConfig
from stars_fast.loop.request import Request
from stars_fast.methods.base import ACCEPTANCE as ACCEPTANCE
from stars_fast.methods.stars import acceptance_probability, base_reward, target_for, threshold
from stars_fast.outputs import as_cause
from stars_fast.text.media import identity

PILOT_SAMPLES = 8
_CAP_QUANTILE = 0.9
FARTHEST = 40.0  # a target is looked for so many betas beyond the rewards that were seen


@dataclass
class Pilot:
    """Unguided responses to one prompt, and what was chosen from them."""

    responses: list[list[tuple[int, float]]] = field(default_factory=list)  # per response: (tokens, reward) per segment
    base_reward: float | None = None  # the caller's
    target: float = float("nan")
    empty: float = float("nan")  # stands in for r(x)
    base: float = float("nan")
    beta: float = float("nan")
    error: str | None = None
    prompt: Sequence[int] = ()  # its identity

    @property
    def finals(self) -> list[float]:
        """Finite rewards of the finished responses."""
        return [run[-1][1] for run in self.responses if math.isfinite(run[-1][1])]

    @property
    def varies(self) -> bool:
        """Whether its rewards are not all the same."""
        return len({reward for run in self.responses for _, reward in run}) > 1


def pilot_config(config: StarsConfig, samples: int = PILOT_SAMPLES) -> StarsConfig:
    """The same sampling, unguided: every first candidate is accepted."""
    return config.selecting(config.chosen_method.pilot()).replace(
        target_reward=-math.inf,
        base_reward=None,
        max_attempts=1,
        candidates=1,
        num_return_sequences=samples,
    )


def solve(pilot: Pilot, config: StarsConfig, acceptance: float, beta: float | None = None) -> Pilot:
    """Set beta, r_star and r0 so that the expected acceptance is ``acceptance``, or r_star is at its cap."""
    if pilot.error is not None:
        return pilot
    first = [run[0][1] for run in pilot.responses if math.isfinite(run[0][1])]
    if pilot.base_reward is not None:
        pilot.empty = pilot.base_reward
    else:
        pilot.empty = fmean(first) if first else fmean(pilot.finals)
    pilot.beta = config.beta * spread(pilot) if beta is None else beta
    rewards = [reward for run in pilot.responses for _, reward in run if math.isfinite(reward)]
    high = quantile(pilot.finals, _CAP_QUANTILE)
    if acceptance_at(high, pilot, config) < acceptance:
        aim(pilot, config, acceptance, min(rewards) - FARTHEST * pilot.beta, high)
    return pilot


def aim(pilot: Pilot, config: StarsConfig, acceptance: float, low: float, high: float) -> None:
    """Put the r_star between ``low`` and ``high`` whose expected acceptance is ``acceptance``."""
    set_target(pilot, config, target_for(acceptance, low, high, lambda target: acceptance_at(target, pilot, config)))


def acceptance_at(target: float, pilot: Pilot, config: StarsConfig) -> float:
    """:func:`expected_acceptance` with this r_star, which is put."""
    set_target(pilot, config, target)
    return expected_acceptance(pilot, config)


def set_target(pilot: Pilot, config: StarsConfig, target: float) -> None:
    """Put r_star, and the r0 that goes with it."""
    pilot.target = target
    pilot.base = base_reward(pilot.empty, target, config.alpha)


def spread(pilot: Pilot) -> float:
    """Standard deviation of the final rewards; of all rewards, or 1, where that is zero."""
    every = [reward for run in pilot.responses for _, reward in run if math.isfinite(reward)]
    return pstdev(pilot.finals) or pstdev(every) or 1.0


def expected_acceptance(pilot: Pilot, config: StarsConfig) -> float:
    """Mean acceptance probability over the segments of the pilot."""
    return fmean(probability for run in acceptance_by_segment(pilot, config) for probability in run)


def acceptance_by_segment(pilot: Pilot, config: StarsConfig) -> list[list[float]]:
    """Per response, the acceptance probability of each segment."""
    rows = []
    for run in pilot.responses:
        taus = [threshold(tokens, config.max_new_tokens, pilot.base, pilot.target) for tokens, _ in run]
        if run[-1][0] < config.max_new_tokens and config.finished_threshold == "target":
            taus[-1] = pilot.target
        rows.append([acceptance_probability(r, tau, pilot.beta) for (_, r), tau in zip(run, taus, strict=True)])
    return rows


def quantile(values: Sequence[float], share: float) -> float:
    """The ``share`` quantile with linear interpolation."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float:
    """Spearman's rho; NaN where one side is constant."""
    first, second = _ranks([a for a, _ in pairs]), _ranks([b for _, b in pairs])
    mean = (len(pairs) - 1) / 2
    covariance = sum((a - mean) * (b - mean) for a, b in zip(first, second, strict=True))
    scale = math.sqrt(sum((a - mean) ** 2 for a in first) * sum((b - mean) ** 2 for b in second))
    return covariance / scale if scale else math.nan


def correlations_with_the_last(runs: Sequence[Sequence[float]]) -> list[float]:
    """Spearman's rho between partial and final reward, by segment, the last left out; none where too few say it."""
    rhos = []
    for segment in range(max(map(len, runs)) - 1):
        pairs = [(run[segment], run[-1]) for run in runs if len(run) > segment + 1]
        if len(pairs) > 2 and not math.isnan(rho := rank_correlation(pairs)):
            rhos.append(rho)
    return rhos


def _ranks(values: Sequence[float]) -> list[float]:
    return [sum(w < v for w in values) + (sum(w == v for w in values) - 1) / 2 for v in values]


def tilted_mean(pilot: Pilot) -> float:
    """Mean final reward, answers weighted by ``exp(min(r, r_star) / beta)``: what guidance by segments comes near."""
    top = max(min(reward, pilot.target) for reward in pilot.finals)
    weights = [math.exp((min(reward, pilot.target) - top) / pilot.beta) for reward in pilot.finals]
    return sum(w * r for w, r in zip(weights, pilot.finals, strict=True)) / sum(weights)


def read_pilot(requests: Sequence[Request], config: StarsConfig) -> Pilot:
    """Collect the partial rewards of one prompt's pilot responses; ``config`` is the caller's."""
    error = next((request.error for request in requests if request.error is not None), None)
    if error is not None:
        return Pilot(error=as_cause(error).after("calibration: "))
    responses = []
    for request in requests:
        tokens, run = 0, []
        for segment in request.segments:
            tokens += len(segment.tokens)
            if not math.isnan(segment.reward):  # unfinished, under a method that scores finished answers only
                run.append((tokens, segment.reward))
        responses.append(run)
    prompt = identity(requests[0].prompt)
    pilot = Pilot(responses, of_prompt(config.base_reward, requests[0].prompt_index), prompt=prompt)
    if not pilot.finals:
        pilot.error = "calibration: every pilot response has a reward of -inf"
    return pilot


def of_prompt(value: float | Sequence[float] | None, prompt: int) -> float | None:
    """A prompt's own, of a setting that is one for all or one per prompt."""
    return value[prompt] if isinstance(value, Sequence) else value

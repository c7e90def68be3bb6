"""A fit for a pair of models: learned once, saved, used for any prompt."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, pstdev
from typing import Any, ClassVar

import numpy as np

from stars_fast.calibration.targets import INPUTS
from stars_fast.config import StarsConfig
from stars_fast.engine import StarsEngine
from stars_fast.inputs.arguments import Arguments
from stars_fast.inputs.fits import made_for
from stars_fast.loop.pilot import correlations_with_the_last
from stars_fast.methods.base import Method, Scored, Segments, SettingsT
from stars_fast.methods.fit import Fit, Group, learn
from stars_fast.methods.numbers import integer, shown
from stars_fast.ops.philox import philox_key
from stars_fast.outputs import SegmentTrace, StarsOutput

# Each is a trace that is kept until all are drawn.
_MOST_SAMPLES = 1024
# Histories are of answers whose segments are the best of so many: unguided, guided and greedy.
_AMONG = (1, 3, None)
_LEAST_PROMPTS = 8


@dataclass(frozen=True)
class _History(Method):
    """All candidates of a segment are scored, and the best of the first ``among`` is committed."""

    name: ClassVar[str] = "history"
    has_target: ClassVar[bool] = False
    method: Method
    samples: int
    among: int

    def rule(self, config: SettingsT) -> SettingsT:
        ruled = self.method.rule(config)
        return ruled.replace(target_reward=math.inf, base_reward=None, max_attempts=self.samples)

    def segments(self) -> Segments:
        return self.method.segments()

    def values(self, candidates: Sequence[Scored]) -> list[float]:
        return [one.reward if one.attempt < self.among else -math.inf for one in candidates]


def fit(
    engine: StarsEngine,
    prompts: Any,
    config: StarsConfig | None = None,
    *,
    samples: int = 16,
    seed: int = 0,
    progress: bool = False,
    **overrides: Any,
) -> Fit:
    """Learn once, for a policy and a reward, what rewards a segment's candidates have, given the reward before them.

    Three answers to each prompt are drawn with ``samples`` candidates for each segment: of the first answer, the first
    candidate goes on, of the second the best of three, of the third the best of all, so that prefixes of every level
    are seen that guidance comes to.

    Parameters
    ----------
    engine : StarsEngine
    prompts : as in :meth:`StarsEngine.generate`
        At least 8, like those to come.
    config : StarsConfig, optional
        Segment length, greatest length and sampling, for which alone the fit holds; "cards" for CARDS' segments.
    samples : int
        Candidates of a segment, at least 4.
    seed : int
    progress : bool
        Show a bar for each answer.
    **overrides
        ``attention_mask``, ``reward_prompts``, ``columns``, ``chat_template_kwargs``, or fields of StarsConfig.

    Raises
    ------
    ValueError, TypeError
        For too few prompts or samples, a reward that does not vary, a reward that cannot score partial text.
    RuntimeError
        If an answer fails, with the cause.
    """
    if not isinstance(engine, StarsEngine):
        raise TypeError(f"engine={shown(engine)}: give a StarsEngine")
    samples, seed = integer("samples", samples, 4, _MOST_SAMPLES), integer("seed", seed)
    inputs = {name: overrides.pop(name) for name in INPUTS if name in overrides}
    if taken := {"fit", "num_return_sequences"} & overrides.keys():
        raise TypeError(f"fit: {min(taken)} is not an argument of it")
    given = (config or StarsConfig()).replace(fit=None, num_return_sequences=1, **overrides)
    if not given.chosen_method.uses_fit:
        raise ValueError(
            f"fit: method={given.chosen_method.name!r} has no use for one: leave it out, or give 'cards' for "
            "its segments"
        )
    if not engine.reward.partial:
        raise ValueError(f"fit: {engine.reward.described} scores finished answers only (partial=False): use best_of_n")

    def run(place: int, among: int) -> StarsOutput:
        settings = given.selecting(_History(given.chosen_method, samples, among))
        arguments = Arguments(
            prompts, settings, seed=philox_key(seed, place, 0), on_error="raise", trace=True, **inputs
        )
        name = "unguided" if among == 1 else f"best of {among}"
        return engine.run(arguments, progress=progress, name=f"fit {place + 1}/{len(_AMONG)}: {name}")

    call = engine.prepare(Arguments(prompts, given.selecting(_History(given.chosen_method, samples, 1)), **inputs))
    if len(call.prompts) < _LEAST_PROMPTS:
        raise ValueError(f"fit: {len(call.prompts)} prompts say too little: give at least {_LEAST_PROMPTS}")
    outputs = [run(i, among or samples) for i, among in enumerate(_AMONG)]
    runs = [[segment.reward for segment in segments] for segments in outputs[0].segments]
    rhos = correlations_with_the_last(runs)
    groups = [
        group
        for output, among in zip(outputs, _AMONG, strict=True)
        for segments in output.segments
        for group in _groups(segments, among or samples)
    ]
    finals = [[row[-1].reward for row in output.segments if math.isfinite(row[-1].reward)] for output in outputs]
    if not groups or not all(finals):
        raise ValueError(
            "fit: hardly any reward is finite, so that nothing is learned of them: the scorer rejects too much"
        )
    figures = {
        "prompts": len(runs),
        "samples": samples,
        "policy_tokens": sum(output.stats["policy_tokens"] for output in outputs),
        "unguided_reward": fmean(finals[0]),
        "rank_correlation": fmean(rhos) if rhos else math.nan,
        "log_z": _log_z(groups, given.beta * (pstdev(finals[0]) or 1.0)),
    }
    known = learn(
        groups,
        made_for(call.config, call.terms.sampling, engine.policy, engine.reward),
        {name: figure for name, figure in figures.items() if not math.isnan(figure)},
    )
    outlook = [(float(among or samples), fmean(of)) for among, of in zip(_AMONG, finals, strict=True)]
    return replace(known, outlook=tuple(outlook))


def _groups(segments: Sequence[SegmentTrace], among: int) -> Iterator[Group]:
    """The candidates of each segment of an answer; of those that a scorer rejects for good nothing is learned."""
    before, final = 0.0, segments[-1].reward
    for index, segment in enumerate(segments):
        rewards = [candidate.reward for candidate in segment.candidates or ()]
        if all(map(math.isfinite, [before, *rewards])):
            kept = segment.reward if index < len(segments) - 1 else math.nan
            yield Group(index, before, rewards, kept, among, final)
        before = segment.reward


def _log_z(groups: Sequence[Group], beta: float) -> float:
    """Mean of ``|log Z - its mean|`` over prefixes, ``log Z = log E exp((r - before) / beta)`` over their candidates.

    0 where the reward is a value function: then the law that STARS has for a segment is that of whole texts; what is
    the same for all prefixes of a length cancels. Covariances of halves of the candidates are free of sampling noise;
    log Z is taken for normal. The first segment is left out: nothing is before it.
    """
    spreads = []
    for segment in range(1, max(group.segment for group in groups) + 1):
        here = [group for group in groups if group.segment == segment]
        if len(here) > 2:
            gains = (np.array([g.rewards for g in here]) - np.array([[g.before] for g in here])) / beta  # [n, m]
            halves = np.cov(_log_mean_exp(gains[:, ::2]), _log_mean_exp(gains[:, 1::2]))
            spreads.append(math.sqrt(max(float(halves[0, 1]), 0.0)))
    return fmean(spreads) * math.sqrt(2 / math.pi) if spreads else math.nan


def _log_mean_exp(x: np.ndarray) -> np.ndarray:
    """Over columns, by the jackknife: the plain one is too low by about the square of the variation over 2 m."""
    m, top = x.shape[1], x.max(1, keepdims=True)
    weights = np.exp(x - top)
    total = weights.sum(1, keepdims=True)
    left_out = np.log(np.maximum(total - weights, 1e-300) / (m - 1)) + top
    return np.asarray(m * (np.log(total / m) + top)[:, 0] - (m - 1) * left_out.mean(1))

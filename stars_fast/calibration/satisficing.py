"""Satisficing: weights under which rewards reach thresholds on average, found for a set of prompts and then fixed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, NamedTuple

from stars_fast.calibration.targets import INPUTS
from stars_fast.config import StarsConfig
from stars_fast.engine import StarsEngine
from stars_fast.inputs.arguments import Arguments
from stars_fast.methods.numbers import integer, real, shown
from stars_fast.ops.philox import philox_key
from stars_fast.outputs import StarsOutput
from stars_fast.rewards import WeightedSum


class Round(NamedTuple):
    """One step of the ascent."""

    multipliers: dict[str, float]  # weights of the rewards that have a threshold, under which its answers were drawn
    means: dict[str, float]  # of each part, over these answers


@dataclass(frozen=True)
class Satisficing:
    """What :func:`satisfice` found.

    Attributes
    ----------
    weights : dict of str to float
        Of all parts: ``engine.reward.weights = found.weights``.
    thresholds : dict of str to float
    rounds : tuple of Round
    means, errors : dict of str to float
        Of each part over answers that were drawn with ``weights`` and not used to find them: mean and its standard
        error.
    policy_tokens : int
        Drawn for it.
    """

    weights: dict[str, float]
    thresholds: dict[str, float]
    rounds: tuple[Round, ...]
    means: dict[str, float]
    errors: dict[str, float]
    policy_tokens: int

    def report(self) -> Report:
        """Weight, mean and standard error of each part, thresholds, and which are missed by two standard errors.

        Keys: ``weights``, ``thresholds``, ``means``, ``errors``, ``policy_tokens``, ``warnings``.
        """
        missed = [
            f"{name} is {self.means[name]:.3f}, below {threshold:g}: this policy may not reach it with this method; "
            "guide harder (a smaller beta, more attempts), allow more rounds, or lower the threshold"
            for name, threshold in self.thresholds.items()
            if self.means[name] + 2 * self.errors[name] < threshold
        ]
        return Report(
            weights=self.weights,
            thresholds=self.thresholds,
            means=self.means,
            errors=self.errors,
            policy_tokens=self.policy_tokens,
            warnings=missed,
        )


class Report(dict[str, Any]):
    """Figures of a :class:`Satisficing`; a mapping that prints as text."""

    def __str__(self) -> str:
        lines = [f"{'reward':<24} {'weight':>8} {'mean':>8} {'+-':>6} {'threshold':>9}"]
        for name, weight in self["weights"].items():
            threshold = f"{self['thresholds'][name]:9.3f}" if name in self["thresholds"] else ""
            lines.append(f"{name:<24} {weight:8.3f} {self['means'][name]:8.3f} {self['errors'][name]:6.3f} {threshold}")
        return "\n".join([line.rstrip() for line in lines] + [f"warning: {warning}" for warning in self["warnings"]])


def satisfice(
    engine: StarsEngine,
    prompts: Any,
    thresholds: Mapping[str, float],
    config: StarsConfig | None = None,
    *,
    eta: float = 1.0,
    rounds: int = 12,
    seed: int = 0,
    progress: bool = False,
    **overrides: Any,
) -> Satisficing:
    """Find the weights under which some parts of a :class:`WeightedSum` reach thresholds on average, the others being
    sought as far as that allows (SITAlign, arXiv 2505.23729).

    Dual ascent: a round draws answers with ``r_1 + sum_i lambda_i r_i``, lambda being fixed, and then sets
    ``lambda_i <- max(0, lambda_i + eta_i (t_i - mean r_i))``, with ``eta_i = eta * sd(r_1) / sd(r_i)^2`` over the first
    round's answers, so that ``eta`` has no unit. What is found is the mean of lambda over the last half of the rounds;
    answers are drawn once more to see what it does. Thresholds hold for means over such prompts, not for each answer.
    Weights that are found are constants: a text has the law that the method has for any reward. Where rewards are each
    other's opposite, hardly any weights lie between all of one and all of the other.

    Parameters
    ----------
    engine : StarsEngine
        Its reward is a WeightedSum of named parts; it has other weights meanwhile and its own again afterwards.
    prompts : as in :meth:`StarsEngine.generate`
        Like those to come.
    thresholds : mapping of str to float
        Least mean of each of these parts. Their weights, at least 0, are where lambda begins; all other parts, with the
        weights they have, are r_1.
    config : StarsConfig, optional
        ``target_reward=None`` (or a method without target) is best: any other is in units of a sum that changes.
    eta : float
        Size of a step, above 0.
    rounds : int
        At least 2.
    seed : int
    progress : bool
        Show a bar for each round.
    **overrides
        ``attention_mask``, ``reward_prompts``, ``columns``, ``chat_template_kwargs``, or fields of StarsConfig.

    Raises
    ------
    ValueError, TypeError
        For a reward that is no WeightedSum, unknown names, thresholds that are not finite, a part that does not vary.
    RuntimeError
        If an answer fails, or a part has no finite value for one.
    """
    reward = engine.reward
    if not isinstance(reward, WeightedSum):
        raise TypeError(f"satisfice: the engine's reward is a {type(reward).__name__}: give it a WeightedSum")
    eta, rounds = real("eta", eta, 0.0, open_below=True, open_above=True), integer("rounds", rounds, 2)
    seed, before = integer("seed", seed), reward.weights
    wanted = _checked(thresholds, before)
    inputs = {name: overrides.pop(name) for name in INPUTS if name in overrides}
    given, tokens = (config or StarsConfig()).replace(**overrides), 0

    def draw(place: int, weights: Mapping[str, float]) -> dict[str, list[float]]:
        nonlocal tokens
        reward.weights = weights
        key = philox_key(seed, place, 0)
        arguments = Arguments(prompts, given, seed=key, on_error="raise", **inputs)
        output = engine.run(arguments, progress=progress, name=f"round {place + 1}/{rounds + 1}")
        tokens += output.stats["policy_tokens"]
        return _values(output)

    try:
        reward.weights = {name: before[name] or 1.0 for name in wanted}
        engine.prepare(Arguments(prompts, given, **inputs))  # a part may be unable to guide once it has a weight
        path, history, steps = [{name: before[name] for name in wanted}], list[Round](), dict[str, float]()
        for place in range(rounds):
            values = draw(place, path[-1])
            steps = steps or _steps(values, wanted, before, eta)
            history.append(Round(path[-1], {name: fmean(each) for name, each in values.items()}))
            path.append(ascend(path[-1], wanted, history[-1].means, steps))
        found = {**before, **{name: fmean(one[name] for one in path[-(rounds // 2) :]) for name in wanted}}
        values = draw(rounds, found)
    finally:
        reward.weights = before
    means = {name: fmean(each) for name, each in values.items()}
    errors = {name: stdev(each) / math.sqrt(len(each)) for name, each in values.items()}
    return Satisficing(found, wanted, tuple(history), means, errors, tokens)


def ascend(
    multipliers: Mapping[str, float],
    thresholds: Mapping[str, float],
    means: Mapping[str, float],
    steps: Mapping[str, float],
) -> dict[str, float]:
    """``lambda_i <- max(0, lambda_i + eta_i (t_i - mean r_i))``: a projected step up the dual function."""
    return {
        name: max(0.0, value + steps[name] * (thresholds[name] - means[name])) for name, value in multipliers.items()
    }


def _checked(thresholds: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, float]:
    if not isinstance(thresholds, Mapping) or not thresholds:
        raise TypeError(
            f'thresholds={shown(thresholds)}: give a mapping of parts to numbers, as in {{"harmless": 0.5}}'
        )
    wanted = {}
    for name, threshold in thresholds.items():
        if name not in weights:
            raise ValueError(f"thresholds: the reward has no part {shown(name)}; it has {', '.join(weights)}")
        if weights[name] < 0:
            raise ValueError(f"thresholds: {name!r} has the weight {weights[name]}: it must be at least 0")
        wanted[name] = real(f"thresholds[{name!r}]", threshold, open_below=True, open_above=True)
    if not any(weight for name, weight in weights.items() if name not in wanted):
        raise ValueError("thresholds: no part is left whose weight is not 0: nothing would be sought besides")
    return wanted


def _values(output: StarsOutput) -> dict[str, list[float]]:
    """Each part's value of every answer."""
    rows = [segments[-1].parts or {} for segments in output.segments]
    for row, parts in enumerate(rows):
        for name, value in parts.items():
            if not math.isfinite(value):
                raise RuntimeError(f"satisfice: {name!r} is {value} for answer {row}, of which there is no mean")
    return {name: [parts[name] for parts in rows] for name in rows[0]}


def _steps(
    values: Mapping[str, list[float]], wanted: Mapping[str, float], weights: Mapping[str, float], eta: float
) -> dict[str, float]:
    """``eta_i`` of each threshold, from the answers of one round."""
    sought = [name for name, weight in weights.items() if weight and name not in wanted]
    total = [sum(weights[name] * values[name][row] for name in sought) for row in range(len(values[sought[0]]))]
    scales = {"what is sought": total, **{name: values[name] for name in wanted}}
    for name, each in scales.items():
        if len(each) < 2 or not stdev(each) > 0:
            raise ValueError(f"satisfice: {name!r} is the same for all {len(each)} answers: there is nothing to weigh")
    return {name: eta * stdev(total) / stdev(values[name]) ** 2 for name in wanted}

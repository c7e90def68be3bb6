"""Calibration for a set of prompts: chosen once, reported, saved."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from stars_fast.config import StarsConfig
from stars_fast.engine import StarsEngine
from stars_fast.inputs.arguments import Arguments
from stars_fast.inputs.fits import made_for
from stars_fast.inputs.per_prompt import fingerprints
from stars_fast.loop.pilot import (
    ACCEPTANCE,
    PILOT_SAMPLES,
    Pilot,
    acceptance_by_segment,
    correlations_with_the_last,
    solve,
    spread,
    tilted_mean,
)
from stars_fast.methods.fit import Fit, Group, learn, unguidable
from stars_fast.methods.numbers import MOST_ANSWERS, integer, real, shown

INPUTS = ("attention_mask", "reward_prompts", "columns", "chat_template_kwargs")  # not fields of StarsConfig


class Report(dict[str, Any]):
    """Expected figures of a calibration; a mapping that prints as text."""

    def __str__(self) -> str:
        lines = [
            f"expected acceptance      {self['acceptance']:.2f}",
            "  by segment             " + " ".join(f"{a:.2f}" for a in self["acceptance_by_position"]),
            f"expected fallback share  {self['fallback_share']:.3f}",
            f"expected reward          {self['expected_reward']:.3f} (unguided {self['unguided_reward']:.3f})",
            f"partial/final rank corr. {self['rank_correlation']:.2f}",
        ]
        return "\n".join(lines + [f"warning: {warning}" for warning in self["warnings"]])


@dataclass(repr=False)
class Calibration:
    """What :func:`calibrate` found.

    Attributes
    ----------
    config : StarsConfig
        The caller's, with ``target_reward`` and ``base_reward`` per prompt and beta in the reward's units, for these
        prompts in any order, known by their ids. For others it has ``acceptance`` and a ``fit`` to the pilots:
        quantiles are tested there, where "stars" or "cards" was calibrated and the pilots' rewards vary. Which of the
        two a prompt goes by does not depend on those beside it.
    pilots : list of Pilot
    """

    config: StarsConfig
    pilots: list[Pilot]

    def __repr__(self) -> str:
        """The pilots' rewards are pages long."""
        method, acceptance = self.config.whole_method.name, self.config.acceptance
        return f"Calibration({len(self.pilots)} prompts, method={method!r}, acceptance={acceptance}: see .report())"

    def report(self) -> Report:
        """Expected acceptance (overall and per segment), fallback share, reward, and rank correlation.

        Keys: ``acceptance``, ``acceptance_by_position``, ``fallback_share``, ``expected_reward``,
        ``unguided_reward``, ``rank_correlation``, ``warnings``.
        """
        rows = [row for pilot in self.pilots for row in acceptance_by_segment(pilot, self._ruled)]
        by_position = [fmean(row[k] for row in rows if len(row) > k) for k in range(max(len(row) for row in rows))]
        correlation = self._rank_correlation()
        return Report(
            acceptance=fmean(probability for row in rows for probability in row),
            acceptance_by_position=by_position,
            fallback_share=fmean(self._fallback_shares()),
            expected_reward=fmean(tilted_mean(pilot) for pilot in self.pilots),
            unguided_reward=fmean(fmean(pilot.finals) for pilot in self.pilots),
            rank_correlation=correlation,
            warnings=unguidable(correlation),
        )

    @property
    def _ruled(self) -> StarsConfig:
        """The settings that the method makes of them."""
        return self.config.chosen_method.rule(self.config)

    def _fallback_shares(self) -> list[float]:
        """Per prompt and position, ``(1 - a) ** max_attempts``."""
        shares = []
        for pilot in self.pilots:
            rows = acceptance_by_segment(pilot, self._ruled)
            for k in range(max(len(row) for row in rows)):
                accept = fmean(row[k] for row in rows if len(row) > k)
                shares.append((1 - accept) ** self._ruled.max_attempts)
        return shares

    def _rank_correlation(self) -> float:
        """Mean over prompts and unfinished positions of Spearman's rho between partial and final reward."""
        runs = [[[reward for _, reward in run] for run in pilot.responses] for pilot in self.pilots]
        rhos = [rho for one in runs for rho in correlations_with_the_last(one)]
        return fmean(rhos) if rhos else math.nan

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write the configuration where :meth:`StarsConfig.from_pretrained` finds it."""
        self.config.save_pretrained(os.fspath(save_directory))


def calibrate(
    engine: StarsEngine,
    prompts: Any,
    acceptance: float = ACCEPTANCE,
    *,
    config: StarsConfig | None = None,
    samples: int = PILOT_SAMPLES,
    seed: int | Sequence[int] | None = None,
    **kwargs: Any,
) -> Calibration:
    """Choose targets and beta for these prompts from unguided pilot responses.

    Parameters
    ----------
    engine : StarsEngine
    prompts : as in :meth:`StarsEngine.generate`
    acceptance : float
        Expected share of candidates accepted, in (0, 1]; reached unless r_star is capped.
    config : StarsConfig, optional
        Everything else; its beta is read in units of the pilots' spread.
    samples : int
        Pilot responses per prompt, from 2 to 65,536.
    seed : as in :meth:`StarsEngine.generate`
    **kwargs
        ``attention_mask``, ``reward_prompts``, ``columns``, ``chat_template_kwargs``, or fields of StarsConfig.

    Raises
    ------
    ValueError, TypeError
        For an acceptance or sample count out of range.
    RuntimeError
        If a pilot fails, with the cause.
    """
    if not isinstance(engine, StarsEngine):
        raise TypeError(f"engine={shown(engine)}: give a StarsEngine")
    acceptance = real("acceptance", acceptance, 0.0, 1.0, open_below=True)
    samples = integer("samples", samples, 2, MOST_ANSWERS)
    inputs = {name: kwargs.pop(name) for name in INPUTS if name in kwargs}
    arguments = Arguments(prompts, config, overrides=kwargs, seed=seed, **inputs)
    ruled, pilots = engine.run_pilots(arguments, samples)
    for pilot in pilots:
        if pilot.error is not None:
            raise RuntimeError(pilot.error)
    beta = ruled.beta * median(spread(pilot) for pilot in pilots)
    for pilot in pilots:
        solve(pilot, ruled, acceptance, beta)
    chosen = (
        (config or StarsConfig())
        .replace(**kwargs)
        .replace(
            target_reward=tuple(pilot.target for pilot in pilots),
            base_reward=tuple(pilot.empty for pilot in pilots),
            beta=beta,
        )
    )
    if ruled.chosen_method.uses_fit and acceptance < 1.0 and (known := _fit(engine, arguments, pilots)) is not None:
        chosen = chosen.replace(fit=known, acceptance=acceptance)
    engine.per_prompt.made((pilot.target for pilot in pilots), (pilot.prompt for pilot in pilots))
    return Calibration(chosen, pilots)


def _fit(engine: StarsEngine, arguments: Arguments, pilots: Sequence[Pilot]) -> Fit | None:
    """To the pilots, each prefix with its one candidate; None where they say too little."""
    call, groups = engine.prepare(arguments), []
    for run in (run for pilot in pilots for run in pilot.responses):
        befores = [0.0, *(reward for _, reward in run)]
        for segment, (before, (_, reward)) in enumerate(zip(befores, run, strict=False)):
            if math.isfinite(before) and math.isfinite(reward):
                groups.append(Group(segment, before, (reward,)))
    record = {
        **made_for(call.config, call.terms.sampling, engine.policy, engine.reward),
        "prompts": fingerprints(pilot.prompt for pilot in pilots),
        "targets": [pilot.target for pilot in pilots],
    }
    try:
        return learn(groups, record, {})
    except ValueError:
        return None

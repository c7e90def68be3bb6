"""What cells need to know before they run, learned once: one target for all prompts, or a fit."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from stars_fast.calibration import fit
from stars_fast.config import StarsConfig
from stars_fast.engine import StarsEngine
from stars_fast.evaluation.cells import FIT, Cell
from stars_fast.inputs.arguments import Arguments
from stars_fast.loop.pilot import FARTHEST, Pilot, aim, expected_acceptance, solve, spread
from stars_fast.methods.base import Segments
from stars_fast.methods.fit import FIT_NAME, Fit
from stars_fast.ops.philox import philox_key
from stars_fast.report.files import replace_file

PILOTS_EACH = 8  # responses to each prompt that a target is taken from
_CALIBRATION = 1 << 32  # index of the first such prompt: its random numbers are nobody else's


@dataclass(frozen=True)
class Learned:
    """Learns when a cell asks, from prompts that are not evaluated, and keeps what it has learned."""

    folder: Path  # fits lie in fit/ there, so that a run that goes on has the same
    engine: Callable[[str], StarsEngine]
    target_prompts: Sequence[Any]  # from whose pilot responses one target for all prompts is taken
    fit_prompts: Sequence[Any]
    seed: int
    _pilots: dict[str, tuple[StarsConfig, list[Pilot]]] = field(default_factory=dict)

    def config(self, cell: Cell) -> StarsConfig:
        """The cell's settings, with one target for all prompts where it asks for an acceptance, or with the fit."""
        if cell.way == FIT:
            return cell.config.replace(fit=self.fit(cell))
        if cell.acceptance is None:
            return cell.config
        if cell.method not in self._pilots:  # unguided, and so the same for all budgets
            seeds = [philox_key(self.seed, _CALIBRATION + i, 0) for i in range(len(self.target_prompts))]
            arguments = Arguments(list(self.target_prompts), cell.config, seed=seeds)
            self._pilots[cell.method] = self.engine(cell.method).run_pilots(arguments, PILOTS_EACH)
        config, pilots = self._pilots[cell.method]
        return shared_target(config, pilots, cell.acceptance)

    def fit(self, cell: Cell) -> Fit:
        """The fit of a cell's segments. What it was made from, its policy tokens and its seconds are in its figures."""
        method = cell.config.chosen_method
        plain = method.segments() == Segments()
        path = self.folder / "fit" / ("" if plain else cell.method) / FIT_NAME
        if path.exists():
            return Fit.from_pretrained(path)
        if not self.fit_prompts:
            raise ValueError(f"{cell.label}: give `fit:` in the recipe, or --fit: how many prompts to learn it from")
        start = time.perf_counter()
        # All candidates are looked at, so that side by side is faster, and no other text.
        settings = cell.config.replace(method="stars" if plain else method, candidates="auto")
        known = fit(self.engine(cell.method), list(self.fit_prompts), settings, seed=self.seed)
        known = replace(known, figures={**known.figures, "seconds": round(time.perf_counter() - start, 1)})
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(known.to_dict()) + "\n")
        return known


def shared_target(config: StarsConfig, pilots: Sequence[Pilot], acceptance: float) -> StarsConfig:
    """Settings with one r_star, r0 and beta for all prompts, from the pilots of some of them.

    The target is solved for on all pilots together; beta is in units of the median spread within a prompt, as in
    :func:`stars_fast.calibrate`. Unlike there the target is not capped at what the pilots reached: a budget is to be
    spent, also where it buys little.

    Raises
    ------
    RuntimeError
        If a pilot failed, with the cause.
    """
    failed = next((pilot.error for pilot in pilots if pilot.error is not None), None)
    if failed is not None:
        raise RuntimeError(failed)
    pooled = Pilot([run for pilot in pilots for run in pilot.responses])
    solve(pooled, config, acceptance, config.beta * median(spread(pilot) for pilot in pilots))
    if expected_acceptance(pooled, config) > acceptance:
        aim(pooled, config, acceptance, pooled.target, pooled.target + FARTHEST * pooled.beta)
    return config.replace(target_reward=pooled.target, base_reward=pooled.empty, beta=pooled.beta)

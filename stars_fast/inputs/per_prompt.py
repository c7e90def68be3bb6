"""Targets that were calibrated for some prompts, used for others."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from stars_fast.methods.fit import Fit
from stars_fast.notices import warn

_KEPT = 64  # calibrations


class PerPrompt:
    """What an engine was calibrated for: known by its numbers, also of a config that was changed, saved and read."""

    def __init__(self) -> None:
        self._made: list[tuple[tuple[float, ...], list[str]]] = []
        self._warned = False

    def made(self, targets: Iterable[float], prompts: Iterable[Sequence[int]]) -> None:
        """Targets, one for each of these prompts (:func:`stars_fast.text.media.identity`)."""
        self._made = [*self._made[1 - _KEPT :], (tuple(targets), fingerprints(prompts))]

    def used(self, targets: Sequence[float], prompts: Iterable[Sequence[int]]) -> None:
        """They are used for these: a warning says once where they were made for others."""
        known = [made for calibrated, made in self._made if calibrated == targets]
        if self._warned or not known or (now := fingerprints(prompts)) in known:
            return
        other = next(i for i, (one, here) in enumerate(zip(known[-1], now, strict=True)) if one != here)
        warn(
            f"target_reward was calibrated for other prompts: prompts[{other}] is not the one that its number was made "
            "for. Calibrate for these (target_reward=None, or stars_fast.calibrate), or give one number for all"
        )
        self._warned = True


def places(fit: Fit | None, targets: object, prompts: Iterable[Sequence[int]]) -> list[int | None] | None:
    """Per prompt, which of the targets was calibrated for it, if any. None where the targets are not those of the fit:
    the caller's own, one for each prompt. Then nobody asks what ``prompts`` are.
    """
    if fit is None or not isinstance(targets, tuple) or list(targets) != fit.made_for.get("targets"):
        return None
    made, here = fit.made_for["prompts"], fingerprints(prompts)
    if here == made:  # a prompt that was calibrated twice has two
        return list(range(len(made)))
    first = {one: place for place, one in reversed(list(enumerate(made)))}
    return [first.get(one) for one in here]


def fingerprints(prompts: Iterable[Sequence[int]]) -> list[str]:
    """What tells prompts apart, in every process alike."""
    return [hashlib.blake2b(np.asarray(ids, "<i8").tobytes(), digest_size=8).hexdigest() for ids in prompts]

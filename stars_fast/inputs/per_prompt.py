"""Targets that were calibrated for some prompts, used for others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from stars_fast.notices import warn

_KEPT = 64  # calibrations


class PerPrompt:
    """What an engine was calibrated for: known by its numbers, also of a config that was changed, saved and read."""

    def __init__(self) -> None:
        self._made: list[tuple[tuple[float, ...], list[int]]] = []
        self._warned = False

    def made(self, targets: Iterable[float], prompts: Iterable[Sequence[int]]) -> None:
        """Targets, one for each of these prompts' ids."""
        self._made = [*self._made[1 - _KEPT :], (tuple(targets), _fingerprints(prompts))]

    def serves(self, targets: Sequence[float], prompts: Sequence[Sequence[int]]) -> bool:
        """Whether there is one for each of these prompts, and nothing says that it is another one's."""
        known = [made for calibrated, made in self._made if calibrated == targets]
        return len(targets) == len(prompts) and (not known or _fingerprints(prompts) in known)

    def used(self, targets: Sequence[float], prompts: Iterable[Sequence[int]]) -> None:
        """They are used for these: a warning says once where they were made for others."""
        known = [made for calibrated, made in self._made if calibrated == targets]
        if self._warned or not known or (now := _fingerprints(prompts)) in known:
            return
        other = next(i for i, (one, here) in enumerate(zip(known[-1], now, strict=True)) if one != here)
        warn(
            f"target_reward was calibrated for other prompts: prompts[{other}] is not the one that its number was made "
            "for. Calibrate for these (target_reward=None, or stars_fast.calibrate), or give one number for all"
        )
        self._warned = True


def _fingerprints(prompts: Iterable[Sequence[int]]) -> list[int]:
    return [hash(tuple(ids)) for ids in prompts]

"""Targets that are one per prompt, used for other prompts than they were made for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from stars_fast.notices import warn

_REMEMBERED = 256  # lists of targets


def fingerprint(ids: Sequence[int]) -> int:
    """What tells a prompt's ids from others in this process."""
    return hash(tuple(ids))


class PerPrompt:
    """Which prompts an engine has met a list of targets with. Lists are known by their numbers, so that they are also
    after a config was changed, saved and read.
    """

    def __init__(self) -> None:
        self._made_for = OrderedDict[tuple[float, ...], tuple[int, ...]]()

    def made(self, targets: Sequence[float], prompts: Sequence[int]) -> None:
        """They were calibrated for the prompts of these fingerprints."""
        self._made_for[tuple(targets)] = tuple(prompts)
        if len(self._made_for) > _REMEMBERED:
            self._made_for.popitem(last=False)

    def used(self, targets: Sequence[float], prompts: Sequence[int]) -> None:
        """They are used for these: a warning says once where those were others."""
        first = self._made_for.get(tuple(targets))
        if first is None:
            if len(set(targets)) > 1:  # the same number for everyone goes with any prompts
                self.made(targets, prompts)
            return
        other = next((i for i, (one, now) in enumerate(zip(first, prompts, strict=True)) if one != now), None)
        if other is not None:
            self.made(targets, prompts)
            warn(
                f"target_reward holds a number per prompt that was made for other prompts: prompts[{other}] is not the "
                "one that it was calibrated or first used for. Calibrate for these (target_reward=None, or "
                "stars_fast.calibrate), or give one number for all"
            )

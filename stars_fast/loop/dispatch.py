"""Which loop runs a method."""

from __future__ import annotations

from typing import Any

from stars_fast.config import StarsConfig
from stars_fast.loop.enumeration import Enumeration
from stars_fast.loop.heartbeat import Generation
from stars_fast.loop.populations import Populations, Trials
from stars_fast.loop.two_proposers import Drafting, SelfJudging
from stars_fast.methods import RSD, Enumerated, PersonaJudge, Population, Trial
from stars_fast.policy.policy import Policy

_LOOPS: dict[type, type[Generation]] = {
    Trial: Trials,
    Population: Populations,
    Enumerated: Enumeration,
    PersonaJudge: SelfJudging,
}


def generation(config: StarsConfig, draft: Policy | None, *args: Any) -> Generation:
    """The loop of the config's method over ``args``, those of :class:`Generation`."""
    method = config.chosen_method
    if isinstance(method, RSD):
        assert draft is not None
        return Drafting(*args, draft=draft)
    loop = next((loop for kind, loop in _LOOPS.items() if isinstance(method, kind)), Generation)
    return loop(*args)

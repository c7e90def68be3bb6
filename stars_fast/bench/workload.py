"""What is generated in a measurement, and the target that makes its acceptance what was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from stars_fast.bench.models import Pair
from stars_fast.config import StarsConfig
from stars_fast.engine import StarsEngine
from stars_fast.inputs.arguments import Arguments
from stars_fast.loop.pilot import FARTHEST, Pilot, aim, spread

_PILOT_SEGMENTS = 4
_PILOT_RESPONSES = 128  # of all prompts together
_FEWEST, _MOST = 2, 32  # of one


@dataclass(frozen=True)
class Workload:
    """One point of a benchmark; what has no remark is as in :class:`stars_fast.StarsConfig`."""

    batch: int = 1  # prompts of one call
    prompt_length: int | None = 32  # tokens of each, random ids; None: the models' own openings
    max_new_tokens: int = 64
    segment_length: int = 16
    acceptance: float = 1 / 6  # of candidates; CARDS' published call counts imply about six attempts a segment
    max_attempts: int = 20
    candidates: int | str = "auto"
    top_k: int = 50

    def config(self) -> StarsConfig:
        """Settings without a target. With alpha = 1 the threshold is the target at every length, so that one number
        sets the acceptance.
        """
        return StarsConfig(
            max_new_tokens=self.max_new_tokens,
            segment_length=self.segment_length,
            max_attempts=self.max_attempts,
            candidates=self.candidates,
            alpha=1.0,
            top_k=self.top_k,
            ignore_eos=True,
        )


class Pilots:
    """Rewards of unguided segments, kept by workload: a target for another acceptance needs no new ones."""

    def __init__(self, pair: Pair, engine: StarsEngine) -> None:
        self.pair, self.engine = pair, engine
        self._kept: dict[Workload, list[Pilot]] = {}

    def config(self, workload: Workload) -> StarsConfig:
        """The workload's settings, with beta, and a target for each prompt by which its unguided segments pass as often
        as asked for: rewards of different prompts have different means.

        Raises
        ------
        ValueError
            For an acceptance outside (0, 1), and for what the engine refuses.
        """
        if not 0 < workload.acceptance < 1:
            raise ValueError(f"acceptance={workload.acceptance}: must lie in (0, 1)")
        config, pilots = workload.config(), self._pilots(workload)
        config = config.replace(beta=config.beta * fmean(map(spread, pilots)))
        return config.replace(target_reward=tuple(_target(pilot, config, workload.acceptance) for pilot in pilots))

    def _pilots(self, workload: Workload) -> list[Pilot]:
        """The first segments of a text stand for all of them."""
        length = min(workload.max_new_tokens, _PILOT_SEGMENTS * workload.segment_length)
        key = replace(workload, max_new_tokens=length, acceptance=0.5, candidates=1, max_attempts=1)
        if key not in self._kept:
            prompts = self.pair.prompts(key.batch, key.prompt_length)
            samples = min(max(_PILOT_RESPONSES // key.batch, _FEWEST), _MOST)
            _, self._kept[key] = self.engine.run_pilots(Arguments(prompts, key.config(), seed=0), samples)
        return self._kept[key]


def _target(pilot: Pilot, config: StarsConfig, acceptance: float) -> float:
    pilot.beta = config.beta
    far = FARTHEST * pilot.beta
    aim(pilot, config, acceptance, min(pilot.finals) - far, max(pilot.finals) + far)
    return pilot.target


def title(load: Mapping[str, Any], varied: str | None) -> str:
    """The fields of a recorded workload in words, but for the one that is varied."""
    parts = {
        "batch": f"batch {load['batch']}",
        "prompt_length": "own prompts" if load["prompt_length"] is None else f"{load['prompt_length']}-token prompts",
        "max_new_tokens": f"{load['max_new_tokens']} new tokens",
        "segment_length": f"segments of {load['segment_length']}",
        "acceptance": f"acceptance {load['acceptance']:.2g}",
        "candidates": f"candidates {load['candidates']}",
    }
    return ", ".join(text for name, text in parts.items() if name != varied)

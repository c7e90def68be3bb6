"""Runs every cell (a method at a budget) over the same prompts, batch by batch, and keeps what came out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from torch import nn

from stars_fast.config import StarsConfig
from stars_fast.engine import StarsEngine
from stars_fast.evaluation.cells import Cell
from stars_fast.evaluation.judging import judged
from stars_fast.evaluation.records import Record, Records
from stars_fast.inputs.arguments import Arguments
from stars_fast.inputs.sampling import resolve_sampling
from stars_fast.loop.pilot import FARTHEST, Pilot, aim, expected_acceptance, solve, spread
from stars_fast.ops.philox import philox_key
from stars_fast.outputs import StarsOutput
from stars_fast.report.files import rounded, summary
from stars_fast.report.weights import Weights
from stars_fast.rewards import Reward

PILOTS = 8  # responses to each calibration prompt
_CALIBRATION = 1 << 32  # index of the first calibration prompt: its random numbers are nobody else's


@dataclass(frozen=True)
class Evaluation:
    """What all cells share."""

    prompts: Sequence[str]
    calibration_prompts: Sequence[str]  # others, from whose pilot responses one target for all prompts is taken
    engine: Callable[[str], StarsEngine]  # by method: they may want other rewards, or a second policy
    guide: Reward  # scores every finished response, as the judge does; most methods follow it
    judge: Reward  # guided nothing
    batch_size: int  # prompts of one call; part of what a run is: how much is drawn in vain depends on the neighbours
    seed: int  # a prompt's random numbers depend on it and the prompt's place, and are the same in every cell

    def run(
        self, cells: Sequence[Cell], records: Records, advance: Callable[[int, str], None] = lambda count, cell: None
    ) -> None:
        """Run what ``records`` does not hold yet. Safe to interrupt, and to call again.

        ``advance`` is told how many generations were added, and of which cell.
        """
        for cell in cells:
            todo = [batch for batch in range(self.batches) if (cell.name, batch) not in records.done]
            advance(len(self.prompts) - sum(len(self._places(batch)) for batch in todo), cell.name)
            config = self._calibrated(cell) if todo else cell.config
            for batch in todo:
                records.add(*self._run_batch(cell, config, batch))
                advance(len(self._places(batch)), cell.name)

    @property
    def batches(self) -> int:
        return -(-len(self.prompts) // self.batch_size)

    def _places(self, batch: int) -> range:
        return range(batch * self.batch_size, min((batch + 1) * self.batch_size, len(self.prompts)))

    def _calibrated(self, cell: Cell) -> StarsConfig:
        """The cell's settings; with one target for all prompts where it asks for an acceptance."""
        if cell.acceptance is None:
            return cell.config
        seeds = [philox_key(self.seed, _CALIBRATION + i, 0) for i in range(len(self.calibration_prompts))]
        arguments = Arguments(list(self.calibration_prompts), cell.config, seed=seeds)
        config, pilots = self.engine(cell.method).run_pilots(arguments, PILOTS)
        return shared_target(config, pilots, cell.acceptance)

    def _run_batch(self, cell: Cell, config: StarsConfig, batch: int) -> tuple[list[Record], Record]:
        places, engine = self._places(batch), self.engine(cell.method)
        prompts = [self.prompts[place] for place in places]
        try:
            out = engine.generate(prompts, config, seed=[philox_key(self.seed, place, 0) for place in places])
        except (ValueError, TypeError) as error:  # which counts from the batch's first prompt
            raise ValueError(f"{cell.name}, prompts {places.start} to {places.stop - 1}: {error}") from error
        eos = ended_by_eos(out, config, engine)
        scores = [
            judged(reward, engine.tokenizer, prompts, out.completions, eos) for reward in (self.guide, self.judge)
        ]
        label: Record = {"cell": cell.name, "method": cell.method, "budget": cell.budget, "batch": batch}
        rows = [
            {**label, "place": place, "prompt": prompt, **_generation(out, i, *(score[i] for score in scores))}
            for i, (place, prompt) in enumerate(zip(places, prompts, strict=True))
        ]
        target = rounded(config.target_reward) if isinstance(config.target_reward, float) else None
        return rows, {**label, "target": target, **out.stats, **_spent(out, config, engine)}


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


def ended_by_eos(out: StarsOutput, config: StarsConfig, engine: StarsEngine) -> list[bool]:
    """Whether each answer ended by one of the ids that end answers under these settings."""
    ids = resolve_sampling(config, engine.policy.model, engine.tokenizer).eos_token_ids
    return [
        reason == "stop" and tokens[-1] in ids
        for reason, tokens in zip(out.finish_reasons, out.completions, strict=True)
    ]


def _generation(out: StarsOutput, i: int, guide: tuple[float, str | None], judge: tuple[float, str | None]) -> Record:
    return {
        "completion": None if out.texts is None else out.texts[i],
        "completion_ids": list(out.completions[i]),
        "finish_reason": out.finish_reasons[i],
        "error": out.errors[i] or guide[1] or judge[1],
        "guide": rounded(guide[0]),
        "judge": rounded(judge[0]),
        "logprobs": [rounded(logprob) for logprob in out.logprobs[i]],
        "segments": [summary(segment) for segment in out.segments[i]],
    }


def _spent(out: StarsOutput, config: StarsConfig, engine: StarsEngine) -> Record:
    """Tokens through each model, in units of the policy's parameters."""
    method = config.chosen_method
    policy = Weights.of(engine.policy.model).multiplied
    own, drafted = method.passes(out.stats["policy_tokens"], out.stats["committed_tokens"])
    draft = 0 if method.draft_model is None else Weights.of(method.draft_model).multiplied
    return {
        "policy_passes": own,
        "draft_passes": drafted * draft / policy,
        "reward_passes": out.stats["reward_tokens"] * _parameters(engine.reward) / policy,
    }


def _parameters(reward: Reward) -> float:
    """Weights that a reward token is multiplied with; a mean over a scorer's models, which read the same texts."""
    models: list[Any] = [tree.model for tree in reward.tree_models] or [getattr(reward, "model", None)]
    sizes = [Weights.of(model).multiplied for model in models if isinstance(model, nn.Module)]
    return sum(sizes) / len(sizes) if sizes else 0.0

"""Runs every cell (a method at a budget) over the same prompts, batch by batch, and keeps what came out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from torch import nn

from stars_fast.config import StarsConfig
from stars_fast.engine import StarsEngine
from stars_fast.evaluation.cells import ACCEPTING, Cell
from stars_fast.evaluation.judging import judged
from stars_fast.evaluation.learned import Learned
from stars_fast.evaluation.records import Record, Records
from stars_fast.inputs.arguments import Arguments
from stars_fast.inputs.sampling import resolve_sampling
from stars_fast.loop.request import Request
from stars_fast.ops.philox import philox_key
from stars_fast.outputs import StarsOutput
from stars_fast.report.files import rounded, summary
from stars_fast.report.weights import Weights
from stars_fast.rewards import Reward


@dataclass(frozen=True)
class Evaluation:
    """What all cells share."""

    prompts: Sequence[Any]  # text, or chats
    learned: Learned
    engine: Callable[[str], StarsEngine]  # by method: they may want other rewards, or a second policy
    guide: Reward  # scores every finished response, as the judge does; most methods follow it
    judge: Reward  # guided nothing
    batch_size: int  # prompts of one call; part of what a run is: how much is drawn in vain depends on the neighbours
    seed: int  # a prompt's random numbers depend on it and the prompt's place, and are the same in every cell
    repeats: int = 1  # with the seeds seed, seed + 1, ...

    def run(
        self, cells: Sequence[Cell], records: Records, advance: Callable[[int, str], None] = lambda count, cell: None
    ) -> None:
        """Run what ``records`` does not hold yet. Safe to interrupt, and to call again.

        ``advance`` is told how many generations were added, and of which cell.
        """
        for cell in cells:
            todo = [key for key in self._batches() if (cell.name, *key) not in records.done]
            left = sum(len(self._places(batch)) for _, batch in todo)
            advance(len(self.prompts) * self.repeats - left, cell.name)
            config = self.learned.config(cell) if todo else cell.config
            for seed, batch in todo:
                records.add(*self._run_batch(cell, config, seed, batch))
                advance(len(self._places(batch)), cell.name)

    def _batches(self) -> list[tuple[int, int]]:
        """Seed and number of each."""
        count = -(-len(self.prompts) // self.batch_size)
        return list(product(range(self.seed, self.seed + self.repeats), range(count)))

    def _places(self, batch: int) -> range:
        return range(batch * self.batch_size, min((batch + 1) * self.batch_size, len(self.prompts)))

    def _run_batch(self, cell: Cell, config: StarsConfig, seed: int, batch: int) -> tuple[list[Record], Record]:
        places, engine = self._places(batch), self.engine(cell.method)
        prompts = [self.prompts[place] for place in places]
        arguments = Arguments(prompts, config, seed=[philox_key(seed, place, 0) for place in places])
        try:
            job = engine.finished(arguments)
        except (ValueError, TypeError) as error:  # which counts from the batch's first prompt
            raise ValueError(f"{cell.name}, prompts {places.start} to {places.stop - 1}: {error}") from error
        out = engine.output(job)
        engine.warn_of(job)
        eos, asked = ended_by_eos(out, config, engine), [node.reward_prompt for node in job.call.nodes]
        scores = [judged(reward, asked, out.completions, eos) for reward in (self.guide, self.judge)]
        label: Record = {
            "cell": cell.name,
            "method": cell.label,
            "budget": cell.budget,
            "seed": seed,
            "batch": batch,
        }
        rows = [
            {**label, "place": place, "prompt": prompt, **_generation(out, i, *(score[i] for score in scores))}
            for i, (place, prompt) in enumerate(zip(places, prompts, strict=True))
        ]
        if cell.method in ACCEPTING:
            for row, request in zip(rows, job.requests, strict=True):
                if request is not None:  # it is None where its pilots failed
                    row |= _tested(request, config)
        return rows, {**label, **out.stats, **_spent(out, config, engine)}


def _tested(request: Request, config: StarsConfig) -> Record:
    """Target and beta of a request whose candidates were tested, and the acceptance probabilities of its segments'."""
    before, segments = 0.0, []
    for index, segment in enumerate(request.segments):
        known = config.known
        score = segment.reward if known is None else known.level(index, before, segment.reward)
        log = min((score - segment.threshold) / request.beta, 0.0)
        segments.append({**summary(segment), "log_acceptance": rounded(log)})
        before = segment.reward
    return {"target": rounded(request.target), "beta": rounded(request.beta), "segments": segments}


def ended_by_eos(out: StarsOutput, config: StarsConfig, engine: StarsEngine) -> list[bool]:
    """Whether each answer ended by one of the ids that end answers under these settings."""
    ids = resolve_sampling(config, engine.policy.model, engine.tokenizer).eos_token_ids
    return [
        reason == "stop" and tokens[-1] in ids
        for reason, tokens in zip(out.finish_reasons, out.completions, strict=True)
    ]


def _generation(out: StarsOutput, i: int, guide: tuple[float, str | None], judge: tuple[float, str | None]) -> Record:
    rejecting = [name for name, (reward, _) in (("guide", guide), ("judge", judge)) if reward == -math.inf]
    rejected = f"the reward of the {rejecting[0]} is -inf, of which there is no mean" if rejecting else None
    return {
        "completion": None if out.texts is None else out.texts[i],
        "completion_ids": list(out.completions[i]),
        "finish_reason": out.finish_reasons[i],
        "error": out.errors[i] or guide[1] or judge[1] or rejected,
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

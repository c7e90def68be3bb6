"""Rollouts for TRL's GRPO trainer from the engine: ``GRPOTrainer(..., rollout_func=rollout_func(reward))``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from stars_fast.config import StarsConfig
from stars_fast.engine import StarsEngine
from stars_fast.text.prompts import read_prompts

if TYPE_CHECKING:
    from trl import GRPOTrainer

Rollouts = dict[str, list[Any]]


def rollout_func(
    reward: Any, config: StarsConfig | None = None, **engine: Any
) -> Callable[[list[Any], GRPOTrainer], Rollouts]:
    """Make a ``rollout_func`` for ``trl.GRPOTrainer`` (tested with trl 1.16).

    The samples of a group share their prompt's keys and values. The trainer's model is run as it is at every call:
    nothing is kept from one training step to the next.

    Parameters
    ----------
    reward : as StarsEngine takes it
        Scores every completion. ``reward_funcs=engine_reward`` makes these scores the trainer's rewards, without a
        second pass.
    config : StarsConfig, optional
        None: unguided samples, which is what GRPO's gradient assumes. Under guidance, the samples do not follow the
        policy whose gradient is taken. Where it leaves a sampling field None, the
        trainer's holds; max_new_tokens is its own.
    **engine
        Further arguments of :class:`stars_fast.StarsEngine`. The tokenizer is the trainer's unless given.

    Returns
    -------
    callable
        ``(prompts, trainer) -> dict`` with, per completion, ``prompt_ids``, ``completion_ids``, ``logprobs`` (of the
        tokens, after temperature and filters, in nats) and ``engine_rewards``. Raises RuntimeError with the first
        request's error.

    Examples
    --------
    >>> trainer = GRPOTrainer(model, engine_reward, rollout_func=rollout_func(reward), ...)  # doctest: +SKIP
    """
    engines: dict[int, StarsEngine] = {}

    def rollout(prompts: list[Any], trainer: GRPOTrainer) -> Rollouts:
        model = trainer.accelerator.unwrap_model(trainer.model)
        if id(model) not in engines:
            engines.clear()
            engines[id(model)] = StarsEngine(model, reward, **{"tokenizer": trainer.processing_class, **engine})
        return _rollouts(engines[id(model)], prompts, _settings(config, trainer.args))

    return rollout


def engine_reward(engine_rewards: Sequence[float], **columns: Any) -> list[float]:
    """A reward function for ``trl.GRPOTrainer``: what the engine's reward said of each completion."""
    return list(engine_rewards)


def _settings(config: StarsConfig | None, args: Any) -> StarsConfig:
    """The trainer's sampling settings, where the config leaves them open."""
    trainers = {
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "min_p": args.min_p or 0.0,
        "repetition_penalty": args.repetition_penalty,
    }
    if config is None:
        return StarsConfig(method="vanilla").replace(max_new_tokens=args.max_completion_length, **trainers)
    return config.replace(**{name: value for name, value in trainers.items() if getattr(config, name) is None})


def _rollouts(engine: StarsEngine, prompts: list[Any], config: StarsConfig) -> Rollouts:
    """One completion for each prompt given; those of equal neighbours are drawn as samples of one prompt."""
    groups = [(prompt, len(list(same))) for prompt, same in groupby(prompts)]
    gathered: list[Rollouts] = [{} for _ in groups]
    for size in dict.fromkeys(size for _, size in groups):
        places = [place for place, (_, count) in enumerate(groups) if count == size]
        asked = [groups[place][0] for place in places]
        out = engine.generate(asked, config, num_return_sequences=size, on_error="raise")
        for i, (place, prompt) in enumerate(zip(places, read_prompts(asked, engine.tokenizer), strict=True)):
            rows = slice(i * size, (i + 1) * size)
            gathered[place] = {
                "prompt_ids": [list(prompt.ids)] * size,
                "completion_ids": out.completions[rows],
                "logprobs": out.sampling_logprobs[rows],
                "engine_rewards": out.rewards[rows],
            }
    return {name: [row for group in gathered for row in group[name]] for name in gathered[0]}

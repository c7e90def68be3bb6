"""Rollouts for TRL's GRPO trainer from the engine: ``GRPOTrainer(..., rollout_func=rollout_func(reward))``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from transformers import GenerationConfig

from stars_fast.config import StarsConfig
from stars_fast.engine import StarsEngine
from stars_fast.inputs.arguments import Arguments
from stars_fast.inputs.sampling import NEUTRAL, SAMPLING_FIELDS
from stars_fast.notices import warn
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
        Scores every completion. It sees prompts and completions alone: TRL hands a ``rollout_func`` no columns of the
        data set. A reward that needs some goes into ``reward_funcs``, which get all columns and ``engine_rewards``.
        ``reward_funcs=engine_reward`` makes the engine's scores the trainer's rewards, without a second pass.
    config : StarsConfig, optional
        None: unguided samples, which is what GRPO's gradient assumes. Under guidance, the samples do not follow the
        policy whose gradient is taken. Sampling fields that it leaves None are the trainer's, and so is
        ``max_new_tokens`` where it has its default; no completion is longer than ``max_completion_length``.
    **engine
        Further arguments of :class:`stars_fast.StarsEngine`. The tokenizer is the trainer's unless given.

    Notes
    -----
    Of GRPOConfig hold ``temperature``, ``top_k``, ``top_p``, ``min_p``, ``repetition_penalty``,
    ``max_completion_length``, ``generation_kwargs`` (over the model's generation_config, and read as it is) and
    ``chat_template_kwargs``. Answers end with the ids that end TRL's own.

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
        if getattr(trainer, "tools", None):
            raise NotImplementedError("the trainer has tools, which rollouts of stars_fast neither show nor call")
        variables = cast(Any, trainer.args).chat_template_kwargs
        given = _Given(_settings(config, trainer), _generation_config(model, trainer), variables)
        return _rollouts(engines[id(model)], prompts, given)

    return rollout


def engine_reward(engine_rewards: Sequence[float], **columns: Any) -> list[float]:
    """A reward function for ``trl.GRPOTrainer``: what the engine's reward said of each completion."""
    return list(engine_rewards)


class _Given(NamedTuple):
    """What the trainer's settings come to."""

    config: StarsConfig
    generation_config: GenerationConfig
    chat_template_kwargs: Mapping[str, Any] | None


def _trainers(trainer: GRPOTrainer) -> dict[str, Any]:
    """Fields of GenerationConfig as the trainer would set them for transformers."""
    args: Any = trainer.args
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    ends = {"eos_token_id": trainer.eos_token_ids, "max_new_tokens": args.max_completion_length}
    return {**{name: getattr(args, name) for name in names}, **ends, **(args.generation_kwargs or {})}


def _settings(config: StarsConfig | None, trainer: GRPOTrainer) -> StarsConfig:
    """The trainer's sampling settings and length, where the config leaves them open."""
    config, given, args = config or StarsConfig(method="vanilla"), _trainers(trainer), cast(Any, trainer.args)
    if given.get("do_sample") is False:
        raise ValueError("generation_kwargs: do_sample=False, but rollouts are samples")
    sampling = {name: NEUTRAL[name] if given[name] is None else given[name] for name in SAMPLING_FIELDS}
    lengths = [config.max_new_tokens, given["max_new_tokens"], args.max_completion_length]
    if config.max_new_tokens == StarsConfig().max_new_tokens:
        lengths = lengths[1:]
    longest = min((length for length in lengths if length is not None), default=config.max_new_tokens)
    left = {name: value for name, value in sampling.items() if getattr(config, name) is None}
    return config.replace(max_new_tokens=longest, **left)


def _generation_config(model: Any, trainer: GRPOTrainer) -> GenerationConfig:
    """The model's, with what the trainer sets."""
    made, given = copy.deepcopy(model.generation_config), _trainers(trainer)
    if unknown := given.keys() - vars(GenerationConfig()).keys():
        warn(f"generation_kwargs: {', '.join(sorted(unknown))} are no fields of GenerationConfig: they have no effect")
    for name, value in given.items():
        setattr(made, name, value)
    return made


def _rollouts(engine: StarsEngine, prompts: list[Any], given: _Given) -> Rollouts:
    """One completion for each prompt given; those of equal neighbours are drawn as samples of one prompt."""
    groups = [(prompt, len(list(same))) for prompt, same in groupby(prompts)]
    gathered: list[Rollouts] = [{} for _ in groups]
    config, generation_config, variables = given
    for size in dict.fromkeys(size for _, size in groups):
        places = [place for place, (_, count) in enumerate(groups) if count == size]
        asked = [groups[place][0] for place in places]
        arguments = Arguments(
            asked,
            config.replace(num_return_sequences=size),
            on_error="raise",
            chat_template_kwargs=variables,
            generation_config=generation_config,
        )
        out = engine.run(arguments)
        read = read_prompts(asked, engine.tokenizer, chat_template_kwargs=variables)
        for i, (place, prompt) in enumerate(zip(places, read, strict=True)):
            rows = slice(i * size, (i + 1) * size)
            gathered[place] = {
                "prompt_ids": [list(prompt.ids)] * size,
                "completion_ids": out.completions[rows],
                "logprobs": out.sampling_logprobs[rows],
                "engine_rewards": out.rewards[rows],
            }
    return {name: [row for group in gathered for row in group[name]] for name in gathered[0]}

"""Rollouts for TRL's GRPO trainer from the engine: ``GRPOTrainer(..., rollout_func=rollout_func(reward))``."""

from __future__ import annotations

import copy
import functools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, groupby
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from transformers import GenerationConfig, ProcessorMixin

from stars_fast.config import StarsConfig
from stars_fast.engine import StarsEngine
from stars_fast.inputs.arguments import Arguments
from stars_fast.inputs.outcome import first_error
from stars_fast.inputs.sampling import NEUTRAL, SAMPLING_FIELDS
from stars_fast.loop.memory import InUse
from stars_fast.methods.numbers import shown
from stars_fast.notices import warn
from stars_fast.ops import gather_logprobs
from stars_fast.policy.policy import Policy
from stars_fast.rewards import CallableReward, Reward
from stars_fast.text.media import Media, text_inputs
from stars_fast.text.prompts import Prompt
from stars_fast.tree.attention import own_dtypes, plugged

if TYPE_CHECKING:
    from trl import GRPOTrainer

Rollouts = dict[str, list[Any]]


def rollout_func(
    reward: Any,
    config: StarsConfig | None = None,
    *,
    references: Callable[[Any], str | Sequence[int] | None] | None = None,
    keep_memory: bool = False,
    **engine: Any,
) -> Callable[[list[Any], GRPOTrainer], Rollouts]:
    """Make a ``rollout_func`` for ``trl.GRPOTrainer`` (tested with trl 1.16).

    The samples of a group share their prompt's keys and values. The trainer's model is run as it is at every call:
    no text or number is kept from one training step to the next, and by default no memory.

    Parameters
    ----------
    reward : as StarsEngine takes it
        Scores every completion. It sees prompts and completions alone: TRL hands a ``rollout_func`` no columns of the
        data set. A reward that needs some goes into ``reward_funcs``, which get all columns and ``engine_rewards``.
        ``reward_funcs=engine_reward`` makes the engine's scores the trainer's rewards, without a second pass.
    config : StarsConfig, optional
        None: unguided samples, which is what GRPO's gradient assumes. Under guidance, the samples do not follow the
        policy whose gradient is taken. Sampling fields that it leaves None are the trainer's, and so is
        ``max_new_tokens`` where it has its default; no completion is longer than ``max_completion_length``. With
        :class:`stars_fast.methods.Plans`, of which ``num_generations`` is a multiple of ``children``, the samples of a
        group are plans with answers below them.
    references : callable, optional
        A prompt, as the trainer hands it on, to its reference answer (text, or ids with their EOS; None: it has none):
        GRAO (arXiv 2508.07750) weighs samples against it. It is read by the same weights as the samples.
    keep_memory : bool
        Whether pools of keys and values, and graphs, stay where they are between rollouts. False: gradients are taken
        with that memory free (:meth:`stars_fast.StarsEngine.release_memory`), and every rollout makes them anew.
    **engine
        Further arguments of :class:`stars_fast.StarsEngine`. The tokenizer or processor is the trainer's unless given.

    Notes
    -----
    Of GRPOConfig hold ``temperature``, ``top_k``, ``top_p``, ``min_p``, ``repetition_penalty``,
    ``max_completion_length``, ``generation_kwargs`` (over the model's generation_config, and read as it is) and
    ``chat_template_kwargs``. Answers end with the ids that end TRL's own.

    Returns
    -------
    callable
        ``(prompts, trainer) -> dict`` with, per completion, ``prompt_ids``, ``completion_ids``, ``logprobs`` (of the
        tokens, after temperature and filters, in nats) and ``engine_rewards``; under Plans also ``plan``, a number that
        the answers to one plan share, and ``plan_reward``, the mean of their ``engine_rewards``; with references
        ``reference_ids`` and ``reference_logprobs`` (of each token, at the trainer's temperature, unfiltered; None
        where there is none). ``reward_funcs`` get all of these as columns. Raises RuntimeError with the first request's
        error.

    Examples
    --------
    >>> trainer = GRPOTrainer(model, engine_reward, rollout_func=rollout_func(reward), ...)  # doctest: +SKIP
    """
    if not isinstance(config, (StarsConfig, type(None))):
        raise TypeError(
            f"rollout_func: config={shown(config)}: give a StarsConfig; GRPOTrainer takes rollout_func(reward)"
        )
    if callable(reward) and not isinstance(reward, (Reward, torch.nn.Module, type)):
        columns = [name for name in CallableReward(reward).needed if name != "images"]  # which are the prompts'
        if columns:
            raise ValueError(
                f"rollout_func: the reward function needs {', '.join(columns)}, and TRL hands a rollout_func no "
                "columns of the data set: give it to reward_funcs of GRPOTrainer, which gets them"
            )
    engines: dict[int, StarsEngine] = {}

    def rollout(prompts: list[Any], trainer: GRPOTrainer) -> Rollouts:
        model = trainer.accelerator.unwrap_model(trainer.model)
        if id(model) not in engines:
            engines.clear()
            kind = "processor" if isinstance(trainer.processing_class, ProcessorMixin) else "tokenizer"
            engines[id(model)] = StarsEngine(model, reward, **{kind: trainer.processing_class, **engine})
        if getattr(trainer, "tools", None):
            raise NotImplementedError("the trainer has tools, which rollouts of stars_fast neither show nor call")
        variables = cast(Any, trainer.args).chat_template_kwargs
        given = _Given(_settings(config, trainer), _generation_config(model, trainer), variables)
        try:
            return _rollouts(engines[id(model)], prompts, given, references)
        finally:
            if not keep_memory:
                _release(engines[id(model)])

    return rollout


def _release(engine: StarsEngine) -> None:
    """Its memory, unless somebody else has the same models in use: the samples are there all the same."""
    try:
        engine.release_memory()
    except InUse as error:
        warn(f"after a rollout, the memory of keys and values is kept: {error}")


def engine_reward(engine_rewards: Sequence[float], **columns: Any) -> list[float]:
    """A reward function for ``trl.GRPOTrainer``: what the engine's reward said of each completion."""
    return list(engine_rewards)


def by_plan(reward_func: Callable[..., Sequence[float | None]]) -> Callable[..., list[float | None]]:
    """A reward function for ``trl.GRPOTrainer``: the mean of another over the answers to a completion's plan.

    Of one that says whether an answer is right, in 0 and 1, that is the share of right answers: what PTA-GRPO
    (arXiv 2510.01833) takes a plan to be worth. Answers of which the other says None do not count.
    """

    @functools.wraps(reward_func)
    def reward(plan: Sequence[int], **columns: Any) -> list[float | None]:
        values = defaultdict[int, list[float]](list)
        for number, value in zip(plan, reward_func(plan=plan, **columns), strict=True):
            if value is not None:
                values[number].append(value)
        return [fmean(values[number]) if values[number] else None for number in plan]

    reward.__name__ = f"{getattr(reward_func, '__name__', 'reward')}_by_plan"  # what TRL logs it under
    return reward


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


def _rollouts(
    engine: StarsEngine, prompts: list[Any], given: _Given, references: Callable[[Any], Any] | None
) -> Rollouts:
    """One completion for each prompt given; those of equal neighbours are drawn as samples of one prompt."""
    groups = [(prompt, len(list(same))) for prompt, same in groupby(prompts)]
    gathered: list[Rollouts] = [{} for _ in groups]
    read: dict[int, Prompt] = {}
    config, generation_config, variables = given
    planned = config.chosen_method.answers_a_plan
    children = planned or 1
    first = list(accumulate((count // children for _, count in groups), initial=0))
    for size in dict.fromkeys(size for _, size in groups):
        if size % children:
            raise ValueError(f"a prompt has {size} samples, which are not whole plans of children={children}")
        places = [place for place, (_, count) in enumerate(groups) if count == size]
        arguments = Arguments(
            [groups[place][0] for place in places],
            config.replace(num_return_sequences=size),
            on_error="raise",
            chat_template_kwargs=variables,
            generation_config=generation_config,
        )
        job = engine.finished(arguments)
        out = engine.output(job, texts=False)
        engine.warn_of(job)
        if job.failed:
            raise first_error(job)
        for i, (place, prompt) in enumerate(zip(places, job.call.prompts, strict=True)):
            rows = slice(i * size, (i + 1) * size)
            read[place] = prompt
            gathered[place] = {
                "prompt_ids": [list(prompt.ids)] * size,
                "completion_ids": out.completions[rows],
                "logprobs": out.sampling_logprobs[rows],
                "engine_rewards": out.rewards[rows],
            }
            if planned is not None:
                gathered[place] |= _of_plans(out.rewards[rows], children, first[place])
    if references is not None:
        answers = [_reference(references(prompt), engine.tokenizer) for prompt, _ in groups]
        read_as = [read[place] for place in range(len(groups))]
        found = _read_references(engine.policy, read_as, answers, config.temperature or 1.0)
        for columns, (_, size), answer, logprobs in zip(gathered, groups, answers, found, strict=True):
            columns |= {"reference_ids": [answer] * size, "reference_logprobs": [logprobs] * size}
    return {name: [row for group in gathered for row in group[name]] for name in gathered[0]}


def _of_plans(rewards: Sequence[float], children: int, first: int) -> Rollouts:
    """Columns of a prompt's samples; its plans are numbered from ``first`` on."""
    means = [fmean(rewards[start : start + children]) for start in range(0, len(rewards), children)]
    plans = [place // children for place in range(len(rewards))]
    return {"plan": [first + plan for plan in plans], "plan_reward": [means[plan] for plan in plans]}


def _reference(given: str | Sequence[int] | None, tokenizer: Any) -> list[int] | None:
    """Ids of a reference answer. Text ends with the EOS, as answers do."""
    if not isinstance(given, str):
        return None if given is None else list(given)
    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [*tokenizer(given, add_special_tokens=False)["input_ids"], *ends]


@torch.no_grad()
@own_dtypes()
def _read_references(
    policy: Policy, prompts: Sequence[Prompt], answers: Sequence[list[int] | None], temperature: float
) -> list[list[float] | None]:
    """Log-probabilities of each answer's tokens, one prompt after the other: a row of logits per token is held."""
    asked = [(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True) if answer]
    longest = max((len(prompt.ids) + len(answer) for prompt, answer in asked), default=1)
    policy.begin(longest, longest, 1)
    found: list[list[float] | None] = []
    try:
        with plugged(policy.model):
            for prompt, answer in zip(prompts, answers, strict=True):
                found.append(_read_reference(policy, prompt, answer, temperature) if answer else None)
    finally:
        policy.clear()
    return found


def _read_reference(policy: Policy, prompt: Prompt, answer: Sequence[int], temperature: float) -> list[float]:
    if prompt.media is not None or policy.reads_whole:
        media = prompt.media or Media(text_inputs(prompt.ids))
        nodes, first = policy.read_media(media.inputs, [media.row])
    else:
        nodes, first = policy.prefill([-1], [prompt.ids])
    logits = [first[0][None]]
    if len(answer) > 1:
        ends, rest = policy.read(nodes, [answer[:-1]])
        logits, nodes = logits + rest, nodes + ends
    policy.tree.release_all(nodes)
    logprobs = gather_logprobs(torch.cat(logits).float() / temperature, torch.tensor(answer, device=policy.device))
    values: list[float] = logprobs.tolist()
    return values

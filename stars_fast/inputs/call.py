"""A checked call, and the requests it becomes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

from transformers import GenerationConfig

from stars_fast.config import StarsConfig
from stars_fast.inputs.arguments import (
    Arguments,
    Hooks,
    check_limits,
    check_per_prompt,
    read_keys,
    read_reward_prompts,
    under_preferences,
    warn_of_idle,
    warn_of_overruled,
)
from stars_fast.inputs.fits import check_fit
from stars_fast.inputs.generation_settings import row_processors, time_limit, warn_of_unapplied
from stars_fast.inputs.guides import read_guides
from stars_fast.inputs.hooks import stop_test
from stars_fast.inputs.per_prompt import places
from stars_fast.inputs.sampling import as_ids, resolve_sampling
from stars_fast.inputs.sources import TAKEN, as_sources
from stars_fast.loop.caller import Size
from stars_fast.loop.pilot import PILOT_SAMPLES, Pilot, of_prompt, pilot_config
from stars_fast.loop.request import PromptNode, Request, StopTest, Terms
from stars_fast.methods.base import Method
from stars_fast.methods.numbers import shown
from stars_fast.methods.quantile import QuantileRule
from stars_fast.methods.stars import base_reward
from stars_fast.notices import warn
from stars_fast.ops.philox import Domain, philox_key
from stars_fast.outputs import Stats
from stars_fast.policy.leaf import Sampling
from stars_fast.policy.policy import Policy
from stars_fast.rewards import Reward, RewardPrompt
from stars_fast.text.chat import encode
from stars_fast.text.media import forward_arguments, identity, written_before
from stars_fast.text.prompts import Prompt, read_prompts
from stars_fast.tree.support import unwrapped


class Rule(NamedTuple):
    """What a request's candidates are tested against."""

    target: float  # r_star
    base: float | None  # r0; None until r(x) is scored
    beta: float


_PER_PROMPT = ("target_reward", "base_reward")
UNGUIDED = Rule(-math.inf, -math.inf, 1.0)


@dataclass(eq=False)
class Call:
    """A checked call. Row ``i * num_return_sequences + j`` of the output is sample j of prompt i."""

    arguments: Arguments
    terms: Terms
    prompts: Sequence[Prompt]
    nodes: Sequence[PromptNode]
    keys: Sequence[int]  # of the random numbers, per row
    hooks: Sequence[Hooks]  # per prompt: a pilot has samples beyond the rows of the output
    size: Size
    samples: int = PILOT_SAMPLES  # of a pilot
    priority: int = 0  # of its requests; lower runs first
    calibrated: Mapping[int, Rule] = field(default_factory=dict)  # by prompt, of those whose target the config has
    calibrated_terms: Terms | None = None  # of these; the others go by the fit
    pilot_terms: Terms = field(init=False)

    def __post_init__(self) -> None:
        config = pilot_config(self.config, self.samples)
        method = config.chosen_method
        self.pilot_terms = replace(
            self.terms, config=config, method=method, segments=method.segments(), pilot=True, trace=False
        )

    @property
    def config(self) -> StarsConfig:
        """The call's settings, with what the method decides itself."""
        return self.terms.config

    @property
    def rows(self) -> int:
        """Responses asked for."""
        return len(self.keys)

    @property
    def calibrates(self) -> bool:
        """Whether targets come from pilots."""
        return self.config.target_reward is None and self.terms.method.has_target

    def guided_requests(self, prompt: int, pilot: Pilot | None) -> list[Request]:
        """A request per sample of a prompt, under its pilot's rule where targets are calibrated."""
        samples = self.config.num_return_sequences
        terms, rule = self.calibrated_terms, self.calibrated.get(prompt)
        if terms is None or rule is None:
            rule = Rule(pilot.target, pilot.base, pilot.beta) if pilot else _explicit_rule(self.config, prompt)
            terms = self.terms
        requests = self._samples(prompt, self.keys[prompt * samples : (prompt + 1) * samples], rule, terms)
        if pilot is not None and pilot.error is not None:
            for request in requests:
                request.error, request.finish_reason = pilot.error, "error"
        return requests

    def pilot_requests(self, prompt: int) -> list[Request]:
        """Unguided requests, on a random stream of their own that depends on the prompt's key alone."""
        key = self.keys[prompt * self.config.num_return_sequences]
        keys = [philox_key(key, 0, j, domain=Domain.PILOT) for j in range(self.samples)]
        return self._samples(prompt, keys, UNGUIDED, self.pilot_terms)

    def _samples(self, prompt: int, keys: Sequence[int], rule: Rule, terms: Terms) -> list[Request]:
        first_row = prompt * self.config.num_return_sequences
        return [
            Request(
                terms=terms,
                prompt=self.nodes[prompt],
                key=key,
                target=rule.target,
                base=rule.base,
                beta=rule.beta,
                index=first_row + j,
                prompt_index=prompt,
                sample_index=j,
                priority=self.priority,
                processor=self.hooks[prompt].processor,
                stop=self.hooks[prompt].stop,
            )
            for j, key in enumerate(keys)
        ]


def prepare(
    arguments: Arguments,
    policy: Policy,
    reward: Reward,
    tokenizer: Any,
    kv_cache_tokens: int | None,
    samples: int,
    processor: Any,
    guide: Callable[[Any, str], Policy],
) -> Call:
    """Check every argument and read the prompts: settings, texts, limits, keys.

    Each prompt that a config was calibrated for has its own target; others go by the calibration's fit. ``guide`` gives
    the model that a guided method names (:func:`stars_fast.inputs.guides.read_guides`).

    Raises
    ------
    ValueError, TypeError
        Naming the argument, the value, the prompt's index and the limit. Nothing has run when this raises.
    """
    given, config, sampling = settings(arguments, policy, reward, tokenizer)
    prompts, reward_prompts = _texts(arguments, config.whole_method, policy, tokenizer, processor)
    calibrated, with_targets = dict[int, Rule](), config
    own = places(given.known, given.target_reward, map(identity, prompts))
    if own is not None and isinstance(given.target_reward, tuple) and isinstance(given.base_reward, tuple):
        check_per_prompt("base_reward", given.base_reward, len(given.target_reward), " that were calibrated")
    if own is not None and None not in own:
        arguments = _overridden(arguments, {name: _picked(getattr(given, name), own) for name in _PER_PROMPT})
        given, config, sampling = settings(arguments, policy, reward, tokenizer)
    elif own is not None:
        if config.chosen_method.has_target:
            calibrated = {i: _explicit_rule(config, place) for i, place in enumerate(own) if place is not None}
        base = given.base_reward
        others = {"target_reward": None, "base_reward": None if isinstance(base, tuple) else base}
        arguments = _overridden(arguments, others)
        given, config, sampling = settings(arguments, policy, reward, tokenizer)
    for name in _PER_PROMPT:
        if isinstance(value := getattr(given, name), tuple):
            check_per_prompt(name, value, len(prompts), ": calibrated for other prompts?")
    method = config.chosen_method
    sampling, hooks = _hooks(arguments, config, sampling, prompts, policy, tokenizer)
    preferred = under_preferences(method, prompts, arguments, sampling, hooks, policy, tokenizer)
    guidance = read_guides(config, prompts, arguments, policy, tokenizer, processor, guide)
    held = [
        sum(map(len, variants)) if variants else guidance.slots(index, prompt.ids)
        for index, (prompt, variants) in enumerate(zip(prompts, preferred, strict=True))
    ]
    slots = [count + guidance.copies * method.slots(config) for count in held]
    check_limits(prompts, preferred, slots, config, policy, kv_cache_tokens)
    reward.check(reward_prompts, config.max_new_tokens, kv_cache_tokens)
    keys = read_keys(arguments.seed, len(prompts), config.num_return_sequences, policy.sharded)
    whole = method.needs_hidden_state or reward.needs_hidden_state
    beside = [[one.ids for one in row] for row in guidance.prompts]
    terms = Terms(
        config,
        method,
        method.segments(),
        sampling,
        Stats(),
        whole,
        guides=guidance.guides,
        weights=guidance.weights,
        copies=guidance.copies,
        trace=arguments.trace,
    )
    return Call(
        arguments=arguments,
        terms=terms,
        calibrated=calibrated,
        calibrated_terms=replace(terms, config=with_targets, method=with_targets.chosen_method) if calibrated else None,
        prompts=prompts,
        nodes=[
            PromptNode(
                prompt.ids,
                rewarded,
                under_preferences=ids,
                media=prompt.media,
                beside=[PromptNode(one.ids, rewarded, media=one.media) for one in guidance.prompts[index]],
                slots=guidance.slots(index, prompt.ids),
            )
            for index, (prompt, rewarded, ids) in enumerate(zip(prompts, reward_prompts, preferred, strict=True))
        ],
        keys=keys,
        hooks=hooks,
        size=_size(config, prompts, [*preferred, *beside], slots, samples, reward_prompts, guidance.beside),
        samples=samples,
    )


def _overridden(arguments: Arguments, fields: Mapping[str, Any]) -> Arguments:
    return replace(arguments, overrides={**arguments.overrides, **fields})


def _picked(values: Any, own: Sequence[int | None]) -> Any:
    return tuple(values[place] for place in own if place is not None) if isinstance(values, tuple) else values


def settings(
    arguments: Arguments, policy: Policy, reward: Reward, tokenizer: Any
) -> tuple[StarsConfig, StarsConfig, Sampling]:
    """What the caller set, what the method makes of it, and how the policy is sampled."""
    config = arguments.config
    if config is not None and not isinstance(config, StarsConfig):
        raise TypeError(
            f"config is a {type(config).__name__}: give a StarsConfig"
            f"{', its .config' if isinstance(getattr(config, 'config', None), StarsConfig) else ''}"
        )
    given = (config or StarsConfig()).replace(**arguments.overrides)
    if not isinstance(arguments.on_error, str) or arguments.on_error not in ("return", "raise"):
        raise ValueError(f"on_error={shown(arguments.on_error)}: must be 'return' or 'raise'")
    method = given.chosen_method
    method.check(reward)
    ruled = method.rule(given)
    warn_of_overruled(method, given, ruled)
    if isinstance(ruled.target_reward, float) and method.uses_fit and method.has_target:
        warn_of_idle(given)
    if (read := method.in_ids(partial(_ids_of, tokenizer), policy.vocab_size)) is not method:
        ruled, method = ruled.selecting(read), read
    tests_quantiles = method.uses_fit and method.has_target and ruled.target_reward is None
    if given.known is not None and tests_quantiles:
        quantiles = QuantileRule(method, given.known, ruled.acceptance)
        ruled = quantiles.rule(given).selecting(quantiles)
    if method.segments().delimiter is not None and tokenizer is None:
        raise ValueError(
            f"method={method.name!r}: delimiter={method.segments().delimiter!r} needs a tokenizer: pass tokenizer=, "
            "or delimiter=None for steps of a fixed length"
        )
    own = _generation_config(arguments, policy)
    sampling = resolve_sampling(ruled, policy.model, tokenizer, own)
    if tests_quantiles or not (method.uses_fit and method.has_target):  # a target that is given needs no fit
        check_fit(ruled, sampling, policy, reward)
    if ruled.stop_strings is None and (strings := getattr(own, "stop_strings", None)) is not None:
        ruled = ruled.replace(stop_strings=strings)
    if ruled.eos_token_id is not None and max(eos := as_ids(ruled.eos_token_id), default=0) >= policy.vocab_size:
        raise ValueError(f"eos_token_id={max(eos)} lies outside the policy's vocabulary of {policy.vocab_size}")
    if policy.barred is not None and (ends := set(sampling.eos_token_ids)) and ends <= set(policy.barred.tolist()):
        warn(f"eos_token_id={min(ends)} is never drawn: to the policy it pads or stands for a picture")
    return given, ruled, sampling


def _ids_of(tokenizer: Any, text: str) -> list[int]:
    """Of a method's text."""
    if tokenizer is None:
        raise ValueError(f"the method has the policy read {shown(text)}: pass tokenizer=, or give it as ids")
    return encode(tokenizer, text)


def _generation_config(arguments: Arguments, policy: Policy) -> GenerationConfig | None:
    """What transformers would take settings from that nobody gave."""
    return arguments.generation_config or getattr(policy.model, "generation_config", None)


def _texts(
    arguments: Arguments, method: Method, policy: Policy, tokenizer: Any, processor: Any
) -> tuple[Sequence[Prompt], list[RewardPrompt]]:
    """Prompts, and as the reward sees them."""
    prompts = read_prompts(
        arguments.prompts,
        tokenizer,
        arguments.attention_mask,
        chat_template_kwargs=arguments.chat_template_kwargs,
        max_positions=policy.prompt_positions,
        processor=processor,
        takes=TAKEN if policy.from_source else forward_arguments(unwrapped(policy.model)),
    )
    if not policy.from_source:
        return prompts, read_reward_prompts(arguments, prompts, tokenizer)
    sources = as_sources(prompts, policy, method, _generation_config(arguments, policy))
    bare = [replace(prompt, media=None) for prompt in prompts]
    return sources, read_reward_prompts(arguments, bare, tokenizer)


def _hooks(
    arguments: Arguments,
    config: StarsConfig,
    sampling: Sampling,
    prompts: Sequence[Prompt],
    policy: Policy,
    tokenizer: Any,
) -> tuple[Sampling, Sequence[Hooks]]:
    """Per prompt what is done beside sampling, and what of the sampling is left to the decode step."""
    own = _generation_config(arguments, policy)
    ids = [written_before(prompt) for prompt in prompts]
    if arguments.processor is not None or arguments.stop is not None:
        rows = range(0, len(prompts) * config.num_return_sequences, config.num_return_sequences)
        process, ends = arguments.processor, arguments.stop
        given = [Hooks(process and process(row), ends and ends(row)) for row in rows]
    elif own is not None:
        warn_of_unapplied(own)
        read = [prompt.ids[: -len(begun)] or begun for prompt, begun in zip(prompts, ids, strict=True)]
        sampling, processors = row_processors(own, policy.model, sampling, config.max_new_tokens, ids, read)
        stop = time_limit(own)
        given = [Hooks(processor, stop) for processor in processors]
    else:
        given = [Hooks()] * len(prompts)
    strings = [stop_test(config.stop_strings, tokenizer, prompt) for prompt in ids]
    return sampling, [
        Hooks(hooks.processor, _either(string, hooks.stop)) for hooks, string in zip(given, strings, strict=True)
    ]


def _size(
    config: StarsConfig,
    prompts: Sequence[Prompt],
    variants: Sequence[Sequence[list[int]]],
    slots: Sequence[int],
    samples: int,
    reward_prompts: Sequence[RewardPrompt],
    beside: Sequence[Policy],
) -> Size:
    """Most of what the call takes at a time. ``variants`` are read in prompts' place, or beside them."""
    method = config.chosen_method
    width, longest = method.rows(config), config.max_new_tokens + method.scaffold(config)
    answers = len(prompts) * config.num_return_sequences
    pilots = len(prompts) * samples if config.target_reward is None and method.has_target else 0
    read = [[prompt.ids for prompt in prompts], *variants]
    return Size(
        length=max((len(ids) for texts in read for ids in texts), default=0) + longest,
        slots=max(slots, default=0),
        holders=max(answers if method.reserves else answers * width, pilots),
        rows=max(answers * width, pilots),
        segment_length=min(config.segment_length, config.max_new_tokens),
        max_new_tokens=config.max_new_tokens,
        prompts=reward_prompts,
        beside=beside,
    )


def _explicit_rule(config: StarsConfig, prompt: int) -> Rule:
    """The acceptance rule as the config states it; r0 stays open where it takes r(x) from the reward model."""
    target, empty = of_prompt(config.target_reward, prompt), of_prompt(config.base_reward, prompt)
    if target is None:
        raise ValueError("target_reward is None, and there is no pilot to take it from")
    base = None
    if empty is not None or config.alpha == 1.0 or math.isinf(target):
        base = base_reward(0.0 if empty is None else empty, target, config.alpha)
    return Rule(target, base, config.beta)


def _either(a: StopTest | None, b: StopTest | None) -> StopTest | None:
    if a is None or b is None:
        return a or b
    return lambda tokens: a(tokens) or b(tokens)

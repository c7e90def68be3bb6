"""One call of the engine: its arguments, checked before any work starts, and the requests they become."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch

from stars_fast.config import StarsConfig
from stars_fast.inputs.hooks import stop_test
from stars_fast.inputs.limits import check_prompt
from stars_fast.inputs.sampling import as_ids, resolve_sampling
from stars_fast.loop.pilot import Pilot
from stars_fast.loop.request import PromptNode, Request, StopTest
from stars_fast.methods.base import Method
from stars_fast.methods.numbers import integer, plain
from stars_fast.methods.persona import PersonaJudge
from stars_fast.methods.stars import base_reward
from stars_fast.notices import warn
from stars_fast.ops.philox import philox_key
from stars_fast.outputs import Stats
from stars_fast.policy.policy import Policy
from stars_fast.policy.steps import RowProcessor, Sampling
from stars_fast.rewards import Response, Reward, RewardPrompt
from stars_fast.text.prompts import Prompt, read_personas, read_prompts


@dataclass(frozen=True)
class Arguments:
    """What :meth:`StarsEngine.generate` and its kin were called with, as it came."""

    prompts: Any
    config: StarsConfig | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    attention_mask: torch.Tensor | None = None
    reward_prompts: Any = None
    columns: dict[str, Sequence[Any]] | None = None
    seed: int | Sequence[int] | None = None
    on_error: str = "return"
    # From inside transformers, per row of the output: further processing of logits, further reasons to stop.
    processor: Callable[[int], RowProcessor | None] = lambda row: None
    stop: Callable[[int], StopTest | None] = lambda row: None


class Rule(NamedTuple):
    """What a request's candidates are tested against."""

    target: float  # r_star
    base: float | None  # r0; None until r(x) is scored
    beta: float


UNGUIDED = Rule(-math.inf, -math.inf, 1.0)


@dataclass(eq=False)
class Call:
    """A checked call. Row ``i * num_return_sequences + j`` of the output is sample j of prompt i."""

    arguments: Arguments
    config: StarsConfig
    sampling: Sampling
    prompts: Sequence[Prompt]
    reward_prompts: Sequence[RewardPrompt]
    personas: Sequence[list[list[int]]]  # per prompt, its ids under further preferences
    keys: Sequence[int]  # of the random numbers, per row
    stops: Sequence[StopTest | None]  # per prompt, for the config's stop strings
    stats: Stats = field(default_factory=Stats)
    requests: list[Request] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Responses asked for."""
        return len(self.keys)

    def guided_requests(self, pilots: Sequence[Pilot] | None) -> list[Request]:
        """A request per row of the output, under its pilot's rule where targets are calibrated."""
        samples = self.config.num_return_sequences
        requests = []
        for i in range(len(self.prompts)):
            pilot = pilots[i] if pilots is not None else None
            rule = Rule(pilot.target, pilot.base, pilot.beta) if pilot else _explicit_rule(self.config, i)
            keys = self.keys[i * samples : (i + 1) * samples]
            for request in self._samples(i, keys, rule):
                if pilot is not None and pilot.error is not None:
                    request.error, request.finish_reason = pilot.error, "error"
                requests.append(request)
        return requests

    def pilot_requests(self, samples: int) -> list[Request]:
        """Unguided requests, on a random stream of their own that depends on the prompt's key alone."""
        requests = []
        for i in range(len(self.prompts)):
            key = self.keys[i * self.config.num_return_sequences]
            requests += self._samples(i, [philox_key(key, 0, j, domain=1) for j in range(samples)], UNGUIDED)
        return requests

    def _samples(self, prompt: int, keys: Sequence[int], rule: Rule) -> list[Request]:
        node = PromptNode(self.prompts[prompt].ids, self.reward_prompts[prompt], personas=self.personas[prompt])
        first_row = prompt * self.config.num_return_sequences
        return [
            Request(
                index=first_row + j,
                prompt_index=prompt,
                sample_index=j,
                prompt=node,
                key=key,
                target=rule.target,
                base=rule.base,
                beta=rule.beta,
                response=Response(node.reward_prompt),
                # A pilot has samples beyond the rows of the output; all samples of a prompt share its hooks.
                processor=self.arguments.processor(first_row),
                stop=_either(self.stops[prompt], self.arguments.stop(first_row)),
            )
            for j, key in enumerate(keys)
        ]


def prepare(arguments: Arguments, policy: Policy, reward: Reward, tokenizer: Any, kv_cache_tokens: int | None) -> Call:
    """Check every argument and read the prompts.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, the value, the prompt's index and the limit. Nothing has run when this raises.
    """
    config = arguments.config
    if config is not None and not isinstance(config, StarsConfig):
        raise TypeError(f"config is a {type(config).__name__}: give a StarsConfig")
    given = (config or StarsConfig()).replace(**arguments.overrides)
    if arguments.on_error not in ("return", "raise"):
        raise ValueError(f"on_error={arguments.on_error!r}: must be 'return' or 'raise'")
    method = given.chosen_method
    method.check(reward)
    config = method.rule(given)
    _warn_of_overruled(method, given, config)
    if method.segments().delimiter is not None and tokenizer is None:
        raise ValueError(
            f"method={method.name!r}: delimiter={method.segments().delimiter!r} needs a tokenizer: pass tokenizer=, "
            "or delimiter=None for steps of a fixed length"
        )
    sampling = resolve_sampling(config, policy.model, tokenizer)
    if config.eos_token_id is not None and max(eos := as_ids(config.eos_token_id), default=0) >= policy.vocab_size:
        raise ValueError(f"eos_token_id={max(eos)} lies outside the policy's vocabulary of {policy.vocab_size}")
    prompts = read_prompts(arguments.prompts, tokenizer, arguments.attention_mask)
    for name in ("target_reward", "base_reward"):
        if isinstance(value := getattr(given, name), tuple):
            _check_per_prompt(name, value, len(prompts), ": calibrated for other prompts?")
    personas = [list[list[int]]()] * len(prompts)
    if isinstance(method, PersonaJudge):
        _check_judgeable(method, sampling, arguments)
        bos = getattr(tokenizer, "bos_token_id", None)
        bos = policy.text_config.bos_token_id if bos is None else bos
        personas = read_personas(prompts, (method.judge_prompt, method.draft_prompt), tokenizer, bos)
    for index, (prompt, variants) in enumerate(zip(prompts, personas, strict=True)):
        check_prompt(index, prompt, variants, config, policy, kv_cache_tokens)
    columns = {} if arguments.columns is None else arguments.columns
    if not isinstance(columns, Mapping):
        raise TypeError(f"columns is a {type(columns).__name__}: give a mapping of name to one value per prompt")
    for name, values in columns.items():
        if name in ("prompts", "completions", "completion_ids"):
            raise ValueError(f"columns[{name!r}]: the reward is called with {name} of its own; rename the column")
        _check_per_prompt(f"columns[{name!r}]", values, len(prompts))
    reward_prompts = _reward_prompts(arguments.reward_prompts, prompts, columns, tokenizer)
    reward.check(reward_prompts, config.max_new_tokens, kv_cache_tokens)
    return Call(
        arguments=arguments,
        config=config,
        sampling=sampling,
        prompts=prompts,
        reward_prompts=reward_prompts,
        personas=personas,
        keys=_keys(_shared(arguments.seed, policy), len(prompts), config.num_return_sequences),
        stops=[stop_test(config.stop_strings, tokenizer, prompt.ids) for prompt in prompts],
    )


def _warn_of_overruled(method: Method, given: StarsConfig, ruled: StarsConfig) -> None:
    """Say it where a method decides a field itself that the caller has set."""
    for field_ in fields(StarsConfig):
        before, after = getattr(given, field_.name), getattr(ruled, field_.name)
        if before not in (field_.default, after):
            warn(f"method={method.name!r} sets {field_.name}={after} itself: {field_.name}={before} has no effect")


class _Unread:
    """Stands in for the policy's tokenizer: text and chats are checked for their form, and keep it."""

    bos_token = None

    def __call__(self, text: str, **kwargs: Any) -> dict[str, list[int]]:
        return {"input_ids": [0]}

    def apply_chat_template(self, messages: Any, **kwargs: Any) -> list[int]:
        return [0]


def _reward_prompts(
    given: Any, prompts: Sequence[Prompt], columns: Mapping[str, Sequence[Any]], tokenizer: Any
) -> list[RewardPrompt]:
    """The prompts as the reward sees them. What is given for it alone need not suit the policy's tokenizer."""
    argument = "prompts" if given is None else "reward_prompts"
    rewarded = prompts if given is None else read_prompts(given, _Unread(), name=argument)
    _check_per_prompt(argument, rewarded, len(prompts))
    warned: set[str] = set()
    return [
        RewardPrompt(
            index=index,
            source=prompt.source,
            given_ids=prompt.ids if given is None or prompt.source == prompt.ids else None,
            columns={name: values[index] for name, values in columns.items()},
            argument=argument,
            tokenizer=tokenizer,
            warned=warned,
        )
        for index, prompt in enumerate(rewarded)
    ]


def _check_judgeable(method: Method, sampling: Sampling, arguments: Arguments) -> None:
    """What changes a distribution by the text so far is not applied where drafts are judged."""
    if sampling.repetition_penalty != 1.0:
        raise ValueError(f"method={method.name!r} does not know repetition_penalty={sampling.repetition_penalty}")
    if arguments.processor(0) is not None:
        raise ValueError(f"method={method.name!r} does not know logits processors")


def _check_per_prompt(name: str, values: Any, prompts: int, guess: str = "") -> None:
    indexed = hasattr(values, "__getitem__") and hasattr(values, "__len__") and getattr(values, "ndim", 1) > 0
    if not indexed or isinstance(values, (str, Mapping)):
        raise TypeError(f"{name} is a {type(values).__name__}: give a sequence of one entry per prompt")
    if len(values) != prompts:
        raise ValueError(f"{name} has {len(values)} entries for {prompts} prompts{guess}")


def _shared(seed: Any, policy: Policy) -> Any:
    if seed is None and policy.sharded:
        raise ValueError("seed is None: a policy that is sharded over processes needs a seed that all of them share")
    return seed


def _keys(seed: Any, prompts: int, samples: int) -> list[int]:
    """Key of each output row's random numbers."""
    seed = plain(seed)
    if seed is None:
        seed = int(torch.randint(0, 2**63 - 1, (), device="cpu"))
    if not isinstance(seed, Sequence) or isinstance(seed, str):
        base = integer("seed", seed, hint=", or a sequence of one integer per prompt")
        return [philox_key(base, i, j) for i in range(prompts) for j in range(samples)]
    _check_per_prompt("seed", seed, prompts)
    seeds = [integer(f"seed[{i}]", one) for i, one in enumerate(seed)]
    return [philox_key(one, 0, j) for one in seeds for j in range(samples)]


def _explicit_rule(config: StarsConfig, prompt: int) -> Rule:
    """The acceptance rule as the config states it; r0 stays open where it takes r(x) from the reward model."""
    target, empty = _of_prompt(config.target_reward, prompt), _of_prompt(config.base_reward, prompt)
    if target is None:
        raise ValueError("target_reward is None, and there is no pilot to take it from")
    base = None
    if empty is not None or config.alpha == 1.0 or math.isinf(target):
        base = base_reward(0.0 if empty is None else empty, target, config.alpha)
    return Rule(target, base, config.beta)


def _of_prompt(value: Any, prompt: int) -> float | None:
    return value[prompt] if isinstance(value, tuple) else value


def _either(a: StopTest | None, b: StopTest | None) -> StopTest | None:
    if a is None or b is None:
        return a or b
    return lambda tokens: a(tokens) or b(tokens)


def read_pilot(requests: Sequence[Request], config: StarsConfig) -> Pilot:
    """Collect the partial rewards of one prompt's pilot responses; ``config`` is the caller's."""
    error = next((request.error for request in requests if request.error is not None), None)
    if error is not None:
        return Pilot(error=f"calibration: {error}")
    responses = []
    for request in requests:
        tokens, run = 0, []
        for segment in request.segments:
            tokens += len(segment.tokens)
            if not math.isnan(segment.reward):  # unfinished, under a method that scores finished answers only
                run.append((tokens, segment.reward))
        responses.append(run)
    pilot = Pilot(responses, _of_prompt(config.base_reward, requests[0].prompt_index))
    if not pilot.finals:
        pilot.error = "calibration: every pilot response has a reward of -inf"
    return pilot

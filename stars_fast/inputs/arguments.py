"""What the engine was called with, checked before any work starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig

from stars_fast.config import StarsConfig
from stars_fast.loop.request import StopTest
from stars_fast.methods.base import Method
from stars_fast.methods.numbers import integer, plain, shown
from stars_fast.notices import warn
from stars_fast.ops.philox import philox_key
from stars_fast.policy.leaf import RowProcessor, Sampling
from stars_fast.policy.policy import Policy
from stars_fast.rewards import RewardPrompt
from stars_fast.text.media import Media, forward_arguments, written_before
from stars_fast.text.personas import read_personas
from stars_fast.text.prompts import Prompt, gone_on_from, read_prompts, template_kwargs
from stars_fast.tree.media import placeholder_ids
from stars_fast.tree.model import TreeModel
from stars_fast.tree.support import unwrapped


class Hooks(NamedTuple):
    """What is done to a row beside sampling: further processing of logits, further reasons to stop."""

    processor: RowProcessor | None = None
    stop: StopTest | None = None


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
    chat_template_kwargs: Mapping[str, Any] | None = None
    trace: bool = False
    generation_config: GenerationConfig | None = None  # in place of the model's
    # From inside transformers, per row of the output: further processing of logits, further reasons to stop. They stand
    # in place of what the generation_config asks for.
    processor: Callable[[int], RowProcessor | None] | None = None
    stop: Callable[[int], StopTest | None] | None = None


def check_limits(
    prompts: Sequence[Prompt],
    preferred: Sequence[Sequence[list[int]]],
    slots: Sequence[int],
    config: StarsConfig,
    policy: Policy,
    kv_cache_tokens: int | None,
) -> None:
    """Raise ValueError where a prompt is too much for the policy or for the slots, by its index.

    ``preferred`` has per prompt its ids under each of the method's preferences, which stand in its place; ``slots``
    those that a request may take by itself.
    """
    pictures = frozenset(placeholder_ids(policy.model) if policy.takes_media else ())
    for index, (prompt, variants) in enumerate(zip(prompts, preferred, strict=True)):
        for ids, under in [(prompt.ids, ""), *((ids, ", under a preference,") for ids in variants)]:
            check_ids(index, ids, prompt.media, policy, "the policy's", under)
        if prompt.media is None and (unseen := pictures.intersection(prompt.ids)):
            warn(
                f"prompts[{index}] holds the id {min(unseen)}, which stands for a picture, and no picture: give a chat "
                "with its pictures, or all that the processor returned (pixel_values and what else there is)"
            )
        length = max(map(len, [written_before(prompt), *variants]))
        check_positions(index, length, config, policy, "the policy", " of its target" if policy.from_source else "")
        if kv_cache_tokens is not None and slots[index] > kv_cache_tokens:
            read = max(map(len, [prompt.ids, *variants]))
            raise ValueError(
                f"prompts[{index}] has {read} tokens and needs {slots[index]} slots with max_new_tokens="
                f"{config.max_new_tokens} and segment_length={config.segment_length}; kv_cache_tokens={kv_cache_tokens}"
            )


def check_ids(
    index: int, ids: Sequence[int], media: Media | None, model: TreeModel, whose: str, under: str = ""
) -> None:
    """Raise ValueError where a prompt has an id that the model cannot read."""
    bad = [token for token in ids if not 0 <= token < model.vocab_size]
    if bad and media is not None:  # some models name no row of their embeddings
        bad = sorted(set(bad).difference(placeholder_ids(model.model)))
    if bad:
        raise ValueError(f"prompts[{index}]{under} holds id {bad[0]}, outside {whose} vocabulary of {model.vocab_size}")


def check_positions(index: int, length: int, config: StarsConfig, model: TreeModel, role: str, of: str = "") -> None:
    """Raise ValueError where a prompt of so many tokens and its answer may outgrow the model's positions."""
    positions, scaffold = model.max_positions, config.chosen_method.scaffold(config)
    if positions is not None and length + config.max_new_tokens + scaffold > positions:
        beside = f" and up to {scaffold} tokens of the method's scaffold" if scaffold else ""
        raise ValueError(
            f"prompts[{index}] has {length} tokens{of}, which with max_new_tokens={config.max_new_tokens}{beside} "
            f"exceeds the limit of {role}'s {positions} positions"
        )


def check_media(index: int, media: Media | None, model: TreeModel, role: str) -> None:
    """Raise ValueError where the model does not read what a processor made of a prompt's pictures for the policy."""
    known = {"input_ids", "attention_mask", *forward_arguments(unwrapped(model.model))}
    if media is not None and (unread := media.inputs.keys() - known):
        raise ValueError(
            f"prompts[{index}] has pictures: its {', '.join(sorted(unread))} are nothing that {role}, a "
            f"{type(model.model).__name__}, reads"
        )


def warn_of_large_batches(prompts: Sequence[Prompt], samples: int, rows: int) -> None:
    """A batch that a processor made in one piece is read whole each time that some of its prompts are let in."""
    batch = max((len(prompt.media.inputs["input_ids"]) for prompt in prompts if prompt.media is not None), default=1)
    if batch > 1 and batch * samples > rows:
        warn(
            f"prompts: a processor's batch of {batch}, with num_return_sequences={samples}, is more than max_rows="
            f"{rows} at a time, and all of it is read again whenever others of it follow: give a list of what the "
            "processor makes of one prompt each"
        )


def warn_of_overruled(method: Method, given: StarsConfig, ruled: StarsConfig) -> None:
    """Say it where a method decides a field itself that the caller has set."""
    for field_ in fields(StarsConfig):
        before, after = getattr(given, field_.name), getattr(ruled, field_.name)
        if before not in (field_.default, after):
            warn(f"method={method.name!r} sets {field_.name}={after} itself: {field_.name}={before} has no effect")


def warn_of_idle(given: StarsConfig) -> None:
    """Say it where a target is given beside what stands in for one."""
    idle = ["fit"] if given.known is not None else []
    idle += ["acceptance"] if given.acceptance != StarsConfig().acceptance else []
    if idle:
        warn(f"target_reward={given.target_reward} leaves {' and '.join(idle)} without effect: give one of them")


def under_preferences(
    method: Method,
    prompts: Sequence[Prompt],
    arguments: Arguments,
    sampling: Sampling,
    hooks: Sequence[Hooks],
    policy: Policy,
    tokenizer: Any,
) -> Sequence[list[list[int]]]:
    """Per prompt its ids under each of the method's preferences; none where it has none.

    Raises
    ------
    ValueError
        For what changes a distribution by the text so far: it is not applied where drafts are judged.
    """
    if not method.preferences:
        return [list[list[int]]()] * len(prompts)
    if (place := next((i for i, prompt in enumerate(prompts) if prompt.media is not None), None)) is not None:
        raise ValueError(
            f"prompts[{place}] has pictures: method={method.name!r} puts its preferences before text and ids alone"
        )
    if sampling.repetition_penalty != 1.0:
        raise ValueError(f"method={method.name!r} does not know repetition_penalty={sampling.repetition_penalty}")
    if any(hook.processor is not None for hook in hooks):
        raise ValueError(
            f"method={method.name!r} does not know logits processors, the call's own or those of settings such as "
            "suppress_tokens of a generation_config (None goes on without)"
        )
    bos = getattr(tokenizer, "bos_token_id", None)
    bos = policy.text_config.bos_token_id if bos is None else bos
    return read_personas(prompts, method.preferences, tokenizer, bos, arguments.chat_template_kwargs)


class _Unread:
    """Stands in for the policy's tokenizer: text and chats are checked for their form, and keep it."""

    bos_token = None

    def __call__(self, text: str, **kwargs: Any) -> dict[str, list[int]]:
        return {"input_ids": [0]}

    def apply_chat_template(self, messages: Any, **kwargs: Any) -> list[int]:
        return [0]


def read_reward_prompts(arguments: Arguments, prompts: Sequence[Prompt], tokenizer: Any) -> list[RewardPrompt]:
    """The prompts as the reward sees them, with their columns.

    What is given for the reward alone need not suit the policy's tokenizer.
    """
    given, columns = arguments.reward_prompts, _columns(arguments.columns, len(prompts))
    argument = "prompts" if given is None else "reward_prompts"
    rewarded = prompts if given is None else read_prompts(given, _Unread(), name=argument)
    check_per_prompt(argument, rewarded, len(prompts))
    variables, warned = template_kwargs(arguments.chat_template_kwargs), set[str]()
    return [
        RewardPrompt(
            index=index,
            source=gone_on_from(prompt.source, prompts[index].ids, tokenizer),
            given_ids=prompt.ids if given is None or prompt.source == prompt.ids else None,
            columns={name: values[index] for name, values in columns.items()},
            argument=argument,
            tokenizer=tokenizer,
            warned=warned,
            chat_template_kwargs=variables,
            media=prompt.media,
        )
        for index, prompt in enumerate(rewarded)
    ]


def _columns(columns: Any, prompts: int) -> Mapping[str, Sequence[Any]]:
    columns = {} if columns is None else columns
    if not isinstance(columns, Mapping):
        raise TypeError(f"columns is a {type(columns).__name__}: give a mapping of name to one value per prompt")
    for name, values in columns.items():
        if not isinstance(name, str):
            raise TypeError(f"columns has the key {shown(name)}: the reward is called with them by name, give strings")
        if name in ("prompts", "completions", "completion_ids"):
            raise ValueError(f"columns[{name!r}]: the reward is called with {name} of its own; rename the column")
        check_per_prompt(f"columns[{name!r}]", values, prompts)
    return columns


def check_per_prompt(name: str, values: Any, prompts: int, guess: str = "") -> None:
    """Raise TypeError or ValueError for anything but a sequence of one entry per prompt."""
    indexed = hasattr(values, "__getitem__") and hasattr(values, "__len__") and getattr(values, "ndim", 1) > 0
    if not indexed or isinstance(values, (str, Mapping)):
        raise TypeError(f"{name} is a {type(values).__name__}: give a sequence of one entry per prompt")
    if len(values) != prompts:
        raise ValueError(f"{name} has {len(values)} entries for {prompts} prompts{guess}")


def read_keys(seed: Any, prompts: int, samples: int, sharded: bool) -> list[int]:
    """Key of each output row's random numbers."""
    if seed is None and sharded:
        raise ValueError("seed is None: a policy that is sharded over processes needs a seed that all of them share")
    seed = plain(seed)
    if seed is None:
        seed = int(torch.randint(0, 2**63 - 1, (), device="cpu"))
    if not isinstance(seed, Sequence) or isinstance(seed, str):
        base = integer("seed", seed, hint=", or a sequence of one integer per prompt")
        return [philox_key(base, i, j) for i in range(prompts) for j in range(samples)]
    check_per_prompt("seed", seed, prompts)
    seeds = [integer(f"seed[{i}]", one) for i, one in enumerate(seed)]
    return [philox_key(one, 0, j) for one in seeds for j in range(samples)]

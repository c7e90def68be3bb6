"""The guides of a call: models whose logits are mixed with the policy's, and what each reads in a prompt's place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from stars_fast.config import StarsConfig
from stars_fast.inputs.arguments import Arguments, check_ids, check_media, check_positions
from stars_fast.methods import Guide
from stars_fast.policy.mixed import read_at
from stars_fast.policy.policy import Policy
from stars_fast.text.media import forward_arguments
from stars_fast.text.pictures import refilled
from stars_fast.text.prompts import Messages, Prompt, read_prompts
from stars_fast.tree.support import unwrapped


@dataclass(frozen=True)
class Guidance:
    """Guides of a call. Without any, all is as for the policy alone."""

    policy: Policy
    guides: tuple[Policy, ...]
    weights: tuple[float, ...]  # the policy's, and each guide's
    prompts: Sequence[Sequence[Prompt]]  # per prompt what each guide reads

    @property
    def copies(self) -> int:
        """How often an answer lies in the tree that has it most often."""
        return max(map(len, self._places()))

    @property
    def beside(self) -> Sequence[Policy]:
        """Models with trees of their own."""
        return [model for model in dict.fromkeys(self.guides) if model is not self.policy]

    def slots(self, index: int, ids: Sequence[int]) -> int:
        """What a prompt takes in the tree where it takes most."""
        lengths = [len(ids), *(len(prompt.ids) for prompt in self.prompts[index])]
        return max(sum(lengths[place] for place in own) for own in self._places())

    def _places(self) -> Sequence[list[int]]:
        return list(read_at((self.policy, *self.guides)).values())


def read_guides(
    config: StarsConfig,
    prompts: Sequence[Prompt],
    arguments: Arguments,
    policy: Policy,
    tokenizer: Any,
    processor: Any,
    guide: Callable[[Any, str], Policy],
) -> Guidance:
    """Load the guides of a configuration's method, and read the prompts as each of them sees them.

    Parameters
    ----------
    guide : callable
        The guide that a model, path, hub id or None stands for; also given what error messages call it.

    Raises
    ------
    ValueError, TypeError
        For a guide on another device or with another vocabulary, and for what a prompt transform raises or returns,
        by the guide's place and the prompt's index.
    """
    asked: Sequence[Guide] = config.whole_method.guides
    names = [f"guide models[{place}]" for place in range(len(asked))]
    guides = tuple(guide(one.model, name) for one, name in zip(asked, names, strict=True))
    read = []
    for name, one, model in zip(names, asked, guides, strict=True):
        if model.device != policy.device:
            raise ValueError(f"{name} is on {model.device}, and the policy on {policy.device}: put them on one device")
        known = forward_arguments(unwrapped(model.model))
        how = {"chat_template_kwargs": arguments.chat_template_kwargs, "processor": processor, "takes": known}
        texts = _read(name, one.prompt_transform, prompts, tokenizer, max_positions=model.max_positions, **how)
        for index, text in enumerate(texts):
            check_ids(index, text.ids, text.media, model, f"{name}'s")
            check_media(index, text.media, model, name)
            check_positions(index, len(text.ids), config, model, name)
        read.append(texts)
    if not asked:
        return Guidance(policy, (), (1.0,), [()] * len(prompts))
    weights = (config.whole_method.own_weight, *(one.weight for one in asked))
    return Guidance(policy, guides, weights, list(zip(*read, strict=True)))


def _read(
    name: str, transform: Callable[[Any], Any] | None, prompts: Sequence[Prompt], tokenizer: Any, **how: Any
) -> Sequence[Prompt]:
    """The prompts as they are after ``transform``."""
    if transform is None or not prompts:
        return prompts

    def transformed(index: int) -> Any:
        try:
            return transform(_given(prompts[index]))
        except Exception as error:
            raise ValueError(
                f"{name}: prompt_transform raised {type(error).__name__} for prompts[{index}]: {error}"
            ) from error

    media = prompts[0].media
    whole = media is not None and len(media.inputs["input_ids"]) > 1  # a processor's, of all prompts in one piece
    given = transformed(0) if whole else [transformed(index) for index in range(len(prompts))]
    read = read_prompts(given, tokenizer, name=f"{name}: prompts", **how)
    if len(read) != len(prompts):
        raise ValueError(f"{name}: prompt_transform made {len(read)} prompts of a batch of {len(prompts)}")
    return read


class Pictured(dict[str, Any]):
    """What a processor made of a prompt with pictures, or of a batch of them."""

    chat: Messages | None = None  # what the engine's processor made it of, with its pictures


def _given(prompt: Prompt) -> Any:
    """A prompt for a function, which may change it without changing what others read."""
    media = prompt.media
    if media is None:
        return copy.deepcopy(prompt.source)
    inputs = Pictured((name, value.clone()) for name, value in media.inputs.items())
    if media.images:
        inputs.chat = refilled(cast(Messages, prompt.source), copy.deepcopy(media.images))
    return inputs

"""The guides of a call: models whose logits are mixed with the policy's, and what each reads in a prompt's place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from stars_fast.inputs.arguments import Arguments, check_ids, check_positions
from stars_fast.methods import Guide, Method
from stars_fast.policy.mixed import places
from stars_fast.policy.policy import Policy
from stars_fast.text.prompts import Prompt, read_prompts


@dataclass(frozen=True)
class Guidance:
    """Guides of a call. Without any, all is as for the policy alone."""

    policy: Policy
    guides: tuple[Policy, ...]
    weights: tuple[float, ...]  # the policy's, and each guide's
    prompts: Sequence[Sequence[list[int]]]  # per prompt what each guide reads

    @property
    def copies(self) -> int:
        """How often an answer lies in the tree that has it most often."""
        return max(map(len, self._places()))

    def slots(self, index: int, ids: Sequence[int]) -> int:
        """What a prompt takes in the tree where it takes most."""
        texts = [ids, *self.prompts[index]]
        return max(sum(len(texts[place]) for place in own) for own in self._places())

    @property
    def beside(self) -> Sequence[Policy]:
        """Models with trees of their own."""
        return [model for model in dict.fromkeys(self.guides) if model is not self.policy]

    def _places(self) -> Sequence[list[int]]:
        return list(places((self.policy, *self.guides)).values())


def read_guides(
    method: Method,
    prompts: Sequence[Prompt],
    arguments: Arguments,
    policy: Policy,
    tokenizer: Any,
    guide: Callable[[Any, str], Policy],
    max_new_tokens: int,
) -> Guidance:
    """Load a method's guides, and read the prompts as each of them sees them.

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
    asked: Sequence[Guide] = method.guides
    names = [f"guide models[{place}]" for place in range(len(asked))]
    guides = tuple(guide(one.model, name) for one, name in zip(asked, names, strict=True))
    for one, name in zip(guides, names, strict=True):
        if one.device != policy.device:
            raise ValueError(
                f"{name} is on {one.device}, and the policy on {policy.device}: every step reads both, put them on one"
            )
    read = [
        _read(name, one, prompts, arguments, model, tokenizer)
        for name, one, model in zip(names, asked, guides, strict=True)
    ]
    for name, model, texts in zip(names, guides, read, strict=True):
        for index, ids in enumerate(texts):
            check_ids(index, ids, model, f"{name}'s")
            check_positions(index, len(ids), max_new_tokens, model, name)
    weights = tuple(one.weight for one in asked)
    by_prompt = list(zip(*read, strict=True)) if read else [()] * len(prompts)
    return Guidance(policy, guides, (method.own_weight, *weights) if asked else (1.0,), by_prompt)


def _read(
    name: str, guide: Guide, prompts: Sequence[Prompt], arguments: Arguments, model: Policy, tokenizer: Any
) -> list[list[int]]:
    if guide.prompt_transform is None:
        return [prompt.ids for prompt in prompts]
    given = []
    for index, prompt in enumerate(prompts):
        try:
            given.append(guide.prompt_transform(copy.deepcopy(prompt.source)))
        except Exception as error:
            raise ValueError(
                f"{name}: prompt_transform raised {type(error).__name__} for prompts[{index}]: {error}"
            ) from error
    texts = read_prompts(
        given,
        tokenizer,
        name=f"{name}: prompts",
        chat_template_kwargs=arguments.chat_template_kwargs,
        max_positions=model.max_positions,
    )
    return [text.ids for text in texts]

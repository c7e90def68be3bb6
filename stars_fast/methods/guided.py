"""Several models that draw together: their logits are added up, and one token is drawn for all."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, cast

from stars_fast.methods.base import Method, method_from
from stars_fast.methods.numbers import real, shown


class Guide(NamedTuple):
    """A model whose logits are added to the policy's."""

    model: Any  # a model, path or hub id; None for the policy itself
    weight: float
    prompt_transform: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class Guided(Method):
    """Candidates that the policy and guides draw together; another method decides about them.

    At every step the next token's logits are ``weight * policy + sum_i weight_i * model_i``, each model reading the
    text so far below its own prompt. Temperature, filters, penalty and logits processors apply to that sum, and one
    token is drawn for all: its law is exactly the softmax. Adding up log-probabilities instead gives the same law,
    since they differ from logits by a constant per model and step. ``logprobs`` of the output stay the policy's own;
    ``sampling_logprobs`` are those of the mix.

    Parameters
    ----------
    models : sequence of (model, weight) or (model, weight, prompt_transform)
        ``model`` is a transformers causal LM with the policy's vocabulary, on its device, a path or a hub id; None is
        the policy itself, whose weights are not loaded twice. ``weight`` is any finite number. ``prompt_transform``
        takes a prompt as it was given (text, a chat, ids) and returns what this model reads in its place, in any form
        that prompts have. A prompt with pictures is handed over as what the processor made of it, a mapping whose
        ``chat`` is what the engine's processor made it of, if it did.
    weight : float
        Of the policy's logits.
    method : str, mapping or Method
        What decides about the candidates: any method that draws them.

    Notes
    -----
    With two models: TITA (arXiv 2510.21794), whose code draws from ``0.7 policy + 0.3 guide``; GenARM (2410.08193);
    DExperts (2105.03023); proxy tuning (2401.08565); visual contrastive decoding (2311.16922); classifier-free guidance
    (2306.17806). docs/methods.md has a line for each.
    """

    name: ClassVar[str] = "guided"
    drawn: ClassVar[bool] = False
    known: ClassVar[Mapping[str, type[Method]]]  # methods by name
    models: Sequence[tuple[Any, float] | tuple[Any, float, Callable[[Any], Any] | None]] = ()
    weight: float = 1.0
    method: Any = "vanilla"

    def __post_init__(self) -> None:
        self._check_real("weight", -float("inf"), open_below=True, open_above=True)
        if isinstance(self.models, (str, Mapping)) or not isinstance(self.models, Sequence) or not self.models:
            raise ValueError(
                f"guided: models={shown(self.models)} must be a sequence, not empty, of (model, weight) or (model, "
                "weight, prompt_transform)"
            )
        object.__setattr__(self, "models", tuple(_guide(i, one) for i, one in enumerate(self.models)))
        chosen = method_from(self.method, self.known)
        if not chosen.drawn:
            raise ValueError(
                f"guided: method={chosen.name!r} does not draw its candidates from one law: give one that does, such "
                "as 'vanilla', 'stars' or 'best_of_n'"
            )
        object.__setattr__(self, "method", chosen)

    @property
    def guides(self) -> Sequence[Guide]:
        return cast(Sequence[Guide], self.models)

    @property
    def own_weight(self) -> float:
        return self.weight

    @property
    def selection(self) -> Method:
        return cast(Method, self.method)

    def selecting(self, method: Method) -> Method:
        return replace(self, method=method)

    def to_dict(self) -> dict[str, Any]:
        for place, (model, _, transform) in enumerate(self.guides):
            for name, value in (("", model), ("'s prompt_transform", transform)):
                if not isinstance(value, (str, type(None))):
                    raise ValueError(
                        f"method={self.name!r}: models[{place}]{name} is a {type(value).__name__}, which cannot be "
                        "saved: give a path or hub id, and no function, or leave it out and set it after loading"
                    )
        models = [[model, weight, None] for model, weight, _ in self.guides]
        return {"name": self.name, "models": models, "weight": self.weight, "method": self.selection.to_dict()}


def _guide(place: int, given: Any) -> Guide:
    name = f"guided: models[{place}]"
    if isinstance(given, (str, Mapping)) or not isinstance(given, Sequence) or not 2 <= len(given) <= 3:
        raise TypeError(f"{name}={shown(given)} must be (model, weight) or (model, weight, prompt_transform)")
    model, weight, transform = (*given, None)[:3]
    if isinstance(model, os.PathLike):
        model = os.fspath(model)
    if isinstance(model, type) or not (model is None or isinstance(model, str) or hasattr(model, "config")):
        raise TypeError(f"{name}: {shown(model)} must be a causal LM, a path, a hub id, or None for the policy")
    if transform is not None and not callable(transform):
        raise TypeError(f"{name}: prompt_transform={shown(transform)} must be a function of a prompt, or None")
    return Guide(model, real(f"{name}: weight", weight, open_below=True, open_above=True), transform)

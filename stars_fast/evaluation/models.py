"""The models of a recipe, and an engine for each method: most follow the guide, some want models of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stars_fast.engine import StarsEngine
from stars_fast.evaluation.recipe import Recipe
from stars_fast.inputs.functions import file_of, load_function
from stars_fast.inputs.models import Device, load_classifier, load_policy, load_reward
from stars_fast.rewards import ImplicitReward, Reward


class Models:
    """Loads what a recipe names, once, when it is asked for.

    The recipe has policy, guide and judge; dtype and device of all are as in
    :func:`stars_fast.inputs.models.load_policy`.
    """

    def __init__(self, recipe: Recipe, dtype: str, device: Device) -> None:
        assert recipe.policy is not None and recipe.guide is not None and recipe.judge is not None
        self.recipe, self.dtype, self.device = recipe, dtype, device
        self.policy, self.tokenizer, self.processor = load_policy(recipe.policy, None, device, dtype)
        self.guide, self.judge = self._scorer(recipe.guide), self._scorer(recipe.judge)

    def engine(self, method: str) -> StarsEngine:
        """The engine that runs a method: TreeBoN follows the implicit reward where the recipe has an aligned model."""
        return self._implicit if method == "treebon" and self.recipe.aligned is not None else self._guided

    def parameters(self, methods: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The recipe's parameters of methods, and the models among them.

        Raises
        ------
        ValueError
            For a method that needs a model the recipe lacks.
        """
        parameters = {name: dict(values) for name, values in (self.recipe.parameters or {}).items()}
        if "rsd" in methods:
            draft = self._needed("rsd", "draft")
            parameters.setdefault("rsd", {})["draft"] = load_policy(draft, None, self.device, self.dtype)[0]
        if "mara" in methods:
            probe = load_probe(Path(self._needed("mara", "probe"))).to(self.policy.device)
            parameters.setdefault("mara", {})["mlp"] = probe
        return parameters

    def _needed(self, method: str, name: str) -> str:
        value: str | None = getattr(self.recipe, name)
        if value is None:
            raise ValueError(f"method {method!r} needs a model: give `{name}:` in the recipe")
        return value

    def _scorer(self, name: str) -> Reward:
        if file_of(name) is not None:
            return load_reward(load_function(name), self.tokenizer, None, "auto", self.policy)
        model, tokenizer = load_classifier(name, None, self.device, self.dtype)
        return load_reward(model, self.tokenizer, tokenizer, "auto", self.policy)

    @cached_property
    def _guided(self) -> StarsEngine:
        return StarsEngine(self.policy, self.guide, tokenizer=self.tokenizer, processor=self.processor)

    @cached_property
    def _implicit(self) -> StarsEngine:
        assert self.recipe.aligned is not None
        aligned, *_ = load_policy(self.recipe.aligned, None, self.device, self.dtype)
        reward = ImplicitReward(aligned, self.policy, weights="1/k")
        return StarsEngine(self.policy, reward, tokenizer=self.tokenizer, processor=self.processor)


def load_probe(path: Path) -> nn.Sequential:
    """Linear layers with ReLU between them, from safetensors named as ``torch.nn.Sequential`` names them.

    Raises
    ------
    OSError, ValueError
        For a file that cannot be read, or holds something else.
    """
    from safetensors.torch import load_file

    state: Mapping[str, torch.Tensor] = load_file(path)
    weights = {int(name.partition(".")[0]): value for name, value in state.items() if name.endswith(".weight")}
    layers: list[nn.Module] = []
    for place in sorted(weights):
        layers += [nn.Linear(weights[place].shape[1], weights[place].shape[0]), nn.ReLU()]
    probe = nn.Sequential(*layers[:-1])
    probe.load_state_dict(state)
    return probe.eval()

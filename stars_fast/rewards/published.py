"""Published reward models whose heads are their own, as far as their code is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from stars_fast.methods.numbers import integer, plain, shown
from stars_fast.rewards.base import Completion, RewardPrompt, check_model
from stars_fast.rewards.base_rendered import RenderedReward
from stars_fast.rewards.cache import Row, Text, TreeCache
from stars_fast.rewards.classifier import ClassifierReward
from stars_fast.rewards.render import Context, Rendering
from stars_fast.tree.check import checked
from stars_fast.tree.model import TreeModel
from stars_fast.tree.support import unwrapped

# Llama 3's <|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n: the user's turn ends and the answer begins.
ARMORM_GATING_TOKENS = (128009, 128006, 78191, 128007, 271)


class InternLM2Reward(ClassifierReward):
    """InternLM2's reward models (1.8B, 7B, 20B): the value of ``v_head`` at a token that is put behind the answer.

    The published code reads the chat template's text and then ``config.reward_token_id``. It is loaded with
    ``AutoModel.from_pretrained(..., trust_remote_code=True)``. Its attention does not go through transformers'
    attention interface, so candidates are scored in full, with one warning; a model of the same shape on transformers'
    attention is scored incrementally. There is one beginning-of-sequence token, the template's, as where the text is
    encoded without special tokens; that this is what the published ``get_score`` does was not checked against its code.

    Parameters
    ----------
    model : transformers model with a ``v_head`` and ``config.reward_token_id``
    tokenizer : transformers tokenizer or "policy", optional
        As that of :class:`ClassifierReward`.

    Raises
    ------
    ValueError
        For a model without ``config.reward_token_id``.
    """

    head_name = "v_head"

    def __init__(self, model: PreTrainedModel, tokenizer: Any = None) -> None:
        super().__init__(model, tokenizer)

    def _check_labels(self, model: PreTrainedModel) -> None:
        token = getattr(model.config, "reward_token_id", None)
        if token is None:
            raise ValueError(f"{type(model).__name__} has no config.reward_token_id: it is none of InternLM2's")
        self.reward_token_id = int(token)

    def _probe(self) -> list[int]:
        return [*super()._probe(), self.reward_token_id]

    def context(self, prompt: RewardPrompt) -> Context:
        context = super().context(prompt)
        context.tail = [*context.tail, self.reward_token_id]
        return context


class ArmoRMReward(RenderedReward):
    """ArmoRM (RLHFlow/ArmoRM-Llama3-8B-v0.1): attribute rewards, weighted by a gate that has read the prompt.

    ``sum_a gating_a (rewards @ reward_transform_matrix)_a``: ``rewards`` are ``regression_layer``'s values at the last
    token, ``gating`` reads the hidden state at the first of the tokens between prompt and answer. Nothing behind that
    token reaches it, so it is read once per prompt.

    The published file imports names that transformers 5 no longer has; any class with these four parts will do. The
    shapes and the arithmetic are those of that file. Its own comparison with published scores was not possible here.

    Parameters
    ----------
    model : transformers model with a base model, ``regression_layer``, ``gating`` and ``reward_transform_matrix``
    tokenizer : transformers tokenizer or "policy", optional
        The reward model's, with its chat template; "policy": it reads the policy's ids, which must be a rendered chat.
        None: as that of :class:`ClassifierReward`.
    gating_tokens : sequence of int
        The ids between prompt and answer, at the first of which the gate reads.

    Raises
    ------
    ValueError
        For a model without one of those parts; at a call, for a prompt without the gating tokens.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any = None, *, gating_tokens: Sequence[int] = ARMORM_GATING_TOKENS
    ) -> None:
        check_model("model", model)
        self.model: Any = unwrapped(model)  # of a class that is not transformers'
        base = getattr(self.model, self.model.base_model_prefix, None)
        parts = ("regression_layer", "gating", "reward_transform_matrix")
        missing = [name for name in parts if getattr(self.model, name, None) is None]
        if base is None or missing:
            raise ValueError(
                f"{type(model).__name__} is not shaped as ArmoRM: it lacks {', '.join(missing) or 'a base'}"
            )
        self._read_with(tokenizer, "tokenizer", model)
        if not isinstance(plain(gating_tokens), Sequence) or isinstance(gating_tokens, (str, bytes)):
            raise TypeError(f"gating_tokens={shown(gating_tokens)} must be a sequence of ids")
        self.gating_tokens = [
            integer(f"gating_tokens[{place}]", token, 0) for place, token in enumerate(plain(gating_tokens))
        ]
        self._gates: dict[RewardPrompt, torch.Tensor] = {}  # [A]
        self._start([TreeCache(checked(TreeModel(self.model, base, "reward")))])

    def make_rendering(self, policy_tokenizer: Any) -> Rendering:
        return Rendering(self.tokenizer, policy_tokenizer, "auto")

    def forget(self, prompts: Sequence[RewardPrompt]) -> None:
        super().forget(prompts)
        for prompt in prompts:
            self._gates.pop(prompt, None)

    def end(self) -> None:
        super().end()
        if not self._calls:
            self._gates.clear()

    def context(self, prompt: RewardPrompt) -> Context:
        context = super().context(prompt)
        if self._gate_position(context) < 0:
            raise ValueError(
                f"{prompt.name} does not hold the tokens {self.gating_tokens} at which ArmoRM's gate reads it: "
                "give its tokenizer with Llama 3's chat template, or the tokens as gating_tokens="
            )
        return context

    def _gate_position(self, context: Context) -> int:
        """Where the last gating tokens of the prompt begin; -1 if there are none."""
        ids, width = context.prefix, len(self.gating_tokens)
        starts = range(len(ids) - width, -1, -1)
        return next((start for start in starts if ids[start : start + width] == self.gating_tokens), -1)

    def trunk(self, context: Context) -> list[int]:
        return context.prefix[: self._gate_position(context)]  # what follows is read with the first answers

    def text(self, completion: Completion) -> Text:
        text, prompt = super().text(completion), completion.response.prompt
        last = len(text.ids) + len(text.tail) - 1
        gate = [] if prompt in self._gates else [self._gate_position(self._contexts[prompt])]
        return text._replace(wanted=[*gate, last])

    def read(self, texts: Sequence[Text], rows: Sequence[Row], features: torch.Tensor) -> torch.Tensor:
        lasts, gates, place = [], [], 0
        for row in rows:
            prompt = texts[row.place].completion.response.prompt
            if prompt not in self._gates:
                self._gates[prompt] = self.model.gating(features[place : place + 1])[0]
            place += len(row.positions)
            lasts.append(place - 1)
            gates.append(self._gates[prompt])
        rewards = self.model.regression_layer(features[lasts]) @ self.model.reward_transform_matrix  # [R, A]
        scores: torch.Tensor = (torch.stack(gates) * rewards).sum(-1).float()
        return scores

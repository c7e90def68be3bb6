"""Published reward models whose heads are their own, as far as their code is known."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import cached_file

from stars_fast.methods.numbers import integer, plain, shown
from stars_fast.rewards.base import Completion, RewardPrompt, changed, check_model
from stars_fast.rewards.base_rendered import RenderedReward
from stars_fast.rewards.cache import Row, Text, TreeCache
from stars_fast.rewards.classifier import ClassifierReward
from stars_fast.rewards.ids import POLICYS
from stars_fast.rewards.render import Context, Rendering
from stars_fast.text.prompts import template_kwargs
from stars_fast.text.tokenizers import named_processor, named_tokenizer, tokenizer_beside
from stars_fast.tree.attention import evaluating
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

    def text(self, completion: Completion) -> Text:
        text = super().text(completion)
        # Where the template has ended the answer otherwise than it ends others, that is part of its ids.
        return text if text.tail else text._replace(tail=[self.reward_token_id])


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
        if prompt.media is not None:
            raise ValueError(f"{prompt.name} has pictures, and ArmoRM's gate reads text alone")
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


class ValueHeadReward(RenderedReward):
    """A language model with trl's value head, read at the last token: Skywork-VL-Reward-7B, LLaMA-Factory's rewards.

    What is read is the value of ``v_head.summary`` at the last hidden state behind the rendered conversation, in the
    head's own precision, as trl's ``AutoModelForCausalLMWithValueHead`` gives it. Its comparison with published scores
    was not possible here.

    Parameters
    ----------
    model : transformers model with a base model
        Of text, or of pictures and text.
    head : torch.nn.Module
        From hidden states ``[n, H]`` to values ``[n, 1]``; in evaluation mode while it is asked.
    tokenizer, tail, chat_template_kwargs, processor
        As those of :class:`ClassifierReward`.

    Raises
    ------
    ValueError, TypeError
        For what is no model, and a head that gives other than one value.
    NotImplementedError
        For a model whose keys and values cannot be kept in a tree, by name.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        head: nn.Module,
        tokenizer: Any = None,
        tail: str | Sequence[int] = "auto",
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        processor: Any = None,
    ) -> None:
        check_model("model", model)
        inner = unwrapped(model)
        base = getattr(inner, inner.base_model_prefix, None)
        if base is None:
            raise ValueError(f"{type(model).__name__} has no base model for a value head")
        self._read_with(tokenizer, "tokenizer", model, processor=processor)
        self._tail, self._variables = tail, template_kwargs(chat_template_kwargs)
        self._changed = changed(tail=(plain(tail), "auto"), chat_template_kwargs=(self._variables, {}))
        tree = checked(TreeModel(inner, base, "reward"))
        self.head = head.to(tree.device)
        self._dtype = next(head.parameters()).dtype
        self.beside = [head]
        with torch.no_grad(), evaluating(head):
            values = head(torch.zeros(1, tree.text_config.hidden_size, dtype=self._dtype, device=tree.device))
        if values.shape != (1, 1):
            raise ValueError(f"head gives values of shape {list(values.shape)} for one hidden state: must be [1, 1]")
        self._start([TreeCache(tree)])

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        tokenizer: Any = None,
        *,
        device: Any = None,
        dtype: Any = "auto",
        processor: Any = None,
        **options: Any,
    ) -> ValueHeadReward:
        """The model in a folder or repository, its processor (or tokenizer), and the head beside its weights.

        Parameters
        ----------
        name : str
            Holds ``v_head.summary.weight`` in ``value_head.safetensors`` or among the model's own weights.
        tokenizer : transformers tokenizer, path, hub id or "policy", optional
            Default: the processor's; of a model of text, the one there.
        device, dtype
            Of the model; default: the CPU, and the weights'. The head keeps its dtype.
        processor : transformers processor, path or hub id, optional
            Default, where no tokenizer is given: the one there, of a model that sees pictures.
        **options
            As :class:`ValueHeadReward` takes them.

        Raises
        ------
        ValueError
            Where there is no such head.
        OSError, ValueError
            As transformers says, for what it cannot load.
        """
        head = _value_head(name)
        config = AutoConfig.from_pretrained(name)
        made_as = getattr(transformers, (config.architectures or [""])[0], AutoModelForCausalLM)
        model: Any = made_as.from_pretrained(name, dtype=dtype)
        model = model.to(device or "cpu").eval()
        if processor is None and tokenizer is None:
            processor = name if hasattr(config, "vision_config") else None
            tokenizer = tokenizer_beside(name, "tokenizer") if processor is None else None
        elif tokenizer != POLICYS:
            tokenizer = named_tokenizer("tokenizer", tokenizer)
        return cls(model, head, tokenizer, processor=named_processor(processor), **options)

    def make_rendering(self, policy_tokenizer: Any) -> Rendering:
        return Rendering(self.tokenizer, policy_tokenizer, self._tail, self._variables, self.processor)

    def read(self, texts: Sequence[Text], rows: Sequence[Row], features: torch.Tensor) -> torch.Tensor:
        values: torch.Tensor = self.head(features.to(self._dtype))
        return values[:, 0].float()


def _value_head(name: str) -> nn.Linear:
    """trl's ``v_head.summary``, wherever a folder or repository has it."""
    weight, bias = "v_head.summary.weight", "v_head.summary.bias"

    def file(called: str) -> str | None:
        found: str | None = cached_file(name, called, _raise_exceptions_for_missing_entries=False)
        return found

    index = file("model.safetensors.index.json")
    shard = json.loads(Path(index).read_text())["weight_map"].get(weight) if index else "model.safetensors"
    for path in (file("value_head.safetensors"), shard and file(shard)):
        if path is None:
            continue
        with safe_open(path, framework="pt") as tensors:
            if weight in tensors.keys():  # noqa: SIM118 (it is no mapping)
                found = {key: tensors.get_tensor(key) for key in (weight, bias) if key in tensors.keys()}  # noqa: SIM118
                head = nn.Linear(found[weight].shape[1], 1, bias=bias in found, dtype=found[weight].dtype)
                head.load_state_dict({key.removeprefix("v_head.summary."): one for key, one in found.items()})
                return head.requires_grad_(False)
    raise ValueError(f"{name!r} has no {weight}, in value_head.safetensors or among its weights: it has no value head")

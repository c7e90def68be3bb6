"""Sequence-classification reward models, scored incrementally over a tree of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from stars_fast.methods.numbers import plain
from stars_fast.notices import warn
from stars_fast.rewards.base import Completion, RewardPrompt, changed, check_model
from stars_fast.rewards.base_rendered import RenderedReward
from stars_fast.rewards.cache import Row, Text, TreeCache
from stars_fast.rewards.pairs import Pairs, makes_pairs
from stars_fast.rewards.render import Rendering
from stars_fast.text.prompts import template_kwargs
from stars_fast.tree.attention import evaluating, is_causal, own_dtypes
from stars_fast.tree.check import checked
from stars_fast.tree.lack import is_lack_of_memory
from stars_fast.tree.model import TreeModel
from stars_fast.tree.support import refuse_dynamic_rope, refuse_offloaded, unwrapped, vocabulary

AS_CAUSAL = "a causal LM scores as JudgeReward or ImplicitReward of stars_fast.rewards"
ONE_LABEL = f"a reward model has exactly 1 ({AS_CAUSAL})"
# Tokens of one forward pass where rows are scored whole, as far as one row allows.
_MAX_TOKENS = 16384


class ClassifierReward(RenderedReward):
    """A transformers sequence-classification model with one label.

    Causal models are scored incrementally: prompt and accepted text are encoded once, a candidate costs its own tokens
    and the tail. The score is the head's value at the last token, found by length and never by looking for padding.
    Bidirectional models, those that make more of their head's value, and families the attention interface does not
    reach are scored in full, with one warning.

    Parameters
    ----------
    model : transformers ``...ForSequenceClassification`` with ``num_labels == 1``
    tokenizer : transformers tokenizer or "policy", optional
        The reward model's; "policy": it reads the policy's ids. None: the one that lies where the model was loaded
        from; :func:`stars_fast.rewards.ids.reading` says what where there is none. With a chat template, prompts are
        rendered with it.
    policy_tokenizer : transformers tokenizer, optional
        None: the engine's. Where its vocabulary differs from ``tokenizer``'s, answers are re-tokenised, and what is in
        the tree is kept up to the longest common token prefix.
    tail : "auto", "template", "none" or sequence of int
        What follows the answer when it is scored: the chat template's ("auto": if there is one), nothing, or these ids.
    chat_template_kwargs : mapping, optional
        Variables for the reward model's chat template. What is left open is as in the call.
    processor : transformers processor, optional
        The reward model's, for prompts with pictures; its tokenizer is ``tokenizer`` where none is given. Without one,
        pictures are read as the policy reads them, where ids are shared.
    pairs : bool, optional
        Whether the model was trained on ``tokenizer(question, answer)`` instead of one text; it is scored in full then.
        None: on one text, with a warning where the tokenizer makes pairs and the model is bidirectional.

    Raises
    ------
    ValueError, TypeError
        For what is no model or tokenizer, more than one label, a tail that is not known, or a model that does not give
        one value per text.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any = None,
        policy_tokenizer: Any = None,
        tail: str | Sequence[int] = "auto",
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        processor: Any = None,
        pairs: bool | None = None,
    ) -> None:
        check_model("reward", model)
        self._check_labels(model)
        self._policy_tokenizer, self._tail = policy_tokenizer, tail
        self._pairs, self._variables = pairs, chat_template_kwargs
        self._changed = changed(
            tail=(plain(tail), "auto"),
            pairs=(bool(pairs), False),
            chat_template_kwargs=(template_kwargs(chat_template_kwargs), {}),
        )
        if pairs and tail not in ("auto", "none"):
            raise ValueError(f"reward_tail={tail!r}: nothing follows the answer of a pair (pairs=True)")
        self._read_with(tokenizer, "reward_tokenizer", model, processor=processor)
        if self._given is not None or not (pairs or tail == "template"):  # else an engine may find one
            self.make_rendering(policy_tokenizer)
        self.model = model
        refuse_dynamic_rope(model, "reward")
        refuse_offloaded(model, "reward")
        self.device = next(model.parameters()).device
        self.vocab_size = vocabulary(model)
        own = self._check_value()
        self.causal = False
        self.tree_model, self.reason = self._tree_model(own)
        self.max_positions = most_tokens(model)
        if self.tree_model is None:
            self.beside = [model]
        self._start([] if self.tree_model is None else [TreeCache(self.tree_model)])
        self._warned = False

    # What differs in reward models of other classes

    head_name = "score"

    def _check_labels(self, model: PreTrainedModel) -> None:
        labels = model.config.num_labels
        if labels != 1:
            raise ValueError(f"reward: {type(model).__name__} has num_labels={labels}; {ONE_LABEL}")

    def _probe(self) -> list[int]:
        """A few ids, for comparing the model's own reward with its head's value."""
        pad = self.model.config.get_text_config().pad_token_id
        return [token for token in range(min(6, self.vocab_size)) if token != pad][:5]

    @torch.no_grad()
    @own_dtypes()
    def _check_value(self) -> torch.Tensor | None:
        """The model's own reward of the probe, ``[1]`` float32; None where it does not read it, as heads that look for
        an end of the text. Raises TypeError for a model that gives something else than one value a text.
        """
        name, ids = type(self.model).__name__, torch.tensor([self._probe()], device=self.device)
        with evaluating(self.model):
            try:
                output = self.model(input_ids=ids, attention_mask=torch.ones_like(ids))
            except (IndexError, ValueError, RuntimeError) as error:
                if is_lack_of_memory(error):
                    raise
                return None
        logits = getattr(output, "logits", None)
        if logits is None:
            raise TypeError(
                f"reward: {name} gives a {type(output).__name__} without logits: it has no head; {ONE_LABEL}"
            )
        if logits.numel() != 1:
            raise TypeError(
                f"reward: {name} gives logits of shape {list(logits.shape)} for a text of {ids.shape[1]} tokens, and a "
                "reward model one value (of token classifiers, ProcessReward.qwen reads those of two labels)"
            )
        return logits.flatten().float()

    def _tree_model(self, own: torch.Tensor | None) -> tuple[TreeModel | None, str]:
        """The incremental path, or None and why this model cannot take it."""
        if self._pairs:
            return None, "it reads pairs of texts"
        inner = unwrapped(self.model)
        base = getattr(inner, inner.base_model_prefix, None)
        if base is None:
            return None, "it has no base model"
        with torch.no_grad(), own_dtypes(), evaluating(self.model):
            self.causal = is_causal(base, self.vocab_size, self.device)
            if not self.causal:
                return None, "its attention is bidirectional"
            head = getattr(inner, self.head_name, None)
            if not isinstance(head, nn.Module):
                return None, f"it has no `{self.head_name}` head"
            ids = torch.tensor([self._probe()], device=self.device)
            if own is None or not _scores_last_token(own, base, head, ids):
                return None, "its logits are not its head's value at the last token"
        self.head = head
        try:
            return checked(TreeModel(inner, base, "reward")), "it is causal"
        except NotImplementedError as error:
            return None, str(error)

    def make_rendering(self, policy_tokenizer: Any) -> Rendering:
        tokenizer, policy_tokenizer = self.tokenizer, self._policy_tokenizer or policy_tokenizer
        if not self._pairs:
            return Rendering(tokenizer, policy_tokenizer, self._tail, self._variables, self.processor)
        if tokenizer is None:
            raise ValueError(
                "pairs=True, but no tokenizer is known that makes them: pass the reward model's tokenizer="
            )
        return Pairs(tokenizer, policy_tokenizer)

    def check_policy(self, policy: PreTrainedModel, tokenizer: Any) -> None:
        super().check_policy(policy, self._policy_tokenizer or tokenizer)
        if self._pairs is None and not self.causal and makes_pairs(self.tokenizer):
            warn(
                f"{type(self.model).__name__} is scored on question and answer as one text: if it was trained on "
                "tokenizer(question, answer), give ClassifierReward(model, tokenizer, pairs=True) as the reward; "
                "pairs=False says that one text is right"
            )

    def begin(
        self, prompts: Sequence[RewardPrompt], max_new_tokens: int, rows: int, kv_cache_tokens: int | None
    ) -> None:
        super().begin(prompts, max_new_tokens, rows, kv_cache_tokens)
        if self.tree_model is None and not self._warned:
            warn(
                f"{type(self.model).__name__} is scored in full for every candidate, because {self.reason}: correct, "
                "but slower than incremental scoring"
            )
            self._warned = True

    def score(self, completions: Sequence[Completion]) -> list[float] | torch.Tensor:
        if self.tree_model is not None:
            return super().score(completions)
        texts = [text.ids + text.tail for text in self.texts(completions)]
        self.tokens += sum(len(ids) for ids in texts)
        renderings = [self.rendering(completion.response.prompt) for completion in completions]
        types = [
            one.types(completion) if isinstance(one, Pairs) else None
            for one, completion in zip(renderings, completions, strict=True)
        ]
        return score_in_full(self.model, texts, types)

    def read(self, texts: Sequence[Text], rows: Sequence[Row], features: torch.Tensor) -> torch.Tensor:
        rewards: torch.Tensor = self.head(features)[:, 0].float()
        return rewards


def _scores_last_token(own: torch.Tensor, base: nn.Module, head: nn.Module, ids: torch.Tensor) -> bool:
    """Whether the model's own reward of ids ``[1, T]`` is its head's value at the last: it may do more than that."""
    values = head(base(input_ids=ids).last_hidden_state[0])[:, 0]  # [T]
    tolerance = 2 * torch.finfo(values.dtype).eps ** 0.5 * float(values.abs().max())
    return float((own[0] - values[-1].float()).abs()) <= tolerance


def score_in_full(
    model: PreTrainedModel, rows: Sequence[list[int]], types: Sequence[list[int] | None] | None = None
) -> list[float]:
    """The model's own value for each row of ids and, where some are given, of their token types.

    Rows of one length run together: padding would move some poolings.
    """
    types = types or [None] * len(rows)
    pad = model.config.get_text_config().pad_token_id
    groups: dict[tuple[int, bool, bool], list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault((len(row), pad in row, types[place] is not None), []).append(place)
    rewards = [0.0] * len(rows)
    for (length, holds_pad, typed), places in groups.items():
        # Without a pad id transformers' heads take one row at a time.
        step = 1 if pad is None else max(1, _MAX_TOKENS // length)
        for start in range(0, len(places), step):
            batch = places[start : start + step]
            given = [types[place] for place in batch] if typed else None
            values = _forward(model, [rows[place] for place in batch], holds_pad, given)
            for place, value in zip(batch, values, strict=True):
                rewards[place] = value
    return rewards


def _forward(
    model: PreTrainedModel, rows: Sequence[list[int]], holds_pad: bool, types: Sequence[list[int] | None] | None
) -> list[float]:
    """Rewards of rows of one length."""
    ids = torch.tensor(rows, device=next(model.parameters()).device)  # [B, T]
    mask = torch.ones_like(ids)
    more = {} if types is None else {"token_type_ids": torch.tensor(types, device=ids.device)}
    # A pad id that was drawn is a token like others: from embeddings the model does not see which it is. Those with a
    # decoder take none, and look for the end of the text instead.
    if holds_pad and not getattr(model.config, "is_encoder_decoder", False):
        embed = model.get_input_embeddings()
        output = model(inputs_embeds=embed(ids), attention_mask=mask, **more)
    else:
        output = model(input_ids=ids, attention_mask=mask, **more)
    rewards: list[float] = output.logits.flatten().float().tolist()
    return rewards


def most_tokens(model: PreTrainedModel) -> int | None:
    """Longest row that is scored in full: RoBERTa's kind spends some of its positions on padding."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)

"""What a model that was aligned directly says of an answer: its log-ratio to the model it started from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from stars_fast.methods.numbers import real, shown
from stars_fast.ops import gather_logprobs
from stars_fast.rewards.base import Completion, check_model
from stars_fast.rewards.base_rendered import RenderedReward
from stars_fast.rewards.cache import Text, TreeCache
from stars_fast.rewards.render import Rendering
from stars_fast.text.chat import common_prefix
from stars_fast.text.prompts import template_kwargs
from stars_fast.tree.check import checked
from stars_fast.tree.model import TreeModel
from stars_fast.tree.support import unwrapped, vocabulary

# Tokens of one packed pass: each has a row of logits, 256 MB in all for 128k ids in bfloat16.
_MAX_PACKED = 1024


class ImplicitReward(RenderedReward):
    """``beta * sum_k w_k (log pi_r(y_k | x, y_<k) - log pi_ref(y_k | x, y_<k))`` over the answer's tokens.

    With ``w_k = 1`` this is the reward that DPO (arXiv 2305.18290) fits, up to a constant per prompt, and the guide of
    TITA where the pair is a small one; TDPO (arXiv 2404.11999) adds ``beta * sum_k KL(pi_ref || pi_r)`` at the same
    positions, which is left out here. With ``w_k = 1 / k``, k = 1 for the answer's first token, it is the partial
    reward of TreeBoN (arXiv 2410.16033). Both models keep a tree of their own; a candidate costs each its own
    tokens, and the empty answer is worth 0.

    Parameters
    ----------
    model, reference : transformers causal LM
        The aligned model and the one it was trained from. Either may be the policy itself.
    tokenizer : transformers tokenizer or "policy", optional
        The pair's; "policy": it reads the policy's ids. None: as that of :class:`ClassifierReward`. With a chat
        template, prompts are rendered with it; where its vocabulary differs from the policy's, answers are
        re-tokenised.
    beta : float
        The pair's training coefficient; only its product with the engine's 1 / beta matters.
    weights : {"sum", "1/k"}
        The w_k.
    chat_template_kwargs : mapping, optional
        Variables for the pair's chat template. What is left open is as in the call.
    processor : transformers processor, optional
        The pair's, for prompts with pictures; as that of :class:`ClassifierReward`.

    Raises
    ------
    ValueError, TypeError
        For what is no causal LM or tokenizer, a beta that is no finite number, two models with different vocabularies,
        two that share their weights (one given twice, or a PEFT model and what it wraps), or weights that are not
        known.
    NotImplementedError
        For a model whose keys and values cannot be kept in a tree, by name.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        reference: PreTrainedModel,
        *,
        tokenizer: Any = None,
        beta: float = 1.0,
        weights: str = "sum",
        chat_template_kwargs: Mapping[str, Any] | None = None,
        processor: Any = None,
    ) -> None:
        for argument, one in (("model", model), ("reference", reference)):
            check_model(argument, one, predicts=True)
        if not isinstance(weights, str) or weights not in ("sum", "1/k"):
            raise ValueError(f"weights={shown(weights)}: must be 'sum' or '1/k'")
        if unwrapped(model) is unwrapped(reference):  # PEFT puts its adapters into the model it is given
            raise ValueError(
                "model and reference share their weights, every log-ratio would be 0: load the reference separately"
            )
        self._read_with(tokenizer, "tokenizer", model, reference, processor=processor)
        _check_pair(vocabulary(model), vocabulary(reference), self.tokenizer)
        self._compare(model, reference, beta, weights, chat_template_kwargs)

    def _compare(
        self,
        model: PreTrainedModel,
        reference: PreTrainedModel,
        beta: float,
        weights: str,
        chat_template_kwargs: Mapping[str, Any] | None,
    ) -> None:
        """To be called once, after :meth:`_read_with`."""
        self.chat_template_kwargs = template_kwargs(chat_template_kwargs)
        self.beta = real("beta", beta, open_below=True, open_above=True)
        self.weights = weights
        roles = ((model, "implicit reward"), (reference, "implicit reference"))
        trees = [checked(TreeModel(one, one, role)) for one, role in roles]
        # The prediction of an id is made at the one before it: the last id is left to the next pass.
        self._start([TreeCache(tree, lag=1, max_packed=_MAX_PACKED) for tree in trees])

    def make_rendering(self, policy_tokenizer: Any) -> Rendering:
        return Rendering(self.tokenizer, policy_tokenizer, "none", self.chat_template_kwargs, self.processor)

    def text(self, completion: Completion) -> Text:
        text, prompt = super().text(completion), completion.response.prompt
        ids, rendering = text.ids, self.rendering(prompt)
        if completion.eos and rendering.templated and not rendering.shared_ids:
            # An answer that ends is worth something else than one that stops: the models are asked for its end too.
            eos = rendering.tokenizer.eos_token_id
            ids = [*ids, eos] if eos is not None else ids
        start = common_prefix(self._contexts[prompt].prefix, ids)
        # Where nothing stands in front of the answer, its first token is not predicted.
        return text._replace(ids=ids, wanted=range(max(start, 1) - 1, len(ids) - 1))

    def score(self, completions: Sequence[Completion]) -> list[float]:
        texts = self.texts(completions)
        places = [i for i, text in enumerate(texts) if text.wanted]  # the others have no answer
        ratios = [self._logprobs(cache, [texts[i] for i in places]) for cache in self.caches]
        rewards = [0.0] * len(texts)
        for i, ours, reference in zip(places, *ratios, strict=True):
            rewards[i] = self.beta * sum(
                (a - b) / (k if self.weights == "1/k" else 1)
                for k, (a, b) in enumerate(zip(ours, reference, strict=True), 1)
            )
        return rewards

    def _logprobs(self, cache: TreeCache, texts: Sequence[Text]) -> list[list[float]]:
        """Log-probabilities of each text's ids behind the wanted positions."""
        logprobs: list[list[float]] = [[] for _ in texts]
        for rows, logits in self.encode(cache, texts):
            following = [texts[row.place].ids[position + 1] for row in rows for position in row.positions]
            new = iter(gather_logprobs(logits, torch.tensor(following, device=logits.device)).tolist())
            for row in rows:
                values = row.encoded.values
                values += [0.0] * (row.positions[0] + 1 - len(values))  # of the prompt, where it was encoded again
                values += [next(new) for _ in row.positions]
                logprobs[row.place] = values[texts[row.place].wanted[0] + 1 :]
        return logprobs


def _check_pair(ours: int, reference: int, tokenizer: Any) -> None:
    """One vocabulary: as many embeddings, or differently many of which the tokenizer uses those both have."""
    if ours != reference and (tokenizer is None or len(tokenizer) > min(ours, reference)):
        used = "" if tokenizer is None else f", and the tokenizer has {len(tokenizer)} ids"
        raise ValueError(
            f"model has {ours} embeddings and reference {reference}{used}: an implicit reward needs two models of one "
            "vocabulary (where the difference is padding, pass their tokenizer=)"
        )

"""What a model that was aligned directly says of an answer: its log-ratio to the model it started from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch.distributions import Categorical, kl_divergence
from transformers import PreTrainedModel

from stars_fast.methods.numbers import real, shown
from stars_fast.ops import gather_logprobs
from stars_fast.rewards.base import Completion, changed, check_model
from stars_fast.rewards.base_rendered import RenderedReward
from stars_fast.rewards.cache import Text, TreeCache
from stars_fast.rewards.render import Rendering
from stars_fast.text.chat import common_prefix
from stars_fast.text.prompts import template_kwargs
from stars_fast.tree.check import checked
from stars_fast.tree.model import TreeModel
from stars_fast.tree.support import unwrapped, vocabulary, written

# Tokens of one packed pass: each has a row of logits, 256 MB in all for 128k ids in bfloat16.
_MAX_PACKED = 1024
# Entries of each model's logits that are compared at a time: some seven float32 tensors of 64 MB.
_COMPARED = 2**24


class ImplicitReward(RenderedReward):
    """``beta * sum_k w_k (log pi_r(y_k | x, y_<k) - log pi_ref(y_k | x, y_<k))`` over the answer's tokens.

    With ``w_k = 1`` this is the reward that DPO (arXiv 2305.18290) fits, up to a constant per prompt, and the guide of
    TITA where the pair is a small one. With ``w_k = 1 / k``, k = 1 for the answer's first token, it is the partial
    reward of TreeBoN (arXiv 2410.16033). Both models keep a tree of their own; a candidate costs each its own
    tokens, and the empty answer is worth 0.

    With ``kl="sequential"`` each log-ratio is joined by ``KL(pi_ref(. | x, y_<k) || pi_r(. | x, y_<k))``, in nats over
    the whole vocabulary: what TDPO (arXiv 2404.11999) fits, by its code. The logits of both models' passes are held
    at once then, of at most 1,024 new tokens where no single text has more (2 x 256 MB for 128k ids in bfloat16), and
    below 0.5 GB where they are compared.

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
    kl : "sequential", optional
        Add the divergence at each position, under the same weights. None: log-ratios alone.
    chat_template_kwargs : mapping, optional
        Variables for the pair's chat template. What is left open is as in the call.
    processor : transformers processor, optional
        The pair's, for prompts with pictures; as that of :class:`ClassifierReward`.

    Raises
    ------
    ValueError, TypeError
        For what is no causal LM or tokenizer, a beta that is no finite number, two models with different vocabularies,
        two that share their weights (one given twice, or a PEFT model and what it wraps), or weights or a kl that are
        not known.
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
        kl: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        processor: Any = None,
    ) -> None:
        for argument, one in (("model", model), ("reference", reference)):
            check_model(argument, one, predicts=True)
        if not isinstance(weights, str) or weights not in ("sum", "1/k"):
            raise ValueError(f"weights={shown(weights)}: must be 'sum' or '1/k'")
        if kl is not None and (not isinstance(kl, str) or kl != "sequential"):
            raise ValueError(f"kl={shown(kl)}: must be 'sequential', or None for log-ratios alone")
        if unwrapped(model) is unwrapped(reference):  # PEFT puts its adapters into the model it is given
            raise ValueError(
                "model and reference share their weights, every log-ratio would be 0: load the reference separately"
            )
        self._read_with(tokenizer, "tokenizer", model, reference, processor=processor)
        _check_pair(vocabulary(model), vocabulary(reference), self.tokenizer)
        self._compare(model, reference, beta, weights, kl, chat_template_kwargs)

    def _compare(
        self,
        model: PreTrainedModel,
        reference: PreTrainedModel,
        beta: float,
        weights: str,
        kl: str | None,
        chat_template_kwargs: Mapping[str, Any] | None,
    ) -> None:
        """To be called once, after :meth:`_read_with`."""
        self.chat_template_kwargs = template_kwargs(chat_template_kwargs)
        self.beta = real("beta", beta, open_below=True, open_above=True)
        self.weights, self.kl = weights, kl
        self._changed = changed(
            beta=(self.beta, 1.0),
            weights=(weights, "sum"),
            kl=(kl, None),
            chat_template_kwargs=(self.chat_template_kwargs, {}),
        )
        if kl is not None and written(model) != written(reference):
            raise ValueError(
                f"kl={kl!r}: model gives logits of {written(model)} ids and reference of {written(reference)}, and a "
                "divergence compares those of the same: pass kl=None"
            )
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
        values = (self._log_ratios if self.kl is None else self._log_ratios_and_kl)([texts[i] for i in places])
        rewards = [0.0] * len(texts)
        for i, own in zip(places, values, strict=True):
            rewards[i] = self.beta * sum(v / (k if self.weights == "1/k" else 1) for k, v in enumerate(own, 1))
        return rewards

    def _log_ratios(self, texts: Sequence[Text]) -> list[list[float]]:
        """Of each text's ids behind the wanted positions, one model after the other."""
        pairs = zip(*(self._logprobs(cache, texts) for cache in self.caches), strict=True)
        return [[a - b for a, b in zip(*pair, strict=True)] for pair in pairs]

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

    def _log_ratios_and_kl(self, texts: Sequence[Text]) -> list[list[float]]:
        """Log-ratio and divergence of each text's ids behind the wanted positions, of both models' logits at once.

        The reference reads as much as one of its passes holds, and the other model the same texts. Either may have
        dropped what the other still has: a position that one of them knows has its value there.
        """
        values: list[list[float]] = [[] for _ in texts]
        ours, reference = self.caches
        for rows, reference_logits in self.encode(reference, texts):
            ends = [*accumulate(len(row.positions) for row in rows)]
            read = [texts[row.place] for row in rows]
            for twins, logits in self.encode(ours, read):
                pairs = [(rows[twin.place], twin) for twin in twins]
                new = [min(len(row.positions), len(twin.positions)) for row, twin in pairs]  # the last ones of each
                theirs = [ends[twin.place] - n + i for n, twin in zip(new, twins, strict=True) for i in range(n)]
                own_ends = accumulate(len(twin.positions) for twin in twins)
                own = [end - n + i for n, end in zip(new, own_ends, strict=True) for i in range(n)]
                ids = [token for n, twin in zip(new, twins, strict=True) for token in read[twin.place].ids[-n:]]
                found = iter(_compared(logits, own, reference_logits, theirs, ids))
                for n, (row, twin) in zip(new, pairs, strict=True):
                    text = texts[row.place]
                    first = len(text.ids) - n
                    known = max(row.encoded.values, twin.encoded.values, key=len)
                    prompt = [0.0] * (first - len(known))  # what of it was encoded again
                    row.encoded.values = twin.encoded.values = [*known, *prompt, *(next(found) for _ in range(n))]
                    values[row.place] = row.encoded.values[text.wanted[0] + 1 :]
        return values


def _compared(
    ours: torch.Tensor, own: Sequence[int], reference: torch.Tensor, theirs: Sequence[int], ids: Sequence[int]
) -> list[float]:
    """``log pi_r - log pi_ref`` of each id, and ``KL(pi_ref || pi_r)`` where it stands, added up: nats.

    ``ours [T, V]`` and ``reference [R, V]`` are logits, of whose rows those at ``own`` and ``theirs`` go together.
    """
    step, values = max(1, _COMPARED // ours.shape[1]), list[float]()
    for start in range(0, len(ids), step):
        a, b = (
            Categorical(logits=logits[list(rows[start : start + step])].to(ours.device).float(), validate_args=False)
            for logits, rows in ((ours, own), (reference, theirs))
        )
        following = torch.tensor(ids[start : start + step], device=ours.device)
        values += (a.log_prob(following) - b.log_prob(following) + kl_divergence(b, a)).tolist()
    return values


def _check_pair(ours: int, reference: int, tokenizer: Any) -> None:
    """One vocabulary: as many embeddings, or differently many of which the tokenizer uses those both have."""
    if ours != reference and (tokenizer is None or len(tokenizer) > min(ours, reference)):
        used = "" if tokenizer is None else f", and the tokenizer has {len(tokenizer)} ids"
        raise ValueError(
            f"model has {ours} embeddings and reference {reference}{used}: an implicit reward needs two models of one "
            "vocabulary (where the difference is padding, pass their tokenizer=)"
        )

"""Translation quality estimation: an encoder reads source and translation together, and says which words are bad."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import groupby
from math import prod
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchEncoding, PreTrainedModel

from stars_fast.methods.numbers import plain, real, shown, truth
from stars_fast.rewards.base import Completion, changed, check_model
from stars_fast.rewards.base_rendered import RenderedReward
from stars_fast.rewards.classifier import most_tokens
from stars_fast.rewards.pairs import Pairs
from stars_fast.rewards.render import Rendering
from stars_fast.tree.attention import evaluating, own_dtypes
from stars_fast.tree.support import refuse_offloaded, vocabulary

# Tokens of one forward pass, padding included, as far as one row allows.
_MAX_TOKENS = 16384


class QualityReward(RenderedReward):
    """``mix * sentence + (1 - mix) * (1 - sum of severities / words)``: what a quality estimator says of a translation.

    The prompt is the source, the answer its translation (where the policy's prompt has instructions around the source,
    give the source as ``reward_prompts=``); a bidirectional encoder reads both as one pair, in full for every
    candidate. Its word head tells each word OK or BAD, its sentence head gives the whole a value; with one head, the
    reward is that head's. This is how DCSQE (arXiv 2502.19941) combines them, by its code: a word whose ``P(OK)``, at
    its first token, lies below a threshold is an error of that threshold's severity, and errors of one severity that
    stand side by side are one. Without z-scores: a head that is to be rescaled says so itself.

    A sentence head holds against an unfinished translation what is not translated yet, so unfinished answers are scored
    only where ``partial`` says so, and then by their words alone, the last left out: it may go on. Without it, methods
    that score whole answers remain. A translation without a word is worth 0 to the words.

    Parameters
    ----------
    encoder : transformers model
        Gives a ``last_hidden_state [B, T, H]``: ``model.base_model`` of a token or sequence classifier. One that
        mixes its layers (CometKiwi) is a module around the encoder that gives the mixture.
    tokenizer : transformers tokenizer
        The encoder's, a fast one.
    words : torch.nn.Module, optional
        Logits ``[N, labels]`` of tokens ``[N, H]``; label 0 is OK.
    sentence : torch.nn.Module, optional
        One value for each of ``[B, 1, X]``, activation included: a classifier's own head, or an estimator of linear
        layers. X is H, or 2 H for ``pooling="mixed"``.
    pooling : {"first", "mixed"}
        What the sentence head reads: the pair's first token, as CometKiwi; or, in front of it, the mean over the
        translation with the special tokens around it, as DCSQE.
    severities : mapping of float to float
        Thresholds of ``P(OK)``, in (0, 1], and what an error below costs, 0 or more; the lowest counts. DCSQE's are
        1 (minor), 5 and 10 (critical), with thresholds found on held-out data.
    mix : float
        In [0, 1]; DCSQE tries up to 0.5. Not used with one head.
    answer_first : bool
        Whether the translation is the pair's first text, as in DCSQE and CometKiwi.
    per_token : bool
        Whether each token counts as a word: for scripts without spaces.
    partial : bool
        Whether unfinished translations are scored.
    policy_tokenizer : transformers tokenizer, optional
        None: the engine's.

    Raises
    ------
    ValueError, TypeError
        For no head at all, heads that do not give what is said above, a tokenizer that cannot tell words, numbers out
        of their range, or ``partial`` without a word head.
    """

    reads_text = True

    def __init__(
        self,
        encoder: PreTrainedModel,
        tokenizer: Any,
        *,
        words: nn.Module | None = None,
        sentence: nn.Module | None = None,
        pooling: str = "first",
        severities: Mapping[float, float] | None = None,
        mix: float = 0.5,
        answer_first: bool = True,
        per_token: bool = False,
        partial: bool = False,
        policy_tokenizer: Any = None,
    ) -> None:
        check_model("encoder", encoder)
        refuse_offloaded(encoder, "quality")
        if not isinstance(pooling, str) or pooling not in ("first", "mixed"):
            raise ValueError(f"pooling={shown(pooling)}: must be 'first' or 'mixed'")
        for argument, head in (("words", words), ("sentence", sentence)):
            if head is not None and not isinstance(head, nn.Module):
                raise TypeError(f"{argument}={shown(head)} must be a torch module, or None")
        if words is None and sentence is None:
            raise ValueError("a quality reward has a head: give words=, sentence= or both")
        self.partial = truth("partial", partial)
        if self.partial and words is None:
            raise ValueError("partial=True, but unfinished translations are scored by their words: give words=")
        self._read_with(tokenizer, "tokenizer", encoder)
        if not getattr(self.tokenizer, "is_fast", False):
            raise ValueError(
                f"tokenizer is {shown(tokenizer)}: give the encoder's, of the fast kind, which tells words apart"
            )
        self.encoder, self.words, self.sentence = encoder, words, sentence
        self.pooling, self.mix = pooling, real("mix", mix, 0.0, 1.0)
        self.severities = _severities(severities)
        self.answer_first, self.per_token = truth("answer_first", answer_first), truth("per_token", per_token)
        self._changed = changed(
            words=(words is not None, True),
            sentence=(sentence is not None, True),
            pooling=(pooling, "first"),
            severities=(self.severities, _severities(None)),
            mix=(self.mix, 0.5),
            answer_first=(self.answer_first, True),
            per_token=(self.per_token, False),
        )
        self._policy_tokenizer = policy_tokenizer
        self.device = next(encoder.parameters()).device
        self.vocab_size, self.max_positions = vocabulary(encoder), most_tokens(encoder)
        self._start([])
        self.beside = [module for module in (encoder, words, sentence) if module is not None]
        self._parts: WeakKeyDictionary[Completion, dict[str, float]] = WeakKeyDictionary()
        self._check_heads()

    def make_rendering(self, policy_tokenizer: Any) -> Rendering:
        return Pairs(self.tokenizer, self._policy_tokenizer or policy_tokenizer, self.answer_first)

    def score(self, completions: Sequence[Completion]) -> list[float]:
        self.tokens += sum(len(text.ids) for text in self.texts(completions))
        pairs = [cast(Pairs, self.rendering(one.response.prompt)).encoding(one) for one in completions]
        rewards = [0.0] * len(pairs)
        by_length = sorted(range(len(pairs)), key=lambda place: len(pairs[place]["input_ids"]))
        while by_length:
            step = max(1, _MAX_TOKENS // len(pairs[by_length[-1]]["input_ids"]))
            places, by_length = by_length[-step:], by_length[:-step]
            parts = self._read([pairs[place] for place in places], [completions[place].finished for place in places])
            for place, own in zip(places, parts, strict=True):
                self._parts[completions[place]] = own
                rewards[place] = next(iter(own.values()))
                if len(own) == 2:
                    rewards[place] = self.mix * own["sentence"] + (1 - self.mix) * own["words"]
        return rewards

    def parts(self, completion: Completion) -> dict[str, float] | None:
        return self._parts.get(completion)

    def _read(self, pairs: Sequence[BatchEncoding], finished: Sequence[bool]) -> list[dict[str, float]]:
        """What the heads say of each pair, in one pass."""
        hidden = self._hidden(pairs)  # [B, T, H]
        parts = [dict[str, float]() for _ in pairs]
        whole = [row for row, done in enumerate(finished) if done or self.words is None]
        if self.sentence is not None and whole:
            values = self.sentence(self._pooled(hidden, pairs)[whole][:, None]).flatten().float().tolist()
            for row, value in zip(whole, values, strict=True):
                parts[row]["sentence"] = value
        if self.words is not None:
            starts = [self._word_starts(pair, done) for pair, done in zip(pairs, finished, strict=True)]
            rows = [row for row, own in enumerate(starts) for _ in own]
            places = [place for own in starts for place in own]
            sure = iter(self.words(hidden[rows, places]).float().softmax(-1)[:, 0].tolist())
            for row, own in enumerate(starts):
                errors = [self._severity(next(sure)) for _ in own]
                parts[row]["words"] = 1 - sum(cost for cost, _ in groupby(errors)) / len(own) if own else 0.0
        return parts

    def _hidden(self, pairs: Sequence[BatchEncoding]) -> torch.Tensor:
        """The encoder's features ``[B, T, H]``."""
        padding = {"input_ids": self.tokenizer.pad_token_id or 0, "attention_mask": 0, "token_type_ids": 0}
        columns = {name: [torch.tensor(pair[name]) for pair in pairs] for name in padding if name in pairs[0]}
        columns["attention_mask"] = [torch.ones_like(ids) for ids in columns["input_ids"]]
        inputs = {
            name: pad_sequence(rows, batch_first=True, padding_value=padding[name]).to(self.device)
            for name, rows in columns.items()
        }
        output = self.encoder(**inputs)
        hidden = getattr(output, "last_hidden_state", None)
        if not isinstance(hidden, torch.Tensor):
            raise TypeError(
                f"encoder: a {type(self.encoder).__name__} gives a {type(output).__name__} without last_hidden_state: "
                "give the base_model of one with a head"
            )
        return hidden

    def _pooled(self, hidden: torch.Tensor, pairs: Sequence[BatchEncoding]) -> torch.Tensor:
        """What the sentence head reads ``[B, X]``."""
        if self.pooling == "first":
            return hidden[:, 0]
        means = []
        for row, pair in zip(hidden, pairs, strict=True):
            places = [place for place, text in enumerate(pair.sequence_ids()) if text == (not self.answer_first)]
            means.append(row[max(places[0] - 1, 0) : places[-1] + 2].mean(0) if places else row[0])
        return torch.cat((torch.stack(means), hidden[:, 0]), 1)

    def _word_starts(self, pair: BatchEncoding, finished: bool) -> list[int]:
        """First token of each word of the translation."""
        starts, last = list[int](), None
        for place, (text, word) in enumerate(zip(pair.sequence_ids(), pair.word_ids(), strict=True)):
            if text == (not self.answer_first) and (self.per_token or word != last):
                starts.append(place)
                last = word
        return starts if finished else starts[:-1]

    def _severity(self, sure: float) -> float:
        return next((cost for threshold, cost in self.severities if sure < threshold), 0.0)

    @torch.no_grad()
    @own_dtypes()
    def _check_heads(self) -> None:
        """Of a pair of words: heads of other shapes would read something else, or fail in the midst of a call."""
        pair = self.tokenizer("a b", "c d")
        with ExitStack() as stack:
            for module in self.beside:
                stack.enter_context(evaluating(module))
            hidden = self._hidden([pair, pair])
            if self.sentence is not None:
                pooled = self._pooled(hidden, [pair, pair])[:, None]
                _check_head("sentence", self.sentence, pooled, "one value each", lambda shape: prod(shape) == 2)
            if self.words is not None:
                tokens = hidden[0]
                must = "logits of OK and of at least one label more for each"
                _check_head("words", self.words, tokens, must, lambda s: s[:-1] == tokens.shape[:-1] and s[-1] > 1)


def _check_head(
    argument: str, head: nn.Module, features: torch.Tensor, must: str, fits: Callable[[torch.Size], bool]
) -> None:
    """Raise TypeError for a head that does not make of these features what it must."""
    try:
        value = head(features)
        gives = list(value.shape) if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
    except (IndexError, RuntimeError, TypeError) as error:
        raise TypeError(f"{argument}={shown(head)} must take features {list(features.shape)}: {error}") from error
    if not isinstance(value, torch.Tensor) or not fits(value.shape):
        raise TypeError(f"{argument}={shown(head)} gives {gives} for features {list(features.shape)}: must be {must}")


def _severities(given: Mapping[float, float] | None) -> list[tuple[float, float]]:
    """(threshold, cost) pairs, the lowest threshold first."""
    given = plain({0.5: 1.0} if given is None else given)
    if not isinstance(given, Mapping) or not given:
        raise ValueError(f"severities={shown(given)}: must map thresholds of P(OK) to what an error below costs")
    return sorted(
        (real("severities: threshold", low, 0.0, 1.0, open_below=True), real(f"severities[{low}]", cost, 0.0))
        for low, cost in given.items()
    )

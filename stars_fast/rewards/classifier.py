"""Sequence-classification reward models, scored incrementally over a tree of their own."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from stars_fast.prompts import Messages
from stars_fast.rewards.base import Completion, Response, Reward, RewardPrompt
from stars_fast.rewards.template import chat_prefix_and_tail, common_prefix, encode, encode_start
from stars_fast.tree.attention import evaluating, is_causal, plugged
from stars_fast.tree.memory import default_tokens
from stars_fast.tree.model import TreeModel, refuse_dynamic_rope, vocabulary

# Tokens of one packed scoring pass; more are scored in several.
_MAX_PACKED = 16384


@dataclass(eq=False)
class _Encoded:
    """Ids whose keys and values lie in the tree, and the node that holds them. A cache: it may be short, or gone."""

    node: int = -1
    ids: list[int] = field(default_factory=list)


@dataclass(eq=False)
class _Context:
    """A prompt in the reward model's own tokens."""

    prefix: list[int]  # everything in front of the answer
    tail: list[int]  # what follows the answer whenever it is scored
    text: str = ""  # the prompt's text, where prompt and answer are tokenised together
    encoded: _Encoded = field(default_factory=_Encoded)


class ClassifierReward(Reward):
    """A transformers sequence-classification model with one label.

    Causal models are scored incrementally: prompt and accepted text are encoded once, a candidate costs its own tokens
    and the tail. The score is the head's value at the last token, found by length and never by looking for padding.
    Bidirectional models, and families the attention interface does not reach, are scored in full, with one warning.

    Parameters
    ----------
    model : transformers ``...ForSequenceClassification`` with ``num_labels == 1``
    tokenizer : transformers tokenizer, optional
        The reward model's. None: it reads the policy's ids. With a chat template, prompts are rendered with it.
    policy_tokenizer : transformers tokenizer, optional
        Where its vocabulary differs from ``tokenizer``'s, answers are re-tokenised, and what is in the tree is kept up
        to the longest common token prefix.
    tail : "auto", "template", "none" or sequence of int
        What follows the answer when it is scored: the chat template's ("auto": if there is one), nothing, or these ids.

    Raises
    ------
    ValueError
        For more than one label, or a tail that is not known.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any = None,
        policy_tokenizer: Any = None,
        tail: str | Sequence[int] = "auto",
    ) -> None:
        labels = model.config.num_labels
        if labels != 1:
            raise ValueError(f"reward: {type(model).__name__} has num_labels={labels}; a reward model has exactly 1")
        self.templated = bool(getattr(tokenizer, "chat_template", None))
        if isinstance(tail, str) and tail not in ("auto", "template", "none"):
            raise ValueError(f"reward_tail={tail!r}: must be 'auto', 'template', 'none' or token ids")
        if tail == "template" and not self.templated:
            raise ValueError("reward_tail='template', but the reward tokenizer has no chat template")
        self.tail = tail
        self.model = model
        self.tokenizer = tokenizer
        self.policy_tokenizer = policy_tokenizer
        self.shared_ids = tokenizer is None or _same_vocabulary(tokenizer, policy_tokenizer)
        refuse_dynamic_rope(model, "reward")
        self.device = next(model.parameters()).device
        self.vocab_size = vocabulary(model)
        self.causal = False
        self.tree_model, self.reason = self._tree_model()
        self._warned = False
        self._contexts: dict[RewardPrompt, _Context] = {}
        self._responses: set[Response] = set()  # those with something in the tree
        self._completions: set[Completion] = set()
        self._plugged = ExitStack()

    def _tree_model(self) -> tuple[TreeModel | None, str]:
        """The incremental path, or None and why this model cannot take it."""
        base = getattr(self.model, self.model.base_model_prefix, None)
        if base is None:
            return None, "it has no base model"
        with torch.no_grad(), evaluating(self.model):
            self.causal = is_causal(base, self.vocab_size, self.device)
        if not self.causal:
            return None, "its attention is bidirectional"
        head = getattr(self.model, "score", None)
        if not isinstance(head, nn.Module):
            return None, "it has no `score` head"
        self.head = head
        try:
            return TreeModel(self.model, base, "reward"), "it is causal"
        except NotImplementedError as error:
            return None, str(error)

    # One call of the engine

    def begin(
        self, prompts: Sequence[RewardPrompt], max_new_tokens: int, rows: int, kv_cache_tokens: int | None
    ) -> None:
        self.tokens = 0
        self._contexts = {prompt: self._context(prompt) for prompt in prompts}
        for prompt, context in self._contexts.items():
            self._check(prompt, context, max_new_tokens, kv_cache_tokens)
        if self.tree_model is None:
            self._warn_once()
            self._plugged.enter_context(evaluating(self.model))
            return
        longest = max(len(context.prefix) + len(context.tail) for context in self._contexts.values())
        self.tree_model.allocate(kv_cache_tokens or default_tokens(self.tree_model, rows, longest + 2 * max_new_tokens))
        self._plugged.enter_context(plugged(self.model))

    def end(self) -> None:
        for completion in list(self._completions):
            self.discard(completion)
        for response in list(self._responses):
            self.close(response)
        for context in self._contexts.values():
            self._drop(context.encoded)
        self._contexts = {}
        self._plugged.close()

    def _check(self, prompt: RewardPrompt, context: _Context, max_new_tokens: int, kv_cache_tokens: int | None) -> None:
        bad = [token for token in context.prefix if not 0 <= token < self.vocab_size]
        if bad:
            raise ValueError(
                f"{prompt.name} holds id {bad[0]}, outside the reward model's vocabulary of {self.vocab_size}"
            )
        if not self.shared_ids:
            return  # the length in the other tokenizer is known only once the text is
        limits = {"positions": self._max_positions(), "kv_cache_tokens": kv_cache_tokens if self.tree_model else None}
        needed = len(context.prefix) + max_new_tokens + len(context.tail)
        for name, limit in limits.items():
            if limit is not None and needed > limit:
                raise ValueError(
                    f"{prompt.name} has {len(context.prefix)} tokens for the reward model; with "
                    f"max_new_tokens={max_new_tokens} and a tail of {len(context.tail)} that is {needed}, "
                    f"more than its {name} limit of {limit}"
                )

    def _max_positions(self) -> int | None:
        if self.tree_model is not None:
            return self.tree_model.max_positions
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def _warn_once(self) -> None:
        if not self._warned:
            warnings.warn(
                f"{type(self.model).__name__} is scored in full for every candidate, because {self.reason}: "
                "correct, but slower than incremental scoring",
                stacklevel=4,
            )
            self._warned = True

    # What is scored

    def _context(self, prompt: RewardPrompt) -> _Context:
        tail = [] if isinstance(self.tail, str) else list(self.tail)
        if self.templated:
            messages = self._messages(prompt)
            try:
                prefix, rendered = chat_prefix_and_tail(self.tokenizer, messages)
            except Exception as error:  # a template raises what it likes
                raise ValueError(f"{prompt.name} does not fit the reward tokenizer's chat template: {error}") from error
            return _Context(prefix, rendered if self.tail in ("auto", "template") else tail)
        if self.shared_ids:
            return _Context(list(prompt.ids), tail)
        text = self._prompt_text(prompt)
        return _Context(encode_start(self.tokenizer, text), tail, text)

    def _messages(self, prompt: RewardPrompt) -> Messages:
        source = prompt.source
        if isinstance(source, list) and source and isinstance(source[0], dict):
            return [turn for turn in source if isinstance(turn, dict)]
        return [{"role": "user", "content": self._prompt_text(prompt)}]

    def _prompt_text(self, prompt: RewardPrompt) -> str:
        if isinstance(prompt.source, str):
            return prompt.source
        if self.policy_tokenizer is None:
            raise ValueError(
                f"{prompt.name} is given as ids, and the reward model has its own tokenizer: "
                "pass the policy's as tokenizer="
            )
        return str(self.policy_tokenizer.decode(prompt.ids, skip_special_tokens=True))

    def _target(self, completion: Completion) -> list[int]:
        """The reward model's ids up to and including the answer, without the tail."""
        context = self._contexts[completion.response.prompt]
        if self.shared_ids:
            tokens = completion.tokens
            return context.prefix + (tokens[:-1] if completion.eos and context.tail else tokens)
        if self.templated:
            return context.prefix + encode(self.tokenizer, completion.text)
        text = context.text + completion.continuation
        if not self.causal:
            return list(self.tokenizer(text)["input_ids"])
        eos = self.tokenizer.eos_token_id
        return encode_start(self.tokenizer, text) + ([eos] if completion.eos and eos is not None else [])

    # Scoring

    def score(self, completions: Sequence[Completion]) -> list[float]:
        targets = [self._target(completion) for completion in completions]
        for completion, ids in zip(completions, targets, strict=True):
            if not ids and not self._contexts[completion.response.prompt].tail:
                raise ValueError("prompt and answer are empty in the reward model's tokens: there is nothing to score")
        if self.tree_model is None:
            tails = [self._contexts[completion.response.prompt].tail for completion in completions]
            return self._score_in_full([ids + tail for ids, tail in zip(targets, tails, strict=True)])
        self._open([completion.response for completion in completions])
        rewards: list[float] = []
        for start, stop in self._batches(completions, targets):
            rewards += self._score_batch(self.tree_model, completions[start:stop], targets[start:stop])
        return rewards

    def _open(self, responses: Sequence[Response]) -> None:
        """Give each new response the node of its prompt, encoding prompts that are not in the tree."""
        assert self.tree_model is not None
        fresh = [response for response in dict.fromkeys(responses) if response.state is None]
        contexts = {self._contexts[response.prompt] for response in fresh}
        missing = [c for c in contexts if c.encoded.node < 0 and c.prefix]
        missing = sorted(missing, key=lambda c: len(c.prefix))
        while missing:
            batch = [missing.pop()]
            room = self.tree_model.tree.free_slots - len(batch[0].prefix)
            while missing and room >= len(missing[-1].prefix):
                room -= len(missing[-1].prefix)
                batch.append(missing.pop())
            self._make_room(len(batch[0].prefix), keep=set())
            nodes, _ = self.tree_model.extend([-1] * len(batch), [c.prefix for c in batch])
            for context, node in zip(batch, nodes, strict=True):
                self.tokens += len(context.prefix)
                context.encoded = _Encoded(node, context.prefix)
        for response in fresh:
            self._share(response)

    def _share(self, response: Response) -> None:
        assert self.tree_model is not None
        encoded = self._contexts[response.prompt].encoded
        if encoded.node >= 0:
            self.tree_model.tree.retain(encoded.node)
        response.state = _Encoded(encoded.node, encoded.ids)
        self._responses.add(response)

    def _batches(self, completions: Sequence[Completion], targets: Sequence[list[int]]) -> Iterator[tuple[int, int]]:
        """Ranges of completions that one packed pass and the free slots can hold. At least one each."""
        assert self.tree_model is not None
        start = 0
        while start < len(completions):
            stop, new = start, 0
            while stop < len(completions):
                completion, ids = completions[stop], targets[stop]
                known = common_prefix(completion.response.state.ids, ids)
                new += len(ids) - min(known, len(ids) - 1) + len(self._contexts[completion.response.prompt].tail)
                if stop > start and new > min(_MAX_PACKED, self.tree_model.tree.free_slots):
                    break
                stop += 1
            self._make_room(new, keep={completion.response for completion in completions[start:stop]})
            yield start, stop
            start = stop

    def _score_batch(
        self, model: TreeModel, completions: Sequence[Completion], targets: Sequence[list[int]]
    ) -> list[float]:
        groups: dict[Response, list[int]] = {}
        for place, completion in enumerate(completions):
            groups.setdefault(completion.response, []).append(place)
        order = [place for places in groups.values() for place in places]
        branches: list[list[int]] = [[] for _ in completions]
        for response, places in groups.items():
            tail = self._contexts[response.prompt].tail
            known = self._rewind(response, [targets[place] for place in places], bool(tail))
            for place in places:
                branches[place] = targets[place][known:] + tail
        rows = [len(places) for places in groups.values()]
        packed = [branches[place] for place in order]
        plan = model.plan([response.state.node for response in groups], rows, [len(branch) for branch in packed])
        output, last = model.encode(plan, packed, max(rows))
        scores = self.head(output.last_hidden_state[0, last])[:, 0].float().tolist()
        self.tokens += sum(len(branch) for branch in packed)
        rewards = [0.0] * len(completions)
        for place, node, score in zip(order, plan.branches, scores, strict=True):
            rewards[place] = score
            self._remember(completions[place], node, targets[place])
        return rewards

    def _rewind(self, response: Response, targets: Sequence[list[int]], has_tail: bool) -> int:
        """Shorten what is in the tree to what all targets share; without a tail, leave each a token to encode."""
        assert self.tree_model is not None
        encoded: _Encoded = response.state
        known = min(min(common_prefix(encoded.ids, ids), len(ids) - (not has_tail)) for ids in targets)
        if known < len(encoded.ids):
            node = self.tree_model.tree.cut(encoded.node, known) if known else -1
            self.tree_model.tree.release(encoded.node)
            response.state = _Encoded(node, encoded.ids[:known])
        return known

    def _remember(self, completion: Completion, branch: int, ids: list[int]) -> None:
        """Keep the branch without its tail, until the completion is committed or discarded."""
        assert self.tree_model is not None
        tree = self.tree_model.tree
        self.discard(completion)
        if tree.length(branch) > len(ids):
            node = tree.cut(branch, len(ids))
            tree.release(branch)
        else:
            node = branch
        completion.state = _Encoded(node, ids)
        self._completions.add(completion)

    def _make_room(self, slots: int, keep: set[Response]) -> None:
        """Drop cached runs until ``slots`` are free: rejected and waiting candidates, idle prompts, other responses."""
        assert self.tree_model is not None
        tree = self.tree_model.tree
        if tree.free_slots >= slots:
            return
        for completion in list(self._completions):
            self.discard(completion)
        idle = [c.encoded for c in self._contexts.values() if c.encoded.node >= 0]
        others = [response for response in self._responses if response not in keep]
        for encoded in idle + [response.state for response in others]:
            if tree.free_slots >= slots:
                return
            self._drop(encoded)

    def commit(self, completion: Completion) -> None:
        if completion.state is None:
            return  # dropped to make room: the next scoring pass encodes the segment again
        self._completions.discard(completion)
        self.close(completion.response)
        completion.response.state, completion.state = completion.state, None
        self._responses.add(completion.response)

    def discard(self, completion: Completion) -> None:
        self._completions.discard(completion)
        self._release(completion)

    def close(self, response: Response) -> None:
        self._responses.discard(response)
        self._release(response)

    def _release(self, holder: Completion | Response) -> None:
        if holder.state is not None:
            self._drop(holder.state)
        holder.state = None

    def _drop(self, encoded: _Encoded) -> None:
        if self.tree_model is not None and encoded.node >= 0:
            self.tree_model.tree.release(encoded.node)
        encoded.node, encoded.ids = -1, []

    def _score_in_full(self, rows: Sequence[list[int]]) -> list[float]:
        """Every row from its first token. Causal rows are grouped by length: padding would move their pooling."""
        self.tokens += sum(len(row) for row in rows)
        rewards = [0.0] * len(rows)
        if not self.causal:
            longest = max(len(row) for row in rows)
            ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=self.device)
            mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=self.device)
            scores: list[float] = self.model(input_ids=ids, attention_mask=mask).logits[:, 0].float().tolist()
            return scores
        lengths: dict[int, list[int]] = {}
        for place, row in enumerate(rows):
            lengths.setdefault(len(row), []).append(place)
        embed = self.model.get_input_embeddings()
        for places in lengths.values():
            ids = torch.tensor([rows[place] for place in places], device=self.device)
            # From embeddings the model pools its last position, whatever the pad id is.
            for place, score in zip(
                places, self.model(inputs_embeds=embed(ids)).logits[:, 0].float().tolist(), strict=True
            ):
                rewards[place] = score
        return rewards


def _same_vocabulary(a: Any, b: Any) -> bool:
    return b is not None and (a is b or a.get_vocab() == b.get_vocab())

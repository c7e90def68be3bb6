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

from stars_fast.rewards.base import Completion, Response, Reward, RewardPrompt
from stars_fast.rewards.full import most_tokens, score_in_full
from stars_fast.rewards.rendering import Context, Rendering
from stars_fast.rewards.template import common_prefix
from stars_fast.tree.attention import evaluating, is_causal, plugged
from stars_fast.tree.memory import default_tokens
from stars_fast.tree.model import TreeModel, refuse_dynamic_rope, refuse_offloaded, vocabulary

# Tokens of one packed scoring pass; more are scored in several.
_MAX_PACKED = 16384


@dataclass(eq=False)
class _Encoded:
    """Ids whose keys and values lie in the tree, and the node that holds them. A cache: it may be short, or gone."""

    node: int = -1
    ids: list[int] = field(default_factory=list)


class ClassifierReward(Reward):
    """A transformers sequence-classification model with one label.

    Causal models are scored incrementally: prompt and accepted text are encoded once, a candidate costs its own tokens
    and the tail. The score is the head's value at the last token, found by length and never by looking for padding.
    Bidirectional models, those that make more of their head's value, and families the attention interface does not
    reach are scored in full, with one warning.

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
        self.rendering = Rendering(tokenizer, policy_tokenizer, tail)
        self.shared_ids = self.rendering.shared_ids
        self.model = model
        refuse_dynamic_rope(model, "reward")
        refuse_offloaded(model, "reward")
        self.device = next(model.parameters()).device
        self.vocab_size = vocabulary(model)
        self.causal = False
        self.tree_model, self.reason = self._tree_model()
        self.max_positions = self._max_positions()
        self._warned = False
        self._contexts: dict[RewardPrompt, Context] = {}
        self._prefixes: dict[RewardPrompt, _Encoded] = {}
        self._responses: set[Response] = set()  # those with something in the tree
        self._completions: set[Completion] = set()
        self._plugged = ExitStack()

    def _tree_model(self) -> tuple[TreeModel | None, str]:
        """The incremental path, or None and why this model cannot take it."""
        # PEFT wraps a model whose layers it has changed in place: base model and head are the inner one's.
        inner: PreTrainedModel = getattr(self.model, "get_base_model", lambda: self.model)()
        base = getattr(inner, inner.base_model_prefix, None)
        if base is None:
            return None, "it has no base model"
        with torch.no_grad(), evaluating(self.model):
            self.causal = is_causal(base, self.vocab_size, self.device)
            if not self.causal:
                return None, "its attention is bidirectional"
            head = getattr(inner, "score", None)
            if not isinstance(head, nn.Module):
                return None, "it has no `score` head"
            if not _scores_last_token(self.model, base, head, self.vocab_size, self.device):
                return None, "its logits are not its head's value at the last token"
        self.head = head
        try:
            return TreeModel(inner, base, "reward"), "it is causal"
        except NotImplementedError as error:
            return None, str(error)

    def _max_positions(self) -> int | None:
        if self.tree_model is not None:
            return self.tree_model.max_positions
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return most_tokens(self.model, limit)

    # One call of the engine

    def begin(
        self, prompts: Sequence[RewardPrompt], max_new_tokens: int, rows: int, kv_cache_tokens: int | None
    ) -> None:
        self._enter_call()
        self.tokens = 0
        self._contexts = {prompt: self.rendering.context(prompt) for prompt in prompts}
        for prompt, context in self._contexts.items():
            self._check_prompt(prompt, context, max_new_tokens, kv_cache_tokens)
        if self.tree_model is None:
            self._warn_once()
            self._plugged.enter_context(evaluating(self.model))
            return
        self._prefixes = {prompt: _Encoded() for prompt in prompts}
        longest = max(len(context.prefix) + len(context.tail) for context in self._contexts.values())
        self.tree_model.allocate(kv_cache_tokens or default_tokens(self.tree_model, rows, longest + 2 * max_new_tokens))
        self._plugged.enter_context(plugged(self.tree_model.model))

    def end(self) -> None:
        if not self._leave_call():
            return
        for completion in list(self._completions):
            self.discard(completion)
        for response in list(self._responses):
            self.close(response)
        for encoded in self._prefixes.values():
            self._drop(encoded)
        self._contexts, self._prefixes = {}, {}
        self._plugged.close()

    def _check_prompt(
        self, prompt: RewardPrompt, context: Context, max_new_tokens: int, kv_cache_tokens: int | None
    ) -> None:
        if bad := self._outside(context.prefix):
            raise ValueError(f"{prompt.name} holds id {bad[0]}, {self._vocabulary}")
        if bad := self._outside(context.tail):
            raise ValueError(f"reward_tail holds id {bad[0]}, {self._vocabulary}")
        # An answer's length in another tokenizer is known only once its text is.
        new = max_new_tokens if self.shared_ids else 0
        limits = {"positions": self.max_positions, "kv_cache_tokens": kv_cache_tokens if self.tree_model else None}
        needed = len(context.prefix) + new + len(context.tail)
        for name, limit in limits.items():
            if limit is not None and needed > limit:
                raise ValueError(
                    f"{prompt.name} has {len(context.prefix)} tokens for the reward model; with "
                    + (f"max_new_tokens={new} and " if new else "")
                    + f"a tail of {len(context.tail)} that is {needed}, more than its {name} limit of {limit}"
                )

    def _check_target(self, ids: Sequence[int], tail: Sequence[int]) -> None:
        """What a device would answer with an assertion that ends the process."""
        if not ids and not tail:
            raise ValueError("prompt and answer are empty in the reward model's tokens: there is nothing to score")
        if bad := self._outside(ids):
            raise ValueError(f"the answer holds id {bad[0]}, {self._vocabulary}")
        if self.max_positions is not None and len(ids) + len(tail) > self.max_positions:
            raise ValueError(
                f"prompt and answer have {len(ids)} tokens for the reward model; with a tail of {len(tail)} that is "
                f"more than its {self.max_positions} positions"
            )

    def _outside(self, ids: Sequence[int]) -> list[int]:
        if not ids or (min(ids) >= 0 and max(ids) < self.vocab_size):  # every candidate comes here: no slow loop
            return []
        return [token for token in ids if not 0 <= token < self.vocab_size]

    @property
    def _vocabulary(self) -> str:
        return f"outside the reward model's vocabulary of {self.vocab_size}"

    def _warn_once(self) -> None:
        if not self._warned:
            warnings.warn(
                f"{type(self.model).__name__} is scored in full for every candidate, because {self.reason}: "
                "correct, but slower than incremental scoring",
                stacklevel=4,
            )
            self._warned = True

    # Scoring

    def score(self, completions: Sequence[Completion]) -> list[float]:
        contexts = [self._contexts[completion.response.prompt] for completion in completions]
        targets = []
        for completion, context in zip(completions, contexts, strict=True):
            targets.append(self.rendering.target(context, completion, self.causal))
            self._check_target(targets[-1], context.tail)
        if self.tree_model is None:
            rows = [ids + context.tail for ids, context in zip(targets, contexts, strict=True)]
            self.tokens += sum(len(row) for row in rows)
            return score_in_full(self.model, rows)
        self._open([completion.response for completion in completions])
        rewards: list[float] = []
        for start, stop in self._batches(completions, targets):
            rewards += self._score_batch(self.tree_model, completions[start:stop], targets[start:stop])
        return rewards

    def _open(self, responses: Sequence[Response]) -> None:
        """Give each new response the node of its prompt, encoding prompts that are not in the tree."""
        assert self.tree_model is not None
        fresh = [response for response in dict.fromkeys(responses) if response.state is None]
        prompts = dict.fromkeys(response.prompt for response in fresh)
        missing = [prompt for prompt in prompts if self._prefixes[prompt].node < 0 and self._contexts[prompt].prefix]
        missing = sorted(missing, key=lambda prompt: len(self._contexts[prompt].prefix))
        while missing:
            batch = [missing.pop()]
            runs = [self._contexts[batch[0]].prefix]
            room = self.tree_model.tree.free_slots - len(runs[0])
            while missing and room >= len(self._contexts[missing[-1]].prefix):
                batch.append(missing.pop())
                runs.append(self._contexts[batch[-1]].prefix)
                room -= len(runs[-1])
            self._make_room(len(runs[0]), keep=set())
            nodes, _ = self.tree_model.extend([-1] * len(batch), runs)
            for prompt, node, run in zip(batch, nodes, runs, strict=True):
                self.tokens += len(run)
                self._prefixes[prompt] = _Encoded(node, run)
        for response in fresh:
            self._share(response)

    def _share(self, response: Response) -> None:
        assert self.tree_model is not None
        encoded = self._prefixes[response.prompt]
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
        idle = [encoded for encoded in self._prefixes.values() if encoded.node >= 0]
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


def _scores_last_token(
    model: PreTrainedModel, base: nn.Module, head: nn.Module, vocab_size: int, device: torch.device
) -> bool:
    """Whether the model's own reward of a few tokens is its head's value at the last: it may do more than that."""
    pad = model.config.get_text_config().pad_token_id
    probe = [token for token in range(min(6, vocab_size)) if token != pad][:5]
    ids = torch.tensor([probe], device=device)
    values = head(base(input_ids=ids).last_hidden_state[0])[:, 0]  # [T]
    own = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.flatten().float()  # [1]
    tolerance = 2 * torch.finfo(values.dtype).eps ** 0.5 * float(values.abs().max())
    return own.numel() == 1 and float((own[0] - values[-1].float()).abs()) <= tolerance

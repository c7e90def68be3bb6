"""What scorers that read prompt and answer in a model's own ids have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch

from stars_fast.rewards.base import Completion, Response, Reward, RewardPrompt
from stars_fast.rewards.cache import Row, Text, TreeCache
from stars_fast.rewards.render import Context, Rendering
from stars_fast.tree.model import TreeModel


class RenderedReward(Reward):
    """Renders prompts once per call, checks what models would choke on, and passes the protocol on to its caches.

    Attributes
    ----------
    rendering : Rendering
        Set by the subclass, at the latest in :meth:`prepare`.
    caches : list of TreeCache
        One per model; none where texts are scored in full.
    vocab_size : int
        Ids that every model has an embedding for.
    max_positions : int, optional
        Longest text.
    tail_argument : str
        What errors call the ids behind an answer.
    causal : bool
        Whether texts go on from their ids (no closing special tokens are in between).
    """

    rendering: Rendering
    caches: Sequence[TreeCache] = ()
    vocab_size: int = 0
    max_positions: int | None = None
    tail_argument: str = "reward_tail"
    causal: bool = True

    def _start(self, caches: Sequence[TreeCache]) -> None:
        """To be called once, when models are known."""
        self.caches = caches
        self._contexts: WeakKeyDictionary[RewardPrompt, Context] = WeakKeyDictionary()  # as long as their call lives
        limits = [cache.model.max_positions for cache in caches if cache.model.max_positions is not None]
        if caches:
            self.vocab_size = min(cache.model.vocab_size for cache in caches)
            self.max_positions = min(limits, default=None)

    @property
    def tree_models(self) -> list[TreeModel]:
        return [cache.model for cache in self.caches]

    @property
    def shared_ids(self) -> bool:
        """Whether the policy's ids are read as they are."""
        return self.rendering.shared_ids

    def prepare(self, policy_tokenizer: Any) -> None:
        """A call of an engine with this tokenizer starts."""

    def context(self, prompt: RewardPrompt) -> Context:
        """The prompt's ids, and the tail of its answers."""
        return self.rendering.context(prompt)

    def trunk(self, context: Context) -> list[int]:
        """What is encoded once for all answers to a prompt."""
        return context.prefix

    def text(self, completion: Completion) -> Text:
        """The completion in the models' ids."""
        context = self._contexts[completion.response.prompt]
        return Text(completion, self.rendering.target(context, completion, self.causal), context.tail)

    # One call of the engine

    def check(self, prompts: Sequence[RewardPrompt], max_new_tokens: int, kv_cache_tokens: int | None) -> None:
        if not self._calls:  # else the call is refused when it begins
            self._checked(prompts, max_new_tokens, kv_cache_tokens)

    def begin(
        self, prompts: Sequence[RewardPrompt], max_new_tokens: int, rows: int, kv_cache_tokens: int | None
    ) -> None:
        self._enter_call()
        self.tokens = 0
        contexts = self._checked(prompts, max_new_tokens, kv_cache_tokens)
        prefixes = {prompt: self.trunk(context) for prompt, context in contexts.items()}
        longest = max((len(c.prefix) + len(c.tail) for c in contexts.values()), default=0) + 2 * max_new_tokens
        for cache in self.caches:
            cache.begin(prefixes, rows, longest, kv_cache_tokens)

    def read_ahead(self, prompts: Sequence[RewardPrompt], most: int) -> Sequence[RewardPrompt]:
        left = [prompt for cache in self.caches for prompt in cache.read_ahead(prompts, most)]
        self.tokens = sum(cache.tokens for cache in self.caches)
        return left

    def end(self) -> None:
        if self._leave_call():
            for cache in self.caches:
                cache.end()

    def commit(self, completion: Completion) -> None:
        for cache in self.caches:
            cache.commit(completion)

    def discard(self, completion: Completion) -> None:
        for cache in self.caches:
            cache.discard(completion)

    def close(self, response: Response) -> None:
        for cache in self.caches:
            cache.close(response)

    def fork(self, response: Response) -> Response:
        twin = super().fork(response)
        for cache in self.caches:
            cache.fork(response, twin)
        return twin

    def texts(self, completions: Sequence[Completion]) -> list[Text]:
        """What is to be encoded; raises ValueError for ids or lengths that the models do not have."""
        texts = [self.text(completion) for completion in completions]
        for text in texts:
            self._check_text(text)
        return texts

    def encode(self, cache: TreeCache, texts: Sequence[Text]) -> Iterator[tuple[list[Row], torch.Tensor]]:
        """:meth:`TreeCache.encode`, and the balance of tokens."""
        for encoded in cache.encode(texts):
            self.tokens = sum(cache.tokens for cache in self.caches)
            yield encoded

    def score(self, completions: Sequence[Completion]) -> list[float]:
        texts = self.texts(completions)
        rewards = [0.0] * len(texts)
        for rows, features in self.encode(self.caches[0], texts):
            for row, reward in zip(rows, self.read(texts, rows, features), strict=True):
                rewards[row.place] = reward
        return rewards

    def read(self, texts: Sequence[Text], rows: Sequence[Row], features: torch.Tensor) -> list[float]:
        """Rewards of a packed pass of the only model, from the features ``[R, X]`` at each row's last token."""
        raise NotImplementedError

    # Checks

    def _checked(
        self, prompts: Sequence[RewardPrompt], max_new_tokens: int, kv_cache_tokens: int | None
    ) -> dict[RewardPrompt, Context]:
        """The prompts' contexts, rendered once."""
        self.prepare(prompts[0].tokenizer if prompts else None)
        for prompt in prompts:
            if prompt not in self._contexts:
                self._contexts[prompt] = self.context(prompt)
            self._check_prompt(prompt, self._contexts[prompt], max_new_tokens, kv_cache_tokens)
        return {prompt: self._contexts[prompt] for prompt in prompts}

    def _check_prompt(
        self, prompt: RewardPrompt, context: Context, max_new_tokens: int, kv_cache_tokens: int | None
    ) -> None:
        if bad := self._outside(context.prefix):
            raise ValueError(f"{prompt.name} holds id {bad[0]}, {self._vocabulary}")
        if bad := self._outside(context.tail):
            raise ValueError(f"{self.tail_argument} holds id {bad[0]}, {self._vocabulary}")
        # An answer's length in another tokenizer is known only once its text is.
        new = max_new_tokens if self.shared_ids else 0
        limits = {"positions": self.max_positions, "kv_cache_tokens": kv_cache_tokens if self.caches else None}
        needed = len(context.prefix) + new + len(context.tail)
        for name, limit in limits.items():
            if limit is not None and needed > limit:
                raise ValueError(
                    f"{prompt.name} has {len(context.prefix)} tokens for the reward model; with "
                    + (f"max_new_tokens={new} and " if new else "")
                    + f"a tail of {len(context.tail)} that is {needed}, more than its {name} limit of {limit}"
                )

    def _check_text(self, text: Text) -> None:
        """What a device would answer with an assertion that ends the process."""
        ids, tail = text.ids, text.tail
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

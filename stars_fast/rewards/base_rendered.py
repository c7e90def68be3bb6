"""What scorers that read prompt and answer in a model's own ids have in common."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from stars_fast.rewards.base import Completion, Response, Reward, RewardPrompt
from stars_fast.rewards.cache import Row, Text, TreeCache
from stars_fast.rewards.ids import Reading, first_reading, reading
from stars_fast.rewards.pictures import readable, tokenizer_of
from stars_fast.rewards.render import Context, Rendering
from stars_fast.stays import Stays
from stars_fast.text.media import Media
from stars_fast.text.tokens import refuse_long
from stars_fast.text.turns import said
from stars_fast.tree.attention import evaluating
from stars_fast.tree.media import placeholder_ids
from stars_fast.tree.model import TreeModel


class RenderedReward(Stays, Reward):
    """Renders each prompt once, checks what models would choke on, and passes the protocol on to its caches."""

    in_order = True
    caches: Sequence[TreeCache] = ()  # one per model; none where texts are scored in full
    beside: Sequence[nn.Module] = ()  # what it runs besides their models; in evaluation mode while a session lasts
    vocab_size: int = 0  # ids that every model has an embedding for
    max_positions: int | None = None  # of the longest text
    tail_argument: str = "reward_tail"  # what errors call the ids behind an answer
    causal: bool = True  # whether texts go on from their ids: no closing special tokens are in between
    processor: Any = None  # its own, which reads prompts with pictures

    def _read_with(self, given: Any, argument: str, *models: PreTrainedModel, processor: Any = None) -> None:
        """To be called once, first: what was given in a tokenizer's place, and the models, the most telling first."""
        given = tokenizer_of(processor, given, argument)
        self.processor = processor
        self.reads: Reading = first_reading(given, argument)
        self._given, self._argument, self._models = given, argument, models

    def _start(self, caches: Sequence[TreeCache]) -> None:
        """To be called once, when models are known."""
        self.caches = caches
        self._contexts: dict[RewardPrompt, Context] = {}  # of the prompts that are open
        self._rendered: WeakKeyDictionary[RewardPrompt, Context] = WeakKeyDictionary()  # of those that may open
        self._latest: tuple[Any, Rendering] | None = None  # and the policy's tokenizer that it was made for
        self._rows = 0
        self._kv_cache_tokens: int | None = None
        self._evaluating = ExitStack()
        self._placeholders = frozenset[int]().union(*(placeholder_ids(cache.model.model) for cache in caches))
        limits = [cache.model.max_positions for cache in caches if cache.model.max_positions is not None]
        if caches:
            self.vocab_size = min(cache.model.vocab_size for cache in caches)
            self.max_positions = min(limits, default=None)

    @property
    def tree_models(self) -> list[TreeModel]:
        return [cache.model for cache in self.caches]

    @property
    def tokenizer(self) -> Any:
        """What prompts and answers are read with; None: they are read in the policy's ids."""
        return self.reads.tokenizer

    def check_policy(self, policy: PreTrainedModel, tokenizer: Any) -> None:
        if self.tokenizer is None:
            self.reads = reading(self._models, self._given, policy, tokenizer, self._argument, self.reads)
            self._latest = tokenizer, self.make_rendering(tokenizer)

    def make_rendering(self, policy_tokenizer: Any) -> Rendering:
        """How prompts and answers of a policy with this tokenizer are read. To be written by the subclass."""
        raise NotImplementedError

    def rendering(self, prompt: RewardPrompt) -> Rendering:
        """How this prompt and its answers are read; made once for prompts of one tokenizer, whatever thread asks."""
        latest = self._latest
        if latest is None or latest[0] is not prompt.tokenizer:
            latest = self._latest = (prompt.tokenizer, self.make_rendering(prompt.tokenizer))
        return latest[1]

    def shares_ids(self, prompt: RewardPrompt) -> bool:
        """Whether the policy's ids are read as they are."""
        return self.rendering(prompt).shared_ids

    def context(self, prompt: RewardPrompt) -> Context:
        """The prompt's ids, and the tail of its answers."""
        return self.rendering(prompt).context(prompt)

    def trunk(self, context: Context) -> list[int]:
        """What is encoded once for all answers to a prompt."""
        return context.prefix

    def media(self, context: Context, cache: TreeCache) -> Media | None:
        """What the cache's model reads of the prompt besides ids."""
        return None if context.seen is None else context.seen.media

    def text(self, completion: Completion) -> Text:
        """The completion in the models' ids."""
        prompt = completion.response.prompt
        context = self._contexts[prompt]
        return Text(completion, *self.rendering(prompt).target(context, completion, self.causal))

    # A session

    def check(self, prompts: Sequence[RewardPrompt], max_new_tokens: int, kv_cache_tokens: int | None) -> None:
        latest = self._latest
        for prompt in prompts:
            if self._calls and latest is not None and prompt.tokenizer is not latest[0]:
                return  # of another engine than the one whose session is open: refused when it begins
            self._check_prompt(prompt, self._context(prompt), max_new_tokens, kv_cache_tokens)

    def begin(
        self, prompts: Sequence[RewardPrompt], max_new_tokens: int, rows: int, kv_cache_tokens: int | None
    ) -> None:
        self._enter_call()
        self.tokens = 0
        self._rows, self._kv_cache_tokens, self._latest = rows, kv_cache_tokens, None
        for prompt in prompts[:1]:
            self.rendering(prompt)  # so that the session's is not that of a call that never began
        longest = self._longest(prompts, max_new_tokens)
        for cache in self.caches:
            cache.begin(rows, longest, kv_cache_tokens)
        for module in self.beside:
            self._evaluating.enter_context(evaluating(module))

    def fits(self, prompts: Sequence[RewardPrompt], max_new_tokens: int) -> bool:
        if self._kv_cache_tokens is not None:  # another session would have no more
            return True
        rows, longest = min(len(prompts), self._rows), self._longest(prompts, max_new_tokens)
        return all(cache.fits(rows, longest) for cache in self.caches)

    def open(self, prompts: Sequence[RewardPrompt], max_new_tokens: int) -> None:
        contexts = {prompt: self._context(prompt) for prompt in prompts}
        for prompt, context in contexts.items():
            self._rendered.pop(prompt, None)
            self._check_prompt(prompt, context, max_new_tokens, self._kv_cache_tokens)
        self._contexts |= contexts
        for cache in self.caches:
            media = {prompt: self.media(context, cache) for prompt, context in contexts.items()}
            known = {prompt: one for prompt, one in media.items() if one is not None}
            cache.open({prompt: self.trunk(context) for prompt, context in contexts.items()}, known)

    def forget(self, prompts: Sequence[RewardPrompt]) -> None:
        for prompt in prompts:
            self._contexts.pop(prompt, None)
            for cache in self.caches:
                cache.forget(prompt)

    def read_ahead(self, prompts: Sequence[RewardPrompt], most: int) -> Sequence[RewardPrompt]:
        left = [prompt for cache in self.caches for prompt in cache.read_ahead(prompts, most)]
        self.tokens = sum(cache.tokens for cache in self.caches)
        return left

    def end(self) -> None:
        if self._leave_call():
            self._contexts.clear()
            for cache in self.caches:
                cache.end()
            self._evaluating.close()

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

    def fork_at(self, response: Response, length: int) -> Response:
        twin = super().fork_at(response, length)
        for cache in self.caches:
            cache.fork(response, twin)  # what lies behind is found not to be shared when the twin is scored
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

    def score(self, completions: Sequence[Completion]) -> list[float] | torch.Tensor:
        texts, passes, places = self.texts(completions), list[torch.Tensor](), list[int]()
        for rows, features in self.encode(self.caches[0], texts):
            passes.append(self.read(texts, rows, features))
            places += [row.place for row in rows]
        if not passes:
            return []
        rewards = torch.cat(passes) if len(passes) > 1 else passes[0]  # [n], in the order of the passes
        if places == sorted(places):
            return rewards
        order = sorted(range(len(places)), key=places.__getitem__)
        return rewards[torch.tensor(order, device=rewards.device)]

    def read(self, texts: Sequence[Text], rows: Sequence[Row], features: torch.Tensor) -> torch.Tensor:
        """Rewards ``[R]`` float of a packed pass of the only model, from the features ``[R, X]`` at each row's last
        token.
        """
        raise NotImplementedError

    # Checks

    def _context(self, prompt: RewardPrompt) -> Context:
        """Rendered once, by whoever asks first."""
        context = self._contexts.get(prompt) or self._rendered.get(prompt)
        if context is None:
            tokenizer = self.rendering(prompt).tokenizer or prompt.tokenizer
            refuse_long(prompt.name, said(prompt.source), tokenizer, self.max_positions, "reward model")
            context = self.context(prompt) if prompt.media is None else self._with_pictures(prompt)
            self._rendered[prompt] = context
        return context

    def _with_pictures(self, prompt: RewardPrompt) -> Context:
        """Raises ValueError where the models would not see the prompt's pictures: nothing is scored blindly."""
        name = type(self).__name__
        if not self.caches or not all(cache.model.takes_media for cache in self.caches):
            model = type(self._models[0]).__name__
            what = f"reads text alone ({model})" if self.caches else f"scores {model} in full, which reads text alone"
            raise ValueError(
                f"{prompt.name} has pictures, and the {name} {what}: give a scorer whose model sees them, a rule or "
                "function of the answer's text, or reward_prompts= of text (beside one that sees them, a part of a "
                "WeightedSum may be named in its text_only=)"
            )
        context = self.context(prompt)
        if context.seen is None or context.seen.media is None:
            raise ValueError(f"{prompt.name} has pictures, which the {name} does not read")
        for cache in self.caches:
            try:
                context.seen = readable(context.seen, cache.model.body)
            except ValueError as error:
                raise ValueError(f"{prompt.name}: {error}") from error
        return context

    def _longest(self, prompts: Sequence[RewardPrompt], max_new_tokens: int) -> int:
        """Tokens of a text that answers one of these prompts. In another tokenizer an answer may have more."""
        contexts = map(self._context, prompts)
        return max((len(c.prefix) + len(c.tail) for c in contexts), default=0) + 2 * max_new_tokens

    def _check_prompt(
        self, prompt: RewardPrompt, context: Context, max_new_tokens: int, kv_cache_tokens: int | None
    ) -> None:
        if bad := self._outside(context.prefix, self._placeholders if prompt.media else ()):
            raise ValueError(f"{prompt.name} holds id {bad[0]}, {self._vocabulary}")
        if bad := self._outside(context.tail):
            raise ValueError(f"{self.tail_argument} holds id {bad[0]}, {self._vocabulary}")
        # An answer's length in another tokenizer is known only once its text is.
        new = max_new_tokens if self.shares_ids(prompt) else 0
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
        prompt = text.completion.response.prompt
        prefix = self._contexts[prompt].prefix  # which was looked through when the prompt was opened
        new = ids[len(prefix) :] if ids[: len(prefix)] == prefix else ids
        if bad := self._outside(new, self._placeholders if prompt.media else ()):
            raise ValueError(f"the answer holds id {bad[0]}, {self._vocabulary}")
        if self.max_positions is not None and len(ids) + len(tail) > self.max_positions:
            raise ValueError(
                f"prompt and answer have {len(ids)} tokens for the reward model; with a tail of {len(tail)} that is "
                f"more than its {self.max_positions} positions"
            )

    def _outside(self, ids: Sequence[int], allowed: Collection[int] = ()) -> list[int]:
        if not ids or (min(ids) >= 0 and max(ids) < self.vocab_size):  # every candidate comes here: no slow loop
            return []
        return [token for token in ids if not 0 <= token < self.vocab_size and token not in allowed]

    @property
    def _vocabulary(self) -> str:
        return f"outside the reward model's vocabulary of {self.vocab_size}"

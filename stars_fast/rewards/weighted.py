"""Several scorers as one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from stars_fast.methods.numbers import real, shown
from stars_fast.rewards.base import Completion, Response, Reward, RewardPrompt, score_each
from stars_fast.tree.model import TreeModel


class _Part(NamedTuple):
    name: str
    weight: float
    reward: Reward


@dataclass
class _Scored:
    """What a completion is to the parts, and what it was worth to each."""

    completions: list[Completion]
    values: dict[str, float] = field(default_factory=dict)
    known_to: set[str] = field(default_factory=set)  # the parts that have scored it
    total: float | Exception = 0.0

    @property
    def is_open(self) -> bool:
        """Neither failed nor rejected."""
        return not isinstance(self.total, Exception) and self.total > -math.inf

    def add(self, part: _Part, value: float, error: str | None) -> None:
        if error is None:
            self.known_to.add(part.name)
        self.values[part.name] = value
        if not part.weight:
            return
        if error is None and value == -math.inf and part.weight < 0:
            error = f"it returned -inf to reject, of which its weight {part.weight} would make +inf"
        if error is not None:
            self.total = ValueError(f"{part.name}: {error}")
        else:
            assert isinstance(self.total, float)
            self.total += part.weight * value


def _asks(part: _Part, completion: Completion) -> bool:
    return part.weight != 0 or part.reward.partial or completion.finished


class WeightedSum(Reward):
    """``sum_i weight_i * reward_i``; the value of each part stands in the trace (``SegmentTrace.parts``).

    A part that fails fails the completion, and its error carries the part's name. ``-inf`` from a part of positive
    weight rejects, from one of negative weight it is an error. Parts are asked in their order, and not of completions
    that an earlier one has failed or rejected: hard rules belong in front. A part of weight 0 is only recorded; where
    it is for finished answers, of these. What was not asked, or failed at weight 0, is recorded as NaN. Every part has
    its own state, tree and ``kv_cache_tokens``.

    Parameters
    ----------
    parts : sequence of (weight, Reward), or mapping of name to (weight, Reward)
        Without names a part is called after its class.
    text_only : collection of str
        Names of parts that read chats with pictures as if these were not there, beside others that see them.

    Raises
    ------
    ValueError, TypeError
        Without parts, for a weight that is not finite, a scorer that is given twice, or one that is no Reward; for a
        name in ``text_only`` that no part has.
    """

    def __init__(
        self,
        parts: Sequence[tuple[float, Reward]] | Mapping[str, tuple[float, Reward]],
        text_only: Collection[str] = (),
    ) -> None:
        self._parts = [_Part(*part) for part in _named(parts)]
        if not self._parts:
            raise ValueError("parts is empty: give at least one (weight, Reward)")
        for name, _, reward in self._parts:
            if not isinstance(reward, Reward):
                raise TypeError(f"part {name!r} is a {type(reward).__name__}: give a stars_fast.rewards.Reward")
        if len({id(part.reward) for part in self._parts}) < len(self._parts):
            raise ValueError("a scorer is given twice: add its weights up")
        self._weigh()
        self.in_order = all(part.reward.in_order for part in self._parts)
        self.needs_hidden_state = any(part.reward.needs_hidden_state for part in self._parts)
        self._begun: list[_Part] = []
        self._text_only = frozenset([text_only] if isinstance(text_only, str) else text_only)
        if unknown := sorted(self._text_only.difference(self.weights)):
            raise ValueError(f"text_only: there is no part {shown(unknown[0])}; there are {', '.join(self.weights)}")

    @property
    def weights(self) -> dict[str, float]:
        """Of each part, by its name. To be set between calls; whoever is left out keeps its weight.

        Setting raises ValueError for unknown names and weights that are not finite, and RuntimeError during a call.
        """
        return {part.name: part.weight for part in self._parts}

    @weights.setter
    def weights(self, weights: Mapping[str, float]) -> None:
        if self._calls:
            raise RuntimeError("this WeightedSum is scoring: set its weights between calls")
        if unknown := [name for name in weights if name not in self.weights]:
            raise ValueError(f"weights: there is no part {shown(unknown[0])}; there are {', '.join(self.weights)}")
        new = {name: _weight(name, weight) for name, weight in weights.items()}
        self._parts = [part._replace(weight=new.get(part.name, part.weight)) for part in self._parts]
        self._weigh()

    def _weigh(self) -> None:
        """What a part of weight 0 is mistaken in guides nothing."""
        weighed = [part.reward for part in self._parts if part.weight]
        self.partial = all(reward.partial for reward in weighed)
        self.reads_text = any(reward.reads_text for reward in weighed)

    @property
    def described(self) -> str:
        alone = {name: " of text only" for name in self._text_only}
        parts = (f"{one.weight:g} {one.name} ({one.reward.described}{alone.get(one.name, '')})" for one in self._parts)
        return f"{type(self).__name__} of {', '.join(parts)}"

    @property
    def tree_models(self) -> list[TreeModel]:
        return [model for part in self._parts for model in part.reward.tree_models]

    def check_policy(self, policy: PreTrainedModel, tokenizer: Any) -> None:
        for part in self._parts:
            part.reward.check_policy(policy, tokenizer)

    def check(self, prompts: Sequence[RewardPrompt], max_new_tokens: int, kv_cache_tokens: int | None) -> None:
        for part in self._parts:
            part.reward.check(self._read_by(part, prompts), max_new_tokens, kv_cache_tokens)

    def begin(
        self, prompts: Sequence[RewardPrompt], max_new_tokens: int, rows: int, kv_cache_tokens: int | None
    ) -> None:
        self._enter_call()
        self.tokens = 0
        for part in self._parts:
            self._begun.append(part)  # first: a begin that raises is ended, too
            part.reward.begin(self._read_by(part, prompts), max_new_tokens, rows, kv_cache_tokens)
            part.reward.unsure = False

    def open(self, prompts: Sequence[RewardPrompt], max_new_tokens: int) -> None:
        opened: list[_Part] = []
        try:
            for part in self._parts:
                part.reward.open(self._read_by(part, prompts), max_new_tokens)
                opened.append(part)
        except BaseException:
            for part in opened:
                part.reward.forget(self._read_by(part, prompts))
            raise

    def fits(self, prompts: Sequence[RewardPrompt], max_new_tokens: int) -> bool:
        return all(part.reward.fits(self._read_by(part, prompts), max_new_tokens) for part in self._parts)

    def forget(self, prompts: Sequence[RewardPrompt]) -> None:
        for part in self._parts:
            part.reward.forget(self._read_by(part, prompts))

    def read_ahead(self, prompts: Sequence[RewardPrompt], most: int) -> Sequence[RewardPrompt]:
        left = list[RewardPrompt]()
        for part in self._parts:
            if part.reward.partial:
                read = self._read_by(part, prompts)
                behind = set(part.reward.read_ahead(read, most))
                left += [prompt for prompt, one in zip(prompts, read, strict=True) if one in behind]
        self.tokens = sum(part.reward.tokens for part in self._parts)
        return left

    def end(self) -> None:
        if self._leave_call():
            while self._begun:
                self._begun.pop().reward.end()

    def score(self, completions: Sequence[Completion]) -> list[float | Exception]:
        scored = [self._scored(completion) for completion in completions]
        for one in scored:
            one.total, one.values = 0.0, {part.name: math.nan for part in self._parts}
        for place, part in enumerate(self._parts):
            asked = [one for one in scored if one.is_open and _asks(part, one.completions[place])]
            if asked:
                rewards = score_each(part.reward, [one.completions[place] for one in asked])
                for one, (value, error) in zip(asked, rewards, strict=True):
                    one.add(part, value, error)
                self.unsure |= part.reward.unsure
        self.tokens = sum(part.reward.tokens for part in self._parts)
        return [one.total for one in scored]

    def parts(self, completion: Completion) -> dict[str, float] | None:
        return None if completion.state is None else dict(completion.state.values)

    def commit(self, completion: Completion) -> None:
        scored, responses = self._scored(completion), self._responses(completion.response)
        for place, (part, own) in enumerate(zip(self._parts, scored.completions, strict=True)):
            if part.name in scored.known_to:
                part.reward.commit(own)
            else:  # it does not know the segment: its response comes back without its state
                responses[place] = part.reward.fork_at(own.response, len(own.response.tokens))
                part.reward.close(own.response)

    def discard(self, completion: Completion) -> None:
        if completion.state is not None:
            for part, own in zip(self._parts, completion.state.completions, strict=True):
                part.reward.discard(own)

    def close(self, response: Response) -> None:
        if response.state is not None:
            for part, own in zip(self._parts, self._responses(response), strict=True):
                part.reward.close(own)
            response.state = None

    def fork(self, response: Response) -> Response:
        twin = super().fork(response)
        if response.state is not None:
            owned = zip(self._parts, self._responses(response), strict=True)
            twin.state = [part.reward.fork(own) for part, own in owned]
        return twin

    def fork_at(self, response: Response, length: int) -> Response:
        twin = super().fork_at(response, length)
        if response.state is not None:
            owned = zip(self._parts, self._responses(response), strict=True)
            twin.state = [part.reward.fork_at(own, length) for part, own in owned]
        return twin

    def _read_by(self, part: _Part, prompts: Sequence[RewardPrompt]) -> list[RewardPrompt]:
        """The prompts as a part knows them."""
        blind = part.name in self._text_only
        return [prompt.without_pictures if blind and prompt.media is not None else prompt for prompt in prompts]

    def _responses(self, response: Response) -> list[Response]:
        """The response as each part knows it, as long as it now is."""
        if response.state is None:
            response.state = [Response(self._read_by(part, [response.prompt])[0]) for part in self._parts]
        owned: list[Response] = response.state
        for own in owned:
            own.tokens, own.ends = response.tokens, response.ends
        return owned

    def _scored(self, completion: Completion) -> _Scored:
        """The completion as each part knows it; its response may be another than when it was scored."""
        responses = self._responses(completion.response)
        if completion.state is None:
            completion.state = _Scored([replace(completion, response=own) for own in responses])
        scored: _Scored = completion.state
        for own, response in zip(scored.completions, responses, strict=True):
            own.response, own.hidden = response, completion.hidden
        return scored


def _named(
    parts: Sequence[tuple[float, Reward]] | Mapping[str, tuple[float, Reward]],
) -> list[tuple[str, float, Reward]]:
    named, seen = list[tuple[str, float, Reward]](), Counter[str]()
    if not isinstance(parts, (Mapping, Sequence)):
        raise TypeError(f"parts={shown(parts)} must be a sequence of (weight, Reward), or a mapping of name to these")
    for name, part in parts.items() if isinstance(parts, Mapping) else [(None, part) for part in parts]:
        if not isinstance(part, Sequence) or len(part) != 2:
            raise TypeError(f"parts: {shown(part)} must be a pair (weight, Reward)")
        weight, reward = part
        if name is None:
            kind = type(reward).__name__
            seen[kind] += 1
            name = kind if seen[kind] == 1 else f"{kind}_{seen[kind]}"
        named.append((name, _weight(name, weight), reward))
    return named


def _weight(name: str, weight: Any) -> float:
    return real(f"part {name!r}: weight", weight, open_below=True, open_above=True)

"""Rules as a scorer: what is known about good answers, without a model."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from stars_fast.methods.numbers import real, shown, truth
from stars_fast.rewards.base import Completion, Reward, RewardPrompt


class RuleReward(Reward):
    """The sum of the weights of the rules that an answer meets.

    With ``weight = -lambda`` and the engine's ``beta = 1`` the answers follow posterior regularisation
    (arXiv 2305.04522): ``q(y) ~ p(y) exp(-lambda phi(y))``, phi counting the rules that y breaks. ``-inf`` makes a
    rule hard: who meets it is rejected for good. Where the empty answer meets one, the threshold cannot start from its
    reward: set ``base_reward``, ``alpha=1`` or ``target_reward=None``.

    Parameters
    ----------
    patterns : mapping of regular expression to float, optional
        Weight of the answer's text holding the pattern, anywhere and however often.
    predicates : mapping of callable to float, optional
        Each is called with the answer's text, or with its ids where the engine has no tokenizer. Its result, a bool or
        a number, is multiplied by the weight.
    partial : bool
        Whether the rules make sense for the beginning of an answer. An unfinished text may still grow into a match, or
        out of one at its end.

    Raises
    ------
    ValueError, TypeError
        Without rules, for what is no mapping or callable, for a pattern that is no regular expression, or for a weight
        that is NaN or +inf.
    """

    in_order = True

    def __init__(
        self,
        patterns: Mapping[str | re.Pattern[str], float] | None = None,
        predicates: Mapping[Callable[[Any], float], float] | None = None,
        *,
        partial: bool = True,
    ) -> None:
        for argument, rules in (("patterns", patterns), ("predicates", predicates)):
            if not isinstance(rules, (Mapping, type(None))):
                raise TypeError(f"{argument}={shown(rules)} must be a mapping of rules to weights")
        self.patterns = [(_compiled(pattern), _weight(pattern, weight)) for pattern, weight in (patterns or {}).items()]
        self.predicates = [(rule, _weight(rule, weight)) for rule, weight in (predicates or {}).items()]
        self.partial = truth("partial", partial)
        told = [(pattern.pattern, pattern.flags, weight) for pattern, weight in self.patterns]
        named = [(getattr(rule, "__name__", type(rule).__name__), weight) for rule, weight in self.predicates]
        self._changed = {"rules": sorted([*told, *named], key=repr)}  # in whatever order they are given
        if not self.patterns and not self.predicates:
            raise ValueError("RuleReward has no rules: give patterns= or predicates=")
        for rule, _ in self.predicates:
            if not callable(rule):
                raise TypeError(f"predicates: {shown(rule)} must be callable")

    def check(self, prompts: Sequence[RewardPrompt], max_new_tokens: int, kv_cache_tokens: int | None) -> None:
        if self.patterns and any(prompt.tokenizer is None for prompt in prompts):
            raise ValueError("RuleReward's patterns are matched against text: pass tokenizer=")

    def score(self, completions: Sequence[Completion]) -> list[float]:
        return [self._score(completion) for completion in completions]

    def _score(self, completion: Completion) -> float:
        answer: Any = completion.tokens if completion.tokenizer is None else completion.text
        met = [(float(pattern.search(answer) is not None), weight) for pattern, weight in self.patterns]
        met += [(float(predicate(answer)), weight) for predicate, weight in self.predicates]
        return sum(value * weight for value, weight in met if value)  # 0 times -inf is no number


def _weight(rule: Any, weight: Any) -> float:
    name = shown(rule.pattern) if isinstance(rule, re.Pattern) else getattr(rule, "__name__", shown(rule))
    return real(f"the rule {name}: weight", weight, open_above=True, hint="; -inf rejects")


def _compiled(pattern: str | re.Pattern[str]) -> re.Pattern[str]:
    if not isinstance(pattern, (str, re.Pattern)):
        raise TypeError(f"patterns: {shown(pattern)} must be a regular expression")
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"the pattern {pattern!r} is no regular expression: {error}") from error

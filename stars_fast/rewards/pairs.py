"""Question and answer as the two texts of a pair, as encoders are trained on them."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from stars_fast.rewards.base import Completion, RewardPrompt
from stars_fast.rewards.render import Context, Rendering


class Pairs(Rendering):
    """Renders what ``tokenizer(question, answer)`` gives: separators, and token types where the tokenizer has them."""

    def __init__(self, tokenizer: Any, policy_tokenizer: Any) -> None:
        super().__init__(tokenizer, policy_tokenizer, "none")
        self._shared_ids = self.templated = False
        self._types: WeakKeyDictionary[Completion, list[int]] = WeakKeyDictionary()

    def context(self, prompt: RewardPrompt) -> Context:
        turns = self.messages(prompt)
        if len(turns) > 1:
            raise ValueError(
                f"{prompt.name} has {len(turns)} turns, and pairs=True reads one question and its answer: give the "
                "question as reward_prompts="
            )
        question = turns[0]["content"]
        return Context(list(self.tokenizer(question)["input_ids"]), [], question)

    def target(self, context: Context, completion: Completion, causal: bool) -> tuple[list[int], list[int]]:
        encoded = self.tokenizer(context.text, completion.text)
        if "token_type_ids" in encoded:
            self._types[completion] = list(encoded["token_type_ids"])
        return list(encoded["input_ids"]), []

    def types(self, completion: Completion) -> list[int] | None:
        """Token types of the completion that was rendered last, one per id; None if the tokenizer gives none."""
        return self._types.get(completion)


def makes_pairs(tokenizer: Any) -> bool:
    """Whether the tokenizer puts something of its own between two texts, and has no template for a chat."""
    count = getattr(tokenizer, "num_special_tokens_to_add", None)
    if count is None or getattr(tokenizer, "chat_template", None):
        return False
    return bool(count(pair=True) > count(pair=False))

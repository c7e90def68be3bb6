"""Question and answer as the two texts of a pair, as encoders are trained on them."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from transformers import BatchEncoding

from stars_fast.rewards.base import Completion, RewardPrompt
from stars_fast.rewards.render import Context, Rendering
from stars_fast.text.turns import spoken


class Pairs(Rendering):
    """Renders what ``tokenizer(question, answer)`` gives: separators, and token types where the tokenizer has them.

    With ``answer_first``, the answer is the first of the two.
    """

    def __init__(self, tokenizer: Any, policy_tokenizer: Any, answer_first: bool = False) -> None:
        super().__init__(tokenizer, policy_tokenizer, "none")
        self._shared_ids = self.templated = False
        self.answer_first = answer_first
        self._encodings: WeakKeyDictionary[Completion, BatchEncoding] = WeakKeyDictionary()

    def context(self, prompt: RewardPrompt) -> Context:
        turns = self.messages(prompt)
        if len(turns) > 1:
            raise ValueError(
                f"{prompt.name} has {len(turns)} turns, and a pair (pairs=True, a quality reward) is one question and "
                "its answer: give the question as reward_prompts="
            )
        question = spoken(turns[0])
        return Context(list(self.tokenizer(question)["input_ids"]), [], question)

    def target(self, context: Context, completion: Completion, causal: bool) -> tuple[list[int], list[int]]:
        texts = (context.text, completion.text)
        encoded = self._encodings[completion] = self.tokenizer(*(texts[::-1] if self.answer_first else texts))
        return list(encoded["input_ids"]), []

    def encoding(self, completion: Completion) -> BatchEncoding:
        """What the tokenizer gave for the completion when it was last rendered."""
        return self._encodings[completion]

    def types(self, completion: Completion) -> list[int] | None:
        """Token types of the completion that was rendered last, one per id; None if the tokenizer gives none."""
        types = self.encoding(completion).get("token_type_ids")
        return None if types is None else list(types)


def makes_pairs(tokenizer: Any) -> bool:
    """Whether the tokenizer puts something of its own between two texts, and has no template for a chat."""
    count = getattr(tokenizer, "num_special_tokens_to_add", None)
    if count is None or getattr(tokenizer, "chat_template", None):
        return False
    return bool(count(pair=True) > count(pair=False))

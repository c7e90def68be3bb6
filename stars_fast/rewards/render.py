"""How a prompt and its answers become a reward model's ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from stars_fast.rewards.base import Completion, RewardPrompt
from stars_fast.text.chat import ChatFrame, chat_frame, encode_start, encode_turn, marks, rendered_mark
from stars_fast.text.prompts import Messages, ends_with_answer
from stars_fast.text.tokenizers import same_vocabulary


@dataclass(eq=False)
class Context:
    """A prompt in the reward model's own tokens."""

    prefix: list[int]  # everything in front of the answer
    tail: list[int]  # what follows the answer whenever it is scored
    text: str = ""  # what stands in front of the answer, where both are tokenised together
    own_start: bool = False  # that text needs no special tokens in front
    begun: bool = False  # that text ends with the beginning of the answer


class Rendering:
    """Renders for one reward model.

    Parameters
    ----------
    tokenizer, policy_tokenizer : transformers tokenizer, optional
        The reward model's and the policy's. Without the first the reward model reads the policy's ids.
    tail : "auto", "template", "none" or sequence of int

    Raises
    ------
    ValueError
        For a tail that is not known, or one of a template that does not exist.
    """

    def __init__(self, tokenizer: Any, policy_tokenizer: Any, tail: str | Sequence[int]) -> None:
        self.templated = bool(getattr(tokenizer, "chat_template", None))
        if isinstance(tail, str) and tail not in ("auto", "template", "none"):
            raise ValueError(f"reward_tail={tail!r}: must be 'auto', 'template', 'none' or token ids")
        if tail == "template" and not self.templated:
            raise ValueError("reward_tail='template', but the reward tokenizer has no chat template")
        self.tokenizer = tokenizer
        self.policy_tokenizer = policy_tokenizer
        self.tail = tail
        self.shared_ids = tokenizer is None or same_vocabulary(tokenizer, policy_tokenizer)

    def context(self, prompt: RewardPrompt) -> Context:
        """The prompt's ids, and the tail of its answers.

        Raises
        ------
        ValueError
            For a prompt that cannot be rendered, by name.
        """
        tail = [] if isinstance(self.tail, str) else list(self.tail)
        if self.templated:
            rendered = self._is_rendered(prompt, refused=not self.shared_ids)
            frame = self._frame(prompt)
            after = frame.tail if self.tail in ("auto", "template") else tail
            prefix = list(prompt.ids) if rendered else frame.prefix
            text = "" if self.shared_ids else frame.before
            return Context(prefix, after, text, frame.own_start, ends_with_answer(prompt.source))
        if self.shared_ids:
            return Context(list(prompt.ids), tail)
        text = self._prompt_text(prompt)
        return Context(encode_start(self.tokenizer, text), tail, text)

    def target(self, context: Context, completion: Completion, causal: bool) -> list[int]:
        """The reward model's ids up to and including the answer, without the tail."""
        if self.shared_ids:
            tokens = completion.tokens
            return context.prefix + (tokens[:-1] if completion.eos and context.tail else tokens)
        if self.templated:  # tokenised in one piece: how an answer begins depends on what stands before it
            answer = completion.continuation if context.begun else completion.text
            return encode_turn(self.tokenizer, context.text + answer, context.own_start)
        text = context.text + completion.continuation
        if not causal:
            return list(self.tokenizer(text)["input_ids"])
        eos = self.tokenizer.eos_token_id
        return encode_start(self.tokenizer, text) + ([eos] if completion.eos and eos is not None else [])

    def _frame(self, prompt: RewardPrompt) -> ChatFrame:
        messages = self._turns(prompt)
        try:
            return chat_frame(self.tokenizer, messages)
        except Exception as error:  # a template raises what it likes
            raise ValueError(f"{prompt.name} does not fit the reward tokenizer's chat template: {error}") from error

    def _is_rendered(self, prompt: RewardPrompt, refused: bool) -> bool:
        """Whether the prompt is given as the ids of a chat that is rendered already: a turn in a turn would mislead."""
        source = prompt.source
        if self.policy_tokenizer is None or not isinstance(source, list) or not source or isinstance(source[0], dict):
            return False
        mark = rendered_mark(self.policy_tokenizer, prompt.ids, self._marks)
        if mark is not None and refused:
            raise ValueError(
                f"{prompt.name} is given as ids of a rendered chat (they hold {mark!r}), and the reward model renders "
                "prompts with a tokenizer or template of its own: give the chat's messages as reward_prompts="
            )
        return mark is not None

    @cached_property
    def _marks(self) -> set[int]:
        return marks(self.policy_tokenizer)

    def messages(self, prompt: RewardPrompt) -> Messages:
        """The prompt as a chat, for scorers that write it into a text of their own.

        Raises
        ------
        ValueError
            For ids of a chat that is rendered already, and a chat that ends with the beginning of the answer, by name.
        """
        if ends_with_answer(prompt.source):
            raise ValueError(
                f"{prompt.name} ends with an assistant's turn, of which the completion is the rest: this scorer cannot "
                "show it in its own text, so give a chat that ends with the user's turn as reward_prompts="
            )
        self._is_rendered(prompt, refused=True)
        return self._turns(prompt)

    def _turns(self, prompt: RewardPrompt) -> Messages:
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

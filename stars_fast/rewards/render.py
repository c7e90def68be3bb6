"""How a prompt and its answers become a reward model's ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from stars_fast.methods.numbers import integer, plain, shown
from stars_fast.rewards.base import Completion, RewardPrompt
from stars_fast.rewards.pictures import PICTURE, Beginning, with_pictures
from stars_fast.text.chat import (
    ChatFrame,
    chat_frame,
    encode_start,
    encode_turn,
    habits_of,
    marks,
    rendered_mark,
    write,
)
from stars_fast.text.prompts import Messages, ends_with_answer, template_kwargs
from stars_fast.text.template import VERBATIM, Habits
from stars_fast.text.tokenizers import same_vocabulary
from stars_fast.text.tokens import token_ids
from stars_fast.text.turns import has_pictures


@dataclass(eq=False)
class Context:
    """A prompt in the reward model's own tokens."""

    prefix: list[int]  # everything in front of the answer
    tail: list[int]  # what follows the answer whenever it is scored
    text: str = ""  # what stands in front of the answer, where both are tokenised together
    own_start: bool = False  # that text needs no special tokens in front
    begun: bool = False  # that text ends with the beginning of the answer
    frame: ChatFrame | None = None  # of a chat whose template writes some answers otherwise than they are
    in_thought: bool = False  # the policy's prompt ends with the opening of a thought, which the frame has closed
    habits: Habits = VERBATIM  # of that template
    seen: Beginning | None = None  # of a prompt with pictures: `prefix`, and what is read with it

    def read(self, ids: list[int]) -> list[int]:
        """Ids of a text of this prompt, as the model reads them."""
        return ids if self.seen is None else self.seen.of(ids)


class Rendering:
    """Renders for one reward model.

    Parameters
    ----------
    tokenizer, policy_tokenizer : transformers tokenizer, optional
        The reward model's and the policy's. Without the first the reward model reads the policy's ids.
    tail : "auto", "template", "none" or sequence of int
    chat_template_kwargs : mapping, optional
        Variables for the reward model's template. What it leaves open is as in the call.
    processor : transformers processor, optional
        The reward model's, for prompts with pictures.

    Raises
    ------
    ValueError
        For a tail that is not known, or one of a template that does not exist.
    """

    def __init__(
        self,
        tokenizer: Any,
        policy_tokenizer: Any,
        tail: str | Sequence[int],
        chat_template_kwargs: Mapping[str, Any] | None = None,
        processor: Any = None,
    ) -> None:
        self.templated = bool(getattr(tokenizer, "chat_template", None))
        words = isinstance(tail, str)
        ids = plain(tail)
        if tail not in ("auto", "template", "none") if words else not isinstance(ids, (list, tuple)):
            raise ValueError(f"reward_tail={shown(tail)}: must be 'auto', 'template', 'none' or token ids")
        if not words:
            tail = [integer(f"reward_tail[{place}]", token, 0) for place, token in enumerate(ids)]
        if tail == "template" and not self.templated:
            raise ValueError("reward_tail='template', but the reward tokenizer has no chat template")
        self.tokenizer = tokenizer
        self.policy_tokenizer = policy_tokenizer
        self.processor = processor
        self.tail = tail
        self.chat_template_kwargs = template_kwargs(chat_template_kwargs)
        self._shared_ids: bool | None = None
        self._habits: dict[str, Habits] = {}  # of the template, by its variables

    @property
    def shared_ids(self) -> bool:
        """Whether the reward model reads the policy's ids. Large vocabularies are compared once, when it is asked."""
        if self._shared_ids is None:  # without cached_property's lock, which a forked child would wait for
            self._shared_ids = self.tokenizer is None or same_vocabulary(self.tokenizer, self.policy_tokenizer)
        return self._shared_ids

    def context(self, prompt: RewardPrompt) -> Context:
        """The prompt's ids, and the tail of its answers.

        Raises
        ------
        ValueError
            For a prompt that cannot be rendered, by name.
        """
        tail = [] if isinstance(self.tail, str) else list(self.tail)
        as_policy = prompt.media is not None and self._sees_as_policy(prompt)
        seen = Beginning(prompt.ids, prompt.media) if as_policy else None
        if self.templated:
            rendered = as_policy or self._is_rendered(prompt, refused=not self.shared_ids)
            frame = self._frame(prompt)
            after = frame.tail if self.tail in ("auto", "template") else tail
            prefix = list(prompt.ids) if rendered else frame.prefix
            if prompt.media is not None and not as_policy:
                seen = self.with_pictures(prompt, frame.start, frame.own_start)
                prefix = seen.ids
            text, begun = "" if self.shared_ids else frame.before, ends_with_answer(prompt.source)
            habits = VERBATIM if rendered else self._habits_of(prompt)
            kept = None if rendered or (habits == VERBATIM and frame.asked is None) else frame
            in_thought = self._opens_thought(prompt, frame)
            return Context(prefix, after, text, frame.own_start, begun, kept, in_thought, habits, seen)
        if self.shared_ids:
            return Context(list(prompt.ids), tail, seen=seen)
        text = self._prompt_text(prompt)
        return Context(encode_start(self.tokenizer, text), tail, text)

    def target(self, context: Context, completion: Completion, causal: bool) -> tuple[list[int], list[int]]:
        """The reward model's ids up to and including the answer, and its tail.

        An answer that the template writes otherwise than it is (trimmed, its thought taken apart) is read so.
        """
        if self.shared_ids:
            tokens = completion.tokens
            drawn = tokens[:-1] if completion.eos and context.tail else tokens
            if context.frame is None:
                return context.prefix + drawn, context.tail
            ended = tokens[len(tokens) - completion.eos :] if not context.tail else []
            return self._as_written(context.frame, context, completion, drawn, ended)
        if self.templated:  # tokenised in one piece: how an answer begins depends on what stands before it
            answer = completion.continuation if context.begun else completion.text
            if context.frame is None:
                ids = encode_turn(self.tokenizer, context.text + answer, context.own_start)
                return context.read(ids), context.tail
            return self._as_written(context.frame, context, completion, answer, [])
        text = context.text + completion.continuation
        if not causal:
            return token_ids(self.tokenizer, text), context.tail
        eos = self.tokenizer.eos_token_id
        ended = [eos] if completion.eos and eos is not None else []
        return encode_start(self.tokenizer, text) + ended, context.tail

    def _as_written(
        self, frame: ChatFrame, context: Context, completion: Completion, answer: str | list[int], ended: list[int]
    ) -> tuple[list[int], list[int]]:
        """:meth:`target` under a template that does not write every answer as it is; ``answer`` is text, or ids of the
        policy's that are the reward model's too. They are read as they were drawn wherever their text is as it was.
        """
        prompt = completion.response.prompt
        if isinstance(answer, str):
            text = answer
        else:  # special tokens are told apart from text once it is tokenised again
            words = answer[: len(answer) - len(ended)]
            text = str(self.tokenizer.decode(words, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        thinking = context.in_thought and not completion.finished
        variables, habits = self.variables(prompt), context.habits
        if isinstance(answer, list) and "\ufffd" in text:
            habits = VERBATIM  # ids of what is no whole character cannot be written anew
        written = write(self.tokenizer, frame, self._turns(prompt), text, variables, habits, thinking)
        if isinstance(answer, list) and written.as_it_is:
            front = context.prefix
            if written.front != frame.before:
                front = context.read(encode_turn(self.tokenizer, written.front, frame.own_start))
            return front + answer, context.tail
        ids = context.read(encode_turn(self.tokenizer, written.front + written.answer, frame.own_start)) + ended
        return ids, context.tail if written.after == frame.after else []

    def _sees_as_policy(self, prompt: RewardPrompt) -> bool:
        """Whether the prompt's pictures are read as the policy reads them, ids and all; else with the processor, or
        ValueError.
        """
        if self.shared_ids:
            if not _is_chat(prompt.source):
                return True
            policys = getattr(self.policy_tokenizer, "chat_template", None)
            alike = not self.templated or (self.tokenizer.chat_template == policys and not self.chat_template_kwargs)
            if self.processor is None and alike:
                return True
        self.images(prompt)
        return False

    def images(self, prompt: RewardPrompt) -> Sequence[Any]:
        """The prompt's pictures, for the reward model's processor.

        Raises
        ------
        ValueError
            Where there is none, or none that writes chats, and where the pictures are not known, by name.
        """
        assert prompt.media is not None
        if self.processor is None:
            raise ValueError(
                f"{prompt.name} has pictures, and the reward model reads prompts with a tokenizer or template of its "
                "own: give the scorer its model's processor= (to StarsEngine: as reward_tokenizer=)"
            )
        if not prompt.media.images or not _is_chat(prompt.source):
            raise ValueError(
                f"{prompt.name} is what a processor made, of pictures that the reward model reads with another one: "
                "give the chat with its pictures"
            )
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(f"{prompt.name} has pictures, and the reward model's processor has no chat template")
        return prompt.media.images

    def with_pictures(self, prompt: RewardPrompt, text: str, own_start: bool) -> Beginning:
        """What the reward model reads of the prompt's pictures, and of the rendered text in which their marks stand."""
        try:
            return with_pictures(self.processor, self.tokenizer, text, own_start, self.images(prompt))
        except ValueError as error:
            raise ValueError(f"{prompt.name}: {error}") from error

    def behind(self, prompt: RewardPrompt, text: str, own_start: bool) -> Context:
        """The context of answers that stand behind this text, tokenised by themselves."""
        if prompt.media is None:
            return Context(encode_turn(self.tokenizer, text, own_start), [])
        seen = self.with_pictures(prompt, text, own_start)
        return Context(seen.ids, [], seen=seen)

    def variables(self, prompt: RewardPrompt) -> dict[str, Any]:
        """What the prompt's template is rendered with: the scorer's own, else the call's."""
        return {**prompt.chat_template_kwargs, **self.chat_template_kwargs}

    def _habits_of(self, prompt: RewardPrompt) -> Habits:
        variables = self.variables(prompt)
        content = "a" if prompt.media is None else [PICTURE, {"type": "text", "text": "a"}]
        key = repr((content, sorted(variables.items())))
        if key not in self._habits:
            self._habits[key] = habits_of(self.tokenizer, variables, content)
        return self._habits[key]

    def _opens_thought(self, prompt: RewardPrompt, frame: ChatFrame) -> bool:
        """Whether the policy goes on from an opened thought. Of a prompt of which that cannot be told, it does not."""
        if not frame.opened or self.policy_tokenizer is None:
            return False
        try:
            end = prompt.ids[-len(frame.opened.encode()) - 8 :]
        except ValueError:  # what the reward sees need not suit the policy's tokenizer
            return False
        return str(self.policy_tokenizer.decode(end)).rstrip().endswith(frame.opened)

    def _frame(self, prompt: RewardPrompt) -> ChatFrame:
        messages = self._turns(prompt)
        try:
            return chat_frame(self.tokenizer, messages, self.variables(prompt))
        except Exception as error:  # a template raises what it likes
            raise ValueError(f"{prompt.name} does not fit the reward tokenizer's chat template: {error}") from error

    def _is_rendered(self, prompt: RewardPrompt, refused: bool) -> bool:
        """Whether the prompt is given as the ids of a chat that is rendered already: a turn in a turn would mislead."""
        source = prompt.source
        if self.policy_tokenizer is None or not isinstance(source, list) or not source or _is_chat(source):
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
            For ids of a chat that is rendered already, a chat that ends with the beginning of the answer, and pictures
            that cannot be read, by name.
        """
        if prompt.media is not None:
            self.images(prompt)
        if ends_with_answer(prompt.source):
            raise ValueError(
                f"{prompt.name} ends with an assistant's turn, of which the completion is the rest: this scorer cannot "
                "show it in its own text, so give a chat that ends with the user's turn as reward_prompts="
            )
        self._is_rendered(prompt, refused=True)
        return self._turns(prompt)

    def _turns(self, prompt: RewardPrompt) -> Messages:
        source = prompt.source
        if _is_chat(source):
            turns = [turn for turn in source if isinstance(turn, dict)]
            if prompt.media is None and any(map(has_pictures, turns)):
                raise ValueError(f"{prompt.name} has pictures, and comes without what a processor made of them")
            return turns
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


def _is_chat(source: Any) -> bool:
    return isinstance(source, list) and bool(source) and isinstance(source[0], dict)

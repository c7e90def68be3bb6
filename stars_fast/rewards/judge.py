"""A causal language model that is asked what it thinks of an answer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from stars_fast.notices import warn
from stars_fast.rewards.base import RewardPrompt, changed, check_model, check_text
from stars_fast.rewards.base_rendered import RenderedReward
from stars_fast.rewards.cache import Row, Text, TreeCache
from stars_fast.rewards.ids import check_own
from stars_fast.rewards.pictures import PICTURE, tokenizer_of
from stars_fast.rewards.render import Context, Rendering
from stars_fast.text.chat import encode, text_frame
from stars_fast.text.prompts import template_kwargs
from stars_fast.text.template import rendered, stand_in
from stars_fast.text.tokenizers import check_tokenizer
from stars_fast.text.turns import spoken
from stars_fast.tree.check import checked
from stars_fast.tree.model import TreeModel

QUESTION = "Is the answer, as far as it goes, helpful, correct and harmless?"
TEMPLATE = "Question:\n{prompt}\n\nAnswer:\n{answer}\n\n{question} Reply with Yes or No."


class JudgeReward(RenderedReward):
    """``logit(yes) - logit(no)`` of a causal language model that has read prompt, answer and a question about it.

    That is the log-odds of the verdict. What stands in front of the answer is encoded once per prompt; a candidate
    costs its own tokens and those of the question behind it, which are rolled back. The judge may be the policy.

    Parameters
    ----------
    model : transformers causal LM
    tokenizer : transformers tokenizer, optional
        The judge's; needed without a ``processor``. With a chat template, the question is put as a user's turn. Where
        its vocabulary differs from the policy's, answers are re-tokenised; where the engine has no tokenizer, ids are
        taken to be the judge's own.
    question : str
        What is asked about the answer.
    template : str
        Holds ``{answer}`` once; ``{prompt}`` and ``{question}`` are filled in. Chats become ``role: content`` lines.
    yes, no : str
        The verdicts. Their first tokens are compared; a verdict of several is warned of.
    chat_template_kwargs : mapping, optional
        Variables for the judge's chat template. One that thinks before it answers is asked for its verdict at once with
        ``{"enable_thinking": False}``, where its template knows that. Those of a call are for other chats.
    processor : transformers processor, optional
        The judge's, for prompts with pictures: they stand in front of the question in the user's turn.

    Raises
    ------
    ValueError
        For a template without exactly one ``{answer}``, or verdicts that begin with the same token.
    TypeError
        For a model that is not loaded, or no tokenizer.
    NotImplementedError
        For a model whose keys and values cannot be kept in a tree, by name.
    """

    tail_argument = "template"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any = None,
        *,
        question: str = QUESTION,
        template: str = TEMPLATE,
        yes: str = "Yes",
        no: str = "No",
        chat_template_kwargs: Mapping[str, Any] | None = None,
        processor: Any = None,
    ) -> None:
        check_model("model", model, predicts=True)
        tokenizer = tokenizer_of(processor, tokenizer, "tokenizer")
        check_tokenizer("tokenizer", tokenizer, ", by which the judge reads a question in text")
        for argument, text in (("question", question), ("template", template), ("yes", yes), ("no", no)):
            check_text(argument, text)
        if template.count("{answer}") != 1:
            raise ValueError(f"template={template!r} holds {{answer}} {template.count('{answer}')} times: must be once")
        self._read_with(tokenizer, "tokenizer", model, processor=processor)
        self.template, self.question = template, question
        self.chat_template_kwargs = template_kwargs(chat_template_kwargs)
        self._changed = changed(
            question=(question, QUESTION),
            template=(template, TEMPLATE),
            yes=(yes, "Yes"),
            no=(no, "No"),
            chat_template_kwargs=(self.chat_template_kwargs, {}),
        )
        self.verdicts = [_first_token(tokenizer, yes), _first_token(tokenizer, no)]
        if self.verdicts[0] == self.verdicts[1]:
            raise ValueError(f"yes={yes!r} and no={no!r} begin with the same token, {self.verdicts[0]}")
        self._start([TreeCache(checked(TreeModel(model, model, "judge")))])
        if bad := self._outside(self.verdicts):
            raise ValueError(
                f"a verdict's first token is {bad[0]}, outside the judge's vocabulary of {self.vocab_size}"
            )

    def check_policy(self, policy: PreTrainedModel, tokenizer: Any) -> None:
        check_own(self.caches[0].model.model, self.tokenizer, policy, tokenizer)

    def make_rendering(self, policy_tokenizer: Any) -> Rendering:
        policy_tokenizer, variables = policy_tokenizer or self.tokenizer, self.chat_template_kwargs
        return _Question(self.tokenizer, policy_tokenizer, self.template, self.question, variables, self.processor)

    def read(self, texts: Sequence[Text], rows: Sequence[Row], features: torch.Tensor) -> torch.Tensor:
        yes, no = features[:, self.verdicts].float().T
        return yes - no


class _Question(Rendering):
    """Renders prompt and answer inside a question about them."""

    def __init__(
        self,
        tokenizer: Any,
        policy_tokenizer: Any,
        template: str,
        question: str,
        variables: dict[str, Any],
        processor: Any = None,
    ) -> None:
        super().__init__(tokenizer, policy_tokenizer, "none", variables, processor)
        self.has_chat_template, self.templated = self.templated, True  # the answer stands in a text, chat or not
        self.template, self.question = template, question

    def context(self, prompt: RewardPrompt) -> Context:
        word = stand_in(shown := self._shown(prompt), self.question, self.template)
        filled = {"{prompt}": shown, "{question}": self.question, "{answer}": word}
        # In one pass, so that a prompt or question that holds one of the names is only text.
        asked = re.sub("|".join(map(re.escape, filled)), lambda name: filled[name[0]], self.template)
        if self.has_chat_template:
            pictures = [] if prompt.media is None else [PICTURE] * len(prompt.media.images)
            content = [*pictures, {"type": "text", "text": asked}] if pictures else asked
            turn = [{"role": "user", "content": content}]
            try:
                asked = rendered(self.tokenizer, turn, self.chat_template_kwargs, add_generation_prompt=True)
            except Exception as error:  # a template raises what it likes
                raise ValueError(f"{prompt.name} does not fit the judge's chat template: {error}") from error
        before, *after = asked.split(word)
        if len(after) != 1:
            raise ValueError(
                f"the judge's chat template contains the user's content {len(after)} times: must be once, verbatim"
            )
        frame, seen = text_frame(self.tokenizer, before, *after), None
        if prompt.media is not None:
            seen = self.with_pictures(prompt, before, frame.own_start)
        prefix = frame.prefix if seen is None else seen.ids
        return Context(prefix, frame.tail, "" if self.shared_ids else before, frame.own_start, seen=seen)

    def _shown(self, prompt: RewardPrompt) -> str:
        turns = self.messages(prompt)
        if len(turns) == 1:
            return spoken(turns[0])
        return "\n".join(f"{turn['role']}: {spoken(turn)}" for turn in turns)


def _first_token(tokenizer: Any, text: str) -> int:
    ids = encode(tokenizer, text)
    if not ids:
        raise ValueError(f"the verdict {text!r} has no tokens")
    if len(ids) > 1:
        first = tokenizer.decode(ids[:1])
        warn(f"the verdict {text!r} has {len(ids)} tokens: the judge is asked for the first alone, {first!r}")
    return ids[0]

"""Process reward models: a score for every step of an answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from stars_fast.prompts import Messages
from stars_fast.rewards.base import Completion, RewardPrompt
from stars_fast.rewards.classifier import unwrapped
from stars_fast.rewards.incremental import Text, TreeCache
from stars_fast.rewards.rendered import RenderedReward
from stars_fast.rewards.rendering import Context, Rendering
from stars_fast.rewards.template import SENTINEL, chat_frame, encode, encode_start, encode_turn
from stars_fast.tree.model import TreeModel

AGGREGATES: dict[str, Callable[[list[float]], float]] = {
    "last": lambda scores: scores[-1],
    "min": min,
    "mean": lambda scores: sum(scores) / len(scores),
    "prod": math.prod,
}
# What the Qwen2.5-Math process reward models were trained behind.
QWEN_SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
_LABEL = "STARSFASTLABEL"


class ProcessReward(RenderedReward):
    """Scores of an answer's steps, in [0, 1], and what they come to.

    A step is a committed segment, or the candidate behind them: let segments end where steps do. Its text is stripped
    and tokenised by itself, followed by the ids at whose last the model scores it. Those ids stay: the next step comes
    behind them, as in training. A step is scored once, and a candidate costs its own tokens and its mark's.

    Made by :meth:`qwen` or :meth:`rlhflow`.
    """

    def __init__(self, model: TreeModel, tokenizer: Any, aggregate: str) -> None:
        if aggregate not in AGGREGATES:
            raise ValueError(f"aggregate={aggregate!r}: must be one of {', '.join(map(repr, AGGREGATES))}")
        self.tokenizer = tokenizer
        self.aggregate = AGGREGATES[aggregate]
        self._start([TreeCache(model)])

    @classmethod
    def qwen(
        cls,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        step_token: str = "<extra_0>",
        system: str | None = QWEN_SYSTEM,
        aggregate: str = "last",
    ) -> ProcessReward:
        """A classifier of step tokens, as Qwen2.5-Math-PRM: the probability of class 1 at the token behind each step.

        Parameters
        ----------
        model : transformers model with a ``score`` head of two labels on its base model
            The published ones come with code of their own (``trust_remote_code``) of that shape; what
            ``AutoModelForTokenClassification`` loads has it too.
        tokenizer : transformers tokenizer
        step_token : str
        system : str, optional
            Put in front of chats that have no system turn.
        aggregate : {"last", "min", "mean", "prod"}

        Raises
        ------
        ValueError
            For a head of another size, or a token that the tokenizer does not know.
        """
        inner = unwrapped(model)
        base, head = getattr(inner, inner.base_model_prefix, None), getattr(inner, "score", None)
        if base is None or not isinstance(head, nn.Module):
            raise ValueError(f"{type(model).__name__} has no base model with a `score` head")
        return _StepTokens(
            TreeModel(inner, base, "process reward model"), tokenizer, aggregate, head, step_token, system
        )

    @classmethod
    def rlhflow(
        cls, model: PreTrainedModel, tokenizer: Any, *, good: str = "+", bad: str = "-", aggregate: str = "last"
    ) -> ProcessReward:
        """A causal LM that answers each step with a label, as RLHFlow's Llama3.1-8B-PRM: the probability of ``good``.

        Steps are the user's turns, the first behind the question; every earlier one is shown as answered with ``good``.

        Parameters
        ----------
        model : transformers causal LM
        tokenizer : transformers tokenizer, with a chat template
        good, bad : str
            The labels; the last token of each.
        aggregate : {"last", "min", "mean", "prod"}
        """
        return _Labels(TreeModel(model, model, "process reward model"), tokenizer, aggregate, good, bad)

    # To be written by each form

    mark: list[int]  # ids behind a step; at the last of them it is scored
    link: Sequence[int] = ()  # ids between that and the next step
    lead: str = ""  # text in front of the first step

    def step_scores(self, features: torch.Tensor) -> torch.Tensor:
        """Scores ``[F]`` from the features ``[F, X]`` at marks."""
        raise NotImplementedError

    # What they share

    @property
    def shared_ids(self) -> bool:
        return False  # a step's text is tokenised anew

    def prepare(self, policy_tokenizer: Any) -> None:
        self.rendering = Rendering(self.tokenizer, policy_tokenizer or self.tokenizer, "none")

    def text(self, completion: Completion) -> Text:
        ids, marks = list(self._contexts[completion.response.prompt].prefix), []
        for place, step in enumerate(self._steps(completion)):
            ids += self.link if place else ()
            ids += encode(self.tokenizer, step if place else self.lead + step) + self.mark
            marks.append(len(ids) - 1)
        return Text(completion, ids, [], marks)

    def _steps(self, completion: Completion) -> list[str]:
        """Texts of the steps, none of them empty unless the answer is."""
        tokenizer, tokens, done = completion.tokenizer or self.tokenizer, completion.tokens, 0
        ends = [*completion.response.ends, len(completion.response.tokens), len(tokens)]
        steps = []
        for end in ends:
            text = tokenizer.decode(tokens[:end], skip_special_tokens=True)
            if end < len(tokens) or not completion.finished:
                text = text.rstrip("\ufffd")  # a character that is not complete belongs to the next step
            steps.append(text[done:].strip())
            done = max(done, len(text))
        return [step for step in steps if step] or [""]

    def score(self, completions: Sequence[Completion]) -> list[float]:
        texts = self.texts(completions)
        rewards = [0.0] * len(texts)
        for rows, features in self.encode(self.caches[0], texts):
            new = iter(self.step_scores(features).tolist())
            for row in rows:
                values = row.encoded.values
                for position in row.positions:
                    values += [0.0] * (position - len(values)) + [next(new)]
                rewards[row.place] = self.aggregate([values[mark] for mark in texts[row.place].wanted])
        return rewards


class _StepTokens(ProcessReward):
    def __init__(
        self, model: TreeModel, tokenizer: Any, aggregate: str, head: nn.Module, step_token: str, system: str | None
    ) -> None:
        super().__init__(model, tokenizer, aggregate)
        probe = torch.zeros(1, model.text_config.hidden_size, dtype=model.dtype, device=model.device)
        with torch.no_grad():
            labels = head(probe).shape[-1]
        if labels != 2:
            raise ValueError(f"the process reward model's head has {labels} labels; it takes 2, wrong and right")
        mark = tokenizer.convert_tokens_to_ids(step_token)
        if mark is None or mark == tokenizer.unk_token_id:
            raise ValueError(f"step_token={step_token!r} is not in the tokenizer's vocabulary")
        self.head, self.mark, self.system = head, [mark], system

    def context(self, prompt: RewardPrompt) -> Context:
        messages = self.rendering.messages(prompt)
        if not self.rendering.templated:
            return Context(encode_start(self.tokenizer, "\n\n".join(turn["content"] for turn in messages) + "\n"), [])
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        return Context(chat_frame(self.tokenizer, messages).prefix, [])

    def step_scores(self, features: torch.Tensor) -> torch.Tensor:
        return self.head(features).float().softmax(-1)[:, 1]


class _Labels(ProcessReward):
    lead = " "

    def __init__(self, model: TreeModel, tokenizer: Any, aggregate: str, good: str, bad: str) -> None:
        super().__init__(model, tokenizer, aggregate)
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("a process reward model that labels turns needs a tokenizer with a chat template")
        self.labels = [encode(tokenizer, label)[-1] for label in (good, bad)]
        if self.labels[0] == self.labels[1]:
            raise ValueError(f"good={good!r} and bad={bad!r} end with the same token, {self.labels[0]}")
        _, _, mark, link = self._rendered([{"role": "user", "content": "a"}])
        self.mark, self.link = encode(tokenizer, mark), [*encode(tokenizer, good), *encode(tokenizer, link)]

    def context(self, prompt: RewardPrompt) -> Context:
        before, own_start, _, _ = self._rendered(self.rendering.messages(prompt))
        return Context(encode_turn(self.tokenizer, before, own_start), [])

    def _rendered(self, messages: Messages) -> tuple[str, bool, str, str]:
        """Around the steps and labels of a chat: what is in front of the first step (and whether a bos is in it),
        between a step and its label, and between that and the next step."""
        question = {"role": "user", "content": f"{messages[-1]['content']} {SENTINEL}"}
        label = {"role": "assistant", "content": _LABEL}
        turns = [*messages[:-1], question, label, {"role": "user", "content": SENTINEL}, label]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False)
        parts = text.replace(_LABEL, SENTINEL).split(SENTINEL)
        if len(parts) != 5:
            raise ValueError("the tokenizer's chat template does not show every turn once and verbatim")
        before, mark, link = parts[:3]
        own_start = bool(self.tokenizer.bos_token) and before.startswith(self.tokenizer.bos_token)
        return before.removesuffix(" "), own_start, mark, link

    def step_scores(self, features: torch.Tensor) -> torch.Tensor:
        return features[:, self.labels].float().softmax(-1)[:, 0]

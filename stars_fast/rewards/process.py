"""Process reward models: a score for every step of an answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from stars_fast.methods.numbers import shown
from stars_fast.rewards.base import Completion, Response, RewardPrompt, changed, check_model, check_text
from stars_fast.rewards.base_rendered import RenderedReward
from stars_fast.rewards.cache import Text, TreeCache
from stars_fast.rewards.ids import check_own
from stars_fast.rewards.pictures import PICTURE, tokenizer_of
from stars_fast.rewards.render import Context, Rendering
from stars_fast.text.chat import chat_frame, encode, encode_start, encode_turn
from stars_fast.text.prompts import Messages
from stars_fast.text.template import Variables, apply, rendered, stand_in
from stars_fast.text.tokenizers import check_tokenizer
from stars_fast.text.turns import has_pictures, spoken
from stars_fast.tree.check import checked
from stars_fast.tree.model import TreeModel
from stars_fast.tree.support import unwrapped

AGGREGATES: dict[str, Callable[[list[float]], float]] = {
    "last": lambda scores: scores[-1],
    "min": min,
    "mean": lambda scores: sum(scores) / len(scores),
    "prod": math.prod,
}
# What the Qwen2.5-Math process reward models were trained behind.
QWEN_SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."


class _Steps(NamedTuple):
    """The steps of an answer, up to some token of it."""

    ends: tuple[int, ...]  # in the policy's tokens
    characters: int  # of the text that they take
    ids: list[int]  # with marks and links, without the prompt
    marks: list[int]  # places among them


_NO_STEPS = _Steps((), 0, [], [])


class ProcessReward(RenderedReward):
    """Scores of an answer's steps, in [0, 1], and what they come to.

    A step is a committed segment, or the candidate behind them: let segments end where steps do. Its text is stripped
    and tokenised by itself, followed by the ids at whose last the model scores it. Those ids stay: the next step comes
    behind them, as in training. A step is scored once, and a candidate costs its own tokens and its mark's.

    Made by :meth:`qwen` or :meth:`rlhflow`.
    """

    def __init__(self, model: TreeModel, tokenizer: Any, aggregate: str, processor: Any) -> None:
        tokenizer = tokenizer_of(processor, tokenizer, "tokenizer")
        check_tokenizer("tokenizer", tokenizer, ", by which the steps are read")
        if not isinstance(aggregate, str) or aggregate not in AGGREGATES:
            raise ValueError(f"aggregate={shown(aggregate)}: must be one of {', '.join(map(repr, AGGREGATES))}")
        self._read_with(tokenizer, "tokenizer", model.model, processor=processor)
        self.aggregate = AGGREGATES[aggregate]
        self._changed = changed(aggregate=(aggregate, "last"))
        self._committed: dict[Response, _Steps] = {}
        self._start([TreeCache(model)])

    @classmethod
    def qwen(
        cls,
        model: PreTrainedModel,
        tokenizer: Any = None,
        *,
        step_token: str = "<extra_0>",
        system: str | None = QWEN_SYSTEM,
        aggregate: str = "last",
        processor: Any = None,
    ) -> ProcessReward:
        """A classifier of step tokens, as Qwen2.5-Math-PRM: the probability of class 1 at the token behind each step.

        Parameters
        ----------
        model : transformers model with a ``score`` head of two labels on its base model
            The published ones come with code of their own (``trust_remote_code``) of that shape; what
            ``AutoModelForTokenClassification`` loads has it too.
        tokenizer : transformers tokenizer, optional
            Needed without a ``processor``.
        step_token : str
        system : str, optional
            Put in front of chats that have no system turn.
        aggregate : {"last", "min", "mean", "prod"}
        processor : transformers processor, optional
            The model's, for prompts with pictures.

        Raises
        ------
        ValueError, TypeError
            For arguments that are no model, tokenizer or text, for a head of another size, or a token that the
            tokenizer does not know.
        """
        check_model("model", model)
        check_text("step_token", step_token)
        check_text("system", "" if system is None else system)
        inner = unwrapped(model)
        base, head = getattr(inner, inner.base_model_prefix, None), getattr(inner, "score", None)
        if base is None or not isinstance(head, nn.Module):
            raise ValueError(f"{type(model).__name__} has no base model with a `score` head")
        tree = checked(TreeModel(inner, base, "process reward model"))
        return _StepTokens(tree, tokenizer, aggregate, head, step_token, system, processor)

    @classmethod
    def rlhflow(
        cls,
        model: PreTrainedModel,
        tokenizer: Any = None,
        *,
        good: str = "+",
        bad: str = "-",
        aggregate: str = "last",
        processor: Any = None,
    ) -> ProcessReward:
        """A causal LM that answers each step with a label, as RLHFlow's Llama3.1-8B-PRM: the probability of ``good``.

        Steps are the user's turns, the first behind the question; every earlier one is shown as answered with ``good``.

        Parameters
        ----------
        model : transformers causal LM
        tokenizer : transformers tokenizer, with a chat template, optional
            Needed without a ``processor``.
        good, bad : str
            The labels; the last token of each.
        aggregate : {"last", "min", "mean", "prod"}
        processor : transformers processor, optional
            The model's, for prompts with pictures.

        Raises
        ------
        ValueError, TypeError
            For arguments that are no causal LM, tokenizer or text, for labels that end alike, and a tokenizer without a
            chat template, or by which the ids of a step alone are others than in the conversation.
        """
        check_model("model", model, predicts=True)
        for argument, label in (("good", good), ("bad", bad)):
            check_text(argument, label)
            if not label:
                raise ValueError(f"{argument}={label!r} has no token: give the label that stands for it")
        tree = checked(TreeModel(model, model, "process reward model"))
        return _Labels(tree, tokenizer, aggregate, good, bad, processor)

    # To be written by each form

    mark: list[int]  # ids behind a step; at the last of them it is scored
    link: Sequence[int] = ()  # ids between that and the next step
    lead: str = ""  # text in front of the first step

    def step_scores(self, features: torch.Tensor) -> torch.Tensor:
        """Scores ``[F]`` from the features ``[F, X]`` at marks."""
        raise NotImplementedError

    # What they share

    def _check_ids(self, ids: Sequence[int]) -> None:
        """Of marks and labels: the model must have them."""
        if bad := self._outside(ids):
            raise ValueError(f"the id {bad[0]} of a step's mark or label is {self._vocabulary}")

    def shares_ids(self, prompt: RewardPrompt) -> bool:
        return False  # a step's text is tokenised anew

    def check_policy(self, policy: PreTrainedModel, tokenizer: Any) -> None:
        check_own(self.caches[0].model.model, self.tokenizer, policy, tokenizer)

    def make_rendering(self, policy_tokenizer: Any) -> Rendering:
        return Rendering(self.tokenizer, policy_tokenizer or self.tokenizer, "none", processor=self.processor)

    def text(self, completion: Completion) -> Text:
        steps = self._committed_steps(completion)
        steps = self._followed(steps, completion, len(completion.tokens), partial=not completion.finished)
        if not steps.marks:
            steps = self._with_step(steps, "")
        prefix = self._contexts[completion.response.prompt].prefix
        return Text(completion, prefix + steps.ids, [], [len(prefix) + mark for mark in steps.marks])

    def _committed_steps(self, completion: Completion) -> _Steps:
        """Kept per response: its candidates, of which there are many, share all steps but the last."""
        response = completion.response
        steps = self._committed.get(response, _NO_STEPS)
        ends = tuple(dict.fromkeys((*response.ends, len(response.tokens))))
        if steps.ends != ends:
            steps = steps if steps.ends == ends[: len(steps.ends)] else _NO_STEPS
            for end in ends[len(steps.ends) :]:
                steps = self._followed(steps, completion, end, partial=True)
            self._committed[response] = steps
        return steps

    def _followed(self, steps: _Steps, completion: Completion, end: int, partial: bool) -> _Steps:
        """With the step that ends there, if it has any text; a character that is not complete belongs to the next."""
        tokenizer = completion.tokenizer or self.tokenizer
        text = tokenizer.decode(completion.tokens[:end], skip_special_tokens=True)
        text = text.rstrip("\ufffd") if partial else text
        step = text[steps.characters :].strip()
        after = self._with_step(steps, step) if step else steps
        return after._replace(ends=(*steps.ends, end), characters=max(steps.characters, len(text)))

    def _with_step(self, steps: _Steps, step: str) -> _Steps:
        ids = [*steps.ids, *(self.link if steps.marks else ())]
        ids += encode(self.tokenizer, step if steps.marks else self.lead + step) + self.mark
        return steps._replace(ids=ids, marks=[*steps.marks, len(ids) - 1])

    def close(self, response: Response) -> None:
        self._committed.pop(response, None)
        super().close(response)

    def end(self) -> None:
        super().end()
        if not self._calls:
            self._committed.clear()

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
        self,
        model: TreeModel,
        tokenizer: Any,
        aggregate: str,
        head: nn.Module,
        step_token: str,
        system: str | None,
        processor: Any,
    ) -> None:
        super().__init__(model, tokenizer, aggregate, processor)
        tokenizer = self.tokenizer
        probe = torch.zeros(1, model.text_config.hidden_size, dtype=model.dtype, device=model.device)
        with torch.no_grad():
            labels = head(probe).shape[-1]
        if labels != 2:
            raise ValueError(f"the process reward model's head has {labels} labels; it takes 2, wrong and right")
        mark = tokenizer.convert_tokens_to_ids(step_token)
        if mark is None or mark == tokenizer.unk_token_id:
            raise ValueError(f"step_token={step_token!r} is not in the tokenizer's vocabulary")
        self.head, self.mark, self.system = head, [mark], system
        own = changed(step_token=(step_token, "<extra_0>"), system=(system, QWEN_SYSTEM))
        self._changed = {**self._changed, **own}
        self._check_ids(self.mark)

    def context(self, prompt: RewardPrompt) -> Context:
        rendering = self.rendering(prompt)
        messages = rendering.messages(prompt)
        if not rendering.templated:
            return Context(encode_start(self.tokenizer, "\n\n".join(map(spoken, messages)) + "\n"), [])
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        frame = chat_frame(self.tokenizer, messages, rendering.variables(prompt))
        return rendering.behind(prompt, frame.start, frame.own_start)

    def step_scores(self, features: torch.Tensor) -> torch.Tensor:
        return self.head(features).float().softmax(-1)[:, 1]


class _Labels(ProcessReward):
    lead = " "

    def __init__(self, model: TreeModel, tokenizer: Any, aggregate: str, good: str, bad: str, processor: Any) -> None:
        super().__init__(model, tokenizer, aggregate, processor)
        tokenizer = self.tokenizer
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("a process reward model that labels turns needs a tokenizer with a chat template")
        self._changed = {**self._changed, **changed(good=(good, "+"), bad=(bad, "-"))}
        self.labels = [encode(tokenizer, label)[-1] for label in (good, bad)]
        if self.labels[0] == self.labels[1]:
            raise ValueError(f"good={good!r} and bad={bad!r} end with the same token, {self.labels[0]}")
        _, _, mark, link = self._shown([{"role": "user", "content": "a"}])
        self.mark, self.link = encode(tokenizer, mark), [*encode(tokenizer, good), *encode(tokenizer, link)]
        self._check_ids([*self.labels, *self.mark, *self.link])
        self._check_joints(good)

    def _check_joints(self, good: str) -> None:
        """Steps are tokenised by themselves, which some tokenizers do otherwise than inside a conversation."""
        steps = ("So 1 + 1 = 2.", "It is 2.")
        turns = [{"role": "user", "content": f"1 + 1? {steps[0]}"}, {"role": "assistant", "content": good}]
        turns += [{"role": "user", "content": steps[1]}, {"role": "assistant", "content": good}]
        whole = apply(self.tokenizer, turns, {}, tokenize=True, return_dict=False)
        before, own_start, _, _ = self._shown([{"role": "user", "content": "1 + 1?"}])
        joined = self._with_step(self._with_step(_NO_STEPS, steps[0]), steps[1]).ids
        joined = encode_turn(self.tokenizer, before, own_start) + joined
        if whole[: len(joined)] != joined:
            place = next((i for i, (a, b) in enumerate(zip(whole, joined, strict=False)) if a != b), len(whole))
            raise ValueError(
                "the tokenizer reads steps otherwise alone than in its rendered conversation: from id "
                f"{place} on {joined[place : place + 3]} instead of {whole[place : place + 3]}. This process reward "
                "model cannot be scored step by step"
            )

    def context(self, prompt: RewardPrompt) -> Context:
        rendering = self.rendering(prompt)
        before, own_start, _, _ = self._shown(rendering.messages(prompt), rendering.variables(prompt))
        return rendering.behind(prompt, before, own_start)

    def _shown(self, messages: Messages, variables: Variables = MappingProxyType({})) -> tuple[str, bool, str, str]:
        """Around the steps and labels of a chat: what is in front of the first step (and whether a bos is in it),
        between a step and its label, and between that and the next step."""
        word = stand_in(messages, variables)
        asked: Any = f"{spoken(messages[-1])} {word}"
        if has_pictures(messages[-1]):
            asked = [*(part for part in messages[-1]["content"] if part == PICTURE), {"type": "text", "text": asked}]
        question = {"role": "user", "content": asked}
        label = {"role": "assistant", "content": word}
        turns = [*messages[:-1], question, label, {"role": "user", "content": word}, label]
        parts = rendered(self.tokenizer, turns, variables).split(word)
        if len(parts) != 5:
            raise ValueError("the tokenizer's chat template does not show every turn once and verbatim")
        before, mark, link = parts[:3]
        own_start = bool(self.tokenizer.bos_token) and before.startswith(self.tokenizer.bos_token)
        return before.removesuffix(" "), own_start, mark, link

    def step_scores(self, features: torch.Tensor) -> torch.Tensor:
        return features[:, self.labels].float().softmax(-1)[:, 0]

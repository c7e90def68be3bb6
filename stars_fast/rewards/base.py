"""The protocol every scorer keeps: :class:`Reward`, what it is given to score, and what comes of that."""

from __future__ import annotations

import abc
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, overload

import torch
from transformers import PreTrainedModel

from stars_fast.methods.numbers import shown
from stars_fast.notices import warn
from stars_fast.rewards.values import Score, as_float, one_each, raised
from stars_fast.text.decode import continuation
from stars_fast.text.media import Media
from stars_fast.text.prompts import Messages, is_chat, read_prompts
from stars_fast.text.turns import has_pictures, texts_of

if TYPE_CHECKING:
    from stars_fast.tree.model import TreeModel


@dataclass(eq=False)
class RewardPrompt:
    """One prompt as a scorer sees it. Samples of a prompt share this object."""

    index: int
    source: str | Messages | list[int]  # as the caller wrote it (``reward_prompts`` where given)
    given_ids: list[int] | None  # in the policy's tokenizer; None: read from ``source`` by whoever needs them
    columns: dict[str, Any] = field(default_factory=dict)
    argument: str = "prompts"  # or "reward_prompts": where it came from
    tokenizer: Any = None  # the policy's, for ids that were not given
    warned: set[str] = field(default_factory=set)  # shared by the prompts of a call: what is warned of once in each
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)  # the call's, for templates of either side
    media: Media | None = None  # the policy's, where the prompt has pictures; chats have bare parts in their places

    @property
    def name(self) -> str:
        """What error messages call it."""
        return f"{self.argument}[{self.index}]"

    @property
    def ids(self) -> list[int]:
        """Token ids in the policy's tokenizer.

        Raises
        ------
        ValueError
            If there is no such tokenizer, or it has no template for a chat.
        """
        if self.given_ids is None:
            try:
                variables = self.chat_template_kwargs
                (prompt,) = read_prompts([self.source], self.tokenizer, None, self.argument, variables)
            except ValueError as error:  # it was read alone, as the first
                raise ValueError(str(error).replace(f"{self.argument}[0]", self.name, 1)) from error
            self.given_ids = prompt.ids
        return self.given_ids

    @cached_property
    def without_pictures(self) -> RewardPrompt:
        """The prompt, a chat with pictures, as one of its text alone. Raises ValueError for what is no chat."""
        if not is_chat(self.source):
            raise ValueError(
                f"{self.name} is what a processor made, and its text cannot be told from its pictures: give the chat"
            )
        chat: Any = self.source
        turns = [{**turn, "content": "\n".join(texts_of(turn))} if has_pictures(turn) else turn for turn in chat]
        return replace(self, source=turns, given_ids=None, media=None)


@dataclass(eq=False)
class Response:
    """One response while it grows: what a scorer may keep between segments lies in ``state``."""

    prompt: RewardPrompt
    tokens: list[int] = field(default_factory=list)  # committed, policy ids
    state: Any = None
    ends: list[int] = field(default_factory=list)  # tokens up to the end of each committed segment


@dataclass(eq=False)
class Completion:
    """A response with one candidate segment appended: the thing to be scored."""

    response: Response
    segment: list[int]
    finished: bool = False  # ends the answer: EOS, a stop string, a stopping criterion, or max_new_tokens
    eos: bool = False  # the segment's last token is the EOS that ended it
    tokenizer: Any = None  # the policy's
    state: Any = None
    hidden: torch.Tensor | None = None  # [H], the policy's last hidden state at the last token, for who needs it

    @property
    def tokens(self) -> list[int]:
        """The response up to and including the segment, policy ids."""
        return self.response.tokens + self.segment

    @property
    def text(self) -> str:
        """The response's text, special tokens left out. An unfinished character at the end is held back.

        Raises ValueError without a tokenizer.
        """
        return self._held_back(self._decode(self.tokens))

    @property
    def continuation(self) -> str:
        """The text as it goes on from the prompt's: some tokenizers drop the space in front when decoding it alone."""
        if self.tokenizer is None:
            return self.text
        text = continuation(self.tokenizer, self.response.prompt.ids, self.tokens, skip_special_tokens=True)
        return self.text if text is None else self._held_back(text)

    def _decode(self, tokens: list[int]) -> str:
        if self.tokenizer is None:
            raise ValueError("a completion has no text without a tokenizer: pass tokenizer=")
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _held_back(self, text: str) -> str:
        return text if self.finished else text.rstrip("\ufffd")


class Reward(abc.ABC):
    """Scores completions. Only :meth:`score` must be written; the rest lets a scorer keep state between segments.

    An engine opens a *session* (:meth:`begin`, one :meth:`end`). Prompts of many callers join it (:meth:`open`) and
    leave it (:meth:`forget`) while it lasts. All of these are called by one thread at a time, not always
    the same; :meth:`check` by any.

    Attributes
    ----------
    partial : bool
        Whether the reward makes sense on an unfinished answer. Segment-level methods refuse a scorer without it.
    needs_hidden_state : bool
        Whether the engine sets ``Completion.hidden`` before :meth:`score`.
    reads_text : bool
        Whether it is a function of whole texts, which half words and characters would mislead.
    in_order : bool
        Whether candidates are scored in the order in which they are looked at, in several calls a heartbeat where these
        are many, so that those behind an accepted one need not be: for scorers whose time grows with what they are
        given. Others see all candidates in one call.
    tokens : int
        Tokens encoded since :meth:`begin`, for ``stats["reward_tokens"]``.
    """

    partial: bool = True
    needs_hidden_state: bool = False
    reads_text: bool = False
    in_order: bool = False
    tokens: int = 0
    _changed: Mapping[str, Any] = MappingProxyType({})  # settings that rewards depend on, and that are not the defaults
    unsure: bool = False  # something was raised since :meth:`begin`: the engine ends the session once nobody needs it
    _calls: int = 0  # sessions that began and have not ended, refused ones included

    def check(self, prompts: Sequence[RewardPrompt], max_new_tokens: int, kv_cache_tokens: int | None) -> None:
        """A call of the engine is asked for: ValueError for prompts that cannot be scored, naming the prompt's index
        and the limit. It may never begin, and others may be running, in other threads: this does not disturb them.
        """

    def begin(
        self, prompts: Sequence[RewardPrompt], max_new_tokens: int, rows: int, kv_cache_tokens: int | None
    ) -> None:
        """A session starts: at most ``rows`` responses grow at once. One :meth:`end` follows, whatever happens, even
        where this raises.

        ``prompts`` and ``max_new_tokens`` are the longest that are known of by now, for the size of pools.
        """

    def open(self, prompts: Sequence[RewardPrompt], max_new_tokens: int) -> None:
        """These prompts join the session: called once for each before any of its completions is scored, also for those
        that :meth:`begin` was told of. By default they are checked again.

        Raises
        ------
        ValueError
            For prompts that cannot be scored, naming the prompt and the limit; none of these prompts is open then.
        """
        self.check(prompts, max_new_tokens, None)

    def fits(self, prompts: Sequence[RewardPrompt], max_new_tokens: int) -> bool:
        """Whether the pools that :meth:`begin` made are large enough for these prompts, which were checked.

        Where they are not, the engine lets the session run empty and begins another.
        """
        return True

    def forget(self, prompts: Sequence[RewardPrompt]) -> None:
        """Nobody answers these any more: free what is kept of them, but for what responses that are open still need."""

    def read_ahead(self, prompts: Sequence[RewardPrompt], most: int) -> Sequence[RewardPrompt]:
        """Encode at most ``most`` tokens of prompts whose answers are scored soon; which of them are not done yet.

        So that a long prompt does not keep others' candidates waiting. A scorer may leave it all to :meth:`score`.
        """
        return []

    @abc.abstractmethod
    def score(self, completions: Sequence[Completion]) -> Sequence[float | Exception | None] | torch.Tensor:
        """One reward per completion; ``-inf`` rejects for good. An exception in a reward's place fails that completion
        alone. Where this raises, each completion is asked again alone: what it costs or does besides may happen twice.

        A float tensor ``[n]`` may stay on the device that computed it: it is copied once, when somebody looks.
        """

    def parts(self, completion: Completion) -> dict[str, float] | None:
        """What the reward of the completion just scored is made of, by name; None for a scorer without parts."""
        return None

    def commit(self, completion: Completion) -> None:
        """The completion's segment joins its response (whose ``tokens`` the caller extends afterwards).

        What this raises ends the request whose answer it is, as does what :meth:`discard`, :meth:`close`,
        :meth:`fork` and :meth:`fork_at` raise; one that has ended by then keeps its answer.
        """

    def discard(self, completion: Completion) -> None:
        """The completion was rejected: forget it."""

    def close(self, response: Response) -> None:
        """The response is finished: forget it."""

    def fork(self, response: Response) -> Response:
        """A second response that goes on from this one."""
        return Response(response.prompt, list(response.tokens), ends=list(response.ends))

    def fork_at(self, response: Response, length: int) -> Response:
        """A second response that goes on from the first ``length`` tokens of this one, which are whole segments.

        By default it comes without ``state``, as a response does whose request had to give way.
        """
        return Response(response.prompt, response.tokens[:length], ends=[n for n in response.ends if n <= length])

    def end(self) -> None:
        """The session is over, normally or not: free everything."""

    def check_policy(self, policy: PreTrainedModel, tokenizer: Any) -> None:
        """An engine is made, of this policy and its tokenizer (None: ids alone): ValueError if its ids, text or hidden
        state cannot be read, or if it is likely that they would be misread.
        """

    @property
    def described(self) -> str:
        """What tells it from other scorers, besides its models, by settings that change its rewards: a fit is made for
        one.
        """
        own = ", ".join(f"{name}={_told(value)}" for name, value in self._changed.items())
        return f"{type(self).__name__} ({own})" if own else type(self).__name__

    @property
    def tree_models(self) -> list[TreeModel]:
        """Models that keep keys and values on their device, which the engine divides among them and the policy."""
        return []

    def _enter_call(self) -> None:
        """For scorers that serve one session at a time: refuse a second one. First thing in :meth:`begin`."""
        self._calls += 1
        if self._calls > 1:
            raise RuntimeError(
                f"this {type(self).__name__} is scoring for another call of an engine: let that finish (exhaust or "
                "close its stream), or give each engine a scorer of its own"
            )

    def _leave_call(self) -> bool:
        """Whether the session that ends is the one that was let in. First thing in :meth:`end`."""
        self._calls = max(self._calls - 1, 0)
        return not self._calls


def changed(**settings: tuple[Any, Any]) -> dict[str, Any]:
    """Of settings, each with its default, those that are not the default."""
    return {name: value for name, (value, default) in settings.items() if value != default}


def _told(value: Any) -> str:
    """A setting as it reads in every process: mappings in one order, and functions without their address."""
    ordered = dict(sorted(value.items())) if isinstance(value, Mapping) else value
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(ordered))


def check_model(argument: str, model: Any, predicts: bool = False) -> None:
    """Raise TypeError for anything but a loaded transformers model (one that ``predicts`` tokens, where that is said),
    and ValueError for one whose outputs have no names.
    """
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "config"):
        raise TypeError(f"{argument} is a {type(model).__name__}, {shown(model)}: give a loaded transformers model")
    if getattr(model.config, "return_dict", True) is False:
        raise ValueError(f"{argument}: the config of this {type(model).__name__} has return_dict=False: set it to True")
    if predicts and getattr(model, "get_output_embeddings", lambda: None)() is None:
        raise TypeError(f"{argument} is a {type(model).__name__} without a language-model head: give a causal LM")


def check_text(argument: str, text: Any) -> None:
    """Raise TypeError for anything but text."""
    if not isinstance(text, str):
        raise TypeError(f"{argument}={shown(text)} must be text")


class Scores(Sequence[Score]):
    """(reward, error) of each completion: a reward of NaN, with the cause in words, where it could not be scored.

    Attributes
    ----------
    tensor : torch.Tensor, optional
        ``[n]``, the scorer's own and where it made it, if it gave one. What stands for an error in it (NaN, +inf) is
        there as it came. The pairs are made of it in one copy, once one is looked at.
    """

    def __init__(self, pairs: Sequence[Score] | None, tensor: torch.Tensor | None = None) -> None:
        self._pairs, self.tensor = pairs, tensor

    @property
    def pairs(self) -> Sequence[Score]:
        """All of them."""
        if self._pairs is None:
            assert self.tensor is not None
            self._pairs = [as_float(value) for value in self.tensor.tolist()]
        return self._pairs

    def __len__(self) -> int:
        return len(self.pairs) if self.tensor is None else len(self.tensor)

    @overload
    def __getitem__(self, place: int) -> Score: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Score]: ...
    def __getitem__(self, place: int | slice) -> Score | Sequence[Score]:
        return self.pairs[place]


def score_each(reward: Reward, completions: Sequence[Completion]) -> Scores:
    """Score all; where that fails, one by one, so that one bad completion does not cost the others theirs."""
    try:
        values = _checked(reward, completions)
        if isinstance(values, torch.Tensor):
            return Scores(None, values)
        return Scores([as_float(value) for value in values])
    except Exception as error:
        reward.unsure = True
        scores = [_score_alone(reward, completion) for completion in completions]
        kind = raised(error).partition(":")[0]
        if not any(message is not None and message.startswith(kind) for _, message in scores):
            _warn_of_lost_batch(completions, raised(error))
        return Scores(scores)


def _warn_of_lost_batch(completions: Sequence[Completion], cause: str) -> None:
    """Nobody's error tells it, so say once a call of the engine that its rewards came one at a time."""
    warned = completions[0].response.prompt.warned
    if "batch" not in warned:
        warned.add("batch")
        warn(
            f"{cause}, for {len(completions)} completions at once but not for each alone: they are scored one by one, "
            "which is slow"
        )


def _score_alone(reward: Reward, completion: Completion) -> Score:
    try:
        return as_float(_checked(reward, [completion])[0])
    except Exception as error:
        return float("nan"), raised(error)


def _checked(reward: Reward, completions: Sequence[Completion]) -> list[Any] | torch.Tensor:
    return one_each(reward.score(completions), len(completions))

"""What a method is: a rule for the shared loop, with its parameters. Nothing here needs torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

from stars_fast.methods.numbers import MOST, integer, real, shown
from stars_fast.names import near

# Share of candidates accepted: aimed at where targets are calibrated, and expected before anything is seen.
ACCEPTANCE = 0.3
_PLAIN = (bool, int, float, str, type(None))


class Settings(Protocol):
    """What a method reads of :class:`stars_fast.StarsConfig`."""

    @property
    def segment_length(self) -> int: ...
    @property
    def max_new_tokens(self) -> int: ...
    @property
    def max_attempts(self) -> int: ...
    @property
    def candidates(self) -> int | str: ...
    @property
    def temperature(self) -> float | None: ...
    @property
    def top_k(self) -> int | None: ...
    def replace(self: SettingsT, **overrides: Any) -> SettingsT:
        """A copy with some fields changed."""
        ...


SettingsT = TypeVar("SettingsT", bound=Settings)


class Scorer(Protocol):
    """What a method asks of a :class:`stars_fast.rewards.Reward`."""

    partial: bool
    needs_hidden_state: bool
    reads_text: bool


class Scored(Protocol):
    """What a method reads of a candidate."""

    reward: float  # NaN where it was not asked for
    unscored: bool
    attempt: int  # index among the segment's candidates
    gumbel: float  # noise for methods that draw among candidates
    draw: Any  # ``tokens``, ``logprobs``, ``sampling_logprobs``
    completion: Any  # ``hidden``: the policy's hidden state [H] at the last token, where the method needs it

    @property
    def segment(self) -> int:
        """Index of its segment."""
        ...

    @property
    def before(self) -> float | None:
        """Reward of the answer without it; None at the first segment."""
        ...


class Segments(NamedTuple):
    """Where a segment ends, besides its greatest length (``StarsConfig.segment_length``) and the answer's end."""

    entropy: float = math.inf  # before a token whose distribution, untempered, has this much entropy (nats) ...
    shortest: int = 1  # ... once it has this many tokens
    delimiter: str | None = None  # after the token that completes this text


@dataclass(frozen=True)
class Method:
    """A choice of segmenter, proposal, scorer, selection and schedule. Fields are its parameters.

    As it stands: candidates of K tokens drawn from the policy, the first accepted by STARS' rule, the best of
    ``max_attempts`` where none is. A method of one's own overrides what differs; see ``docs/methods.md``.

    Attributes
    ----------
    name : str
        What ``StarsConfig(method=...)`` calls it.
    loop : str
        How its requests live in the loop (``stars_fast.loop``): "segments" (one answer grows, the first accepted
        candidate is committed), "plans", "stopping", "trials", "chains", "population", "tokens", "rsd", "persona" or
        "navigator".
    scores_unfinished : bool
        Whether unfinished answers are scored. A reward with ``partial=False`` serves methods that do not ask for it.
    has_target : bool
        Whether r_star matters: calibrated from pilot responses where ``target_reward`` is None.
    needs_hidden_state : bool
        Whether :meth:`values` reads ``Completion.hidden``.
    reserves : bool
        Whether :meth:`slots` are of all of a request's answers together, which are set aside when it is admitted.
    uses_fit : bool
        Whether ``StarsConfig(fit=...)`` matters.
    gives_hidden_state : bool
        Whether the policy reads every candidate that is scored, so that it has a hidden state.
    drawn : bool
        Whether all candidates are drawn from the policy's law, in whose place that of a mix may stand
        (:class:`stars_fast.methods.Guided`).
    """

    name: ClassVar[str]
    loop: ClassVar[str] = "segments"
    scores_unfinished: ClassVar[bool] = True
    finished_only: ClassVar[Sequence[str]]  # names of the methods that do not
    has_target: ClassVar[bool] = True
    needs_hidden_state: ClassVar[bool] = False
    gives_hidden_state: ClassVar[bool] = True
    drawn: ClassVar[bool] = True
    reserves: ClassVar[bool] = False
    uses_fit: ClassVar[bool] = False

    @property
    def selection(self) -> Method:
        """What decides about candidates: itself, unless it is about who draws them."""
        return self

    def selecting(self, method: Method) -> Method:
        """The same with another :attr:`selection`."""
        return method

    @property
    def guides(self) -> Sequence[Any]:
        """Whose logits are added to the policy's: (model, weight, prompt transform) of each."""
        return ()

    @property
    def own_weight(self) -> float:
        """Of the policy's logits in that sum."""
        return 1.0

    def rule(self, config: SettingsT) -> SettingsT:
        """The call's settings with what this method decides itself."""
        return config

    def segments(self) -> Segments:
        """Where a segment ends."""
        return Segments()

    @property
    def expected_acceptance(self) -> float:
        """Share of the candidates that end their segment, before any is seen: what is drawn side by side goes by it."""
        return ACCEPTANCE

    @property
    def draft_model(self) -> Any:
        """A second policy, where the method has one: a model, path or hub id."""
        return None

    @property
    def answers_a_plan(self) -> int | None:
        """How many of a prompt's samples go on from one plan, where the method has plans."""
        return None

    @property
    def preferences(self) -> Sequence[str | Sequence[int]]:
        """What every prompt is put under, one after another, in place of the prompt alone."""
        return ()

    @property
    def networks(self) -> Sequence[Any]:
        """What :meth:`values` runs; modules among them are in evaluation mode meanwhile."""
        return ()

    def in_ids(self, encode: Callable[[str], list[int]], vocabulary: int) -> Method:
        """This method with ids in place of texts that the policy is to read; itself where it has none.

        Raises
        ------
        ValueError
            For ids outside a vocabulary of this size; ``encode`` raises it where there is no tokenizer.
        """
        return self

    def scaffold(self, config: Settings) -> int:
        """Most tokens of a response's context that are neither prompt nor answer."""
        return 0

    def slots(self, config: Settings) -> int:
        """Most slots of a response: its tokens, and a waiting best candidate beside the one being drawn."""
        return config.max_new_tokens + min(config.segment_length, config.max_new_tokens)

    def rows(self, config: Settings) -> int:
        """Most candidates of a request in a heartbeat."""
        return config.max_attempts

    def passes(self, drawn: int, committed: int) -> tuple[int, int]:
        """Tokens that went through the policy and through a draft model, about, prompts left out."""
        return drawn, 0

    def pilot(self) -> Method:
        """What draws the unguided responses of a calibration: the same segments, scored where these are."""
        return self

    def check(self, reward: Scorer) -> None:
        """Raise ValueError for a scorer that this method cannot use."""
        if self.scores_unfinished and not reward.partial:
            raise ValueError(
                f"method={self.name!r} scores unfinished answers, which {type(reward).__name__} (partial=False) cannot "
                f"do; {', '.join(self.finished_only[:-1])} and {self.finished_only[-1]} score finished ones only"
            )
        if reward.needs_hidden_state and not self.gives_hidden_state:
            raise ValueError(
                f"method={self.name!r} scores text that the policy has not read, and {type(reward).__name__} needs the "
                "policy's hidden state there"
            )

    def values(self, candidates: Sequence[Scored]) -> list[float]:
        """What the selection compares, one number per scored candidate: the reward, 0 where none was asked for."""
        return [0.0 if candidate.unscored else candidate.reward for candidate in candidates]

    @property
    def changed(self) -> dict[str, Any]:
        """Parameters that are not the defaults."""
        values = {field.name: (getattr(self, field.name), field.default) for field in dataclasses.fields(self)}
        return {name: value for name, (value, default) in values.items() if value is not default and value != default}

    def to_dict(self) -> str | dict[str, Any]:
        """The name where all parameters are the defaults, else the name and those that are not.

        Raises
        ------
        ValueError
            For a parameter that is an object, such as a model.
        """
        for name, value in self.changed.items():
            if not all(isinstance(v, _PLAIN) for v in (value if isinstance(value, (list, tuple)) else [value])):
                raise ValueError(
                    f"method={self.name!r}: {name} is a {type(value).__name__}, which cannot be saved: give a path or "
                    "hub id, or leave it out and set it after loading"
                )
        return {"name": self.name, **self.changed} if self.changed else self.name

    def _check_integer(self, name: str, most: int = MOST) -> None:
        """Check a parameter that is at least 1, and keep it as Python's own number."""
        object.__setattr__(self, name, integer(f"{self.name}: {name}", getattr(self, name), 1, most))

    def _check_real(self, name: str, low: float, high: float = math.inf, **limits: Any) -> None:
        """Check a parameter against an interval, and keep it as Python's own number."""
        object.__setattr__(self, name, real(f"{self.name}: {name}", getattr(self, name), low, high, **limits))

    def _check_delimiter(self) -> None:
        delimiter = getattr(self, "delimiter", None)
        if delimiter is not None and (not isinstance(delimiter, str) or not delimiter):
            raise ValueError(
                f"{self.name}: delimiter={shown(delimiter)} must be text, or None for steps of a fixed length"
            )


@dataclass(frozen=True)
class Trial(Method):
    """Whole answers are drawn, scored and tested; every attempt is an unguided response of its own."""

    loop: ClassVar[str] = "trials"
    scores_unfinished: ClassVar[bool] = False


@dataclass(frozen=True)
class Enumerated(Method):
    """Candidates are not drawn: they are the policy's likely next tokens, a segment being one token."""

    loop: ClassVar[str] = "tokens"
    drawn: ClassVar[bool] = False
    most: ClassVar[str]  # the field that says how many tokens are candidates

    def rule(self, config: SettingsT) -> SettingsT:
        return config.replace(segment_length=1, max_attempts=getattr(self, self.most))

    def tokens(self, logits: Any) -> list[int]:
        """Ids of the candidates, in the order in which they are looked at. logits ``[V]`` float32."""
        raise NotImplementedError


@dataclass(frozen=True)
class Population(Method):
    """Several answers grow at once; after each segment some are continued, once or several times."""

    loop: ClassVar[str] = "population"
    has_target: ClassVar[bool] = False
    reserves: ClassVar[bool] = True

    def rule(self, config: SettingsT) -> SettingsT:
        return config.replace(target_reward=-math.inf, base_reward=None)

    @property
    def width(self) -> int:
        """Candidates in each round."""
        raise NotImplementedError

    @property
    def children(self) -> int:
        """Candidates of each answer that goes on. The first round draws ``width`` from the prompt."""
        raise NotImplementedError

    @property
    def weighs_increments(self) -> bool:
        """Whether :meth:`select` gets rewards less what they were when it last chose (at first: 0), not rewards."""
        return False

    def select(self, values: Sequence[float], uniforms: Sequence[float]) -> list[int] | None:
        """Places of the answers that stay, which may repeat; None where it does not choose: each goes on.

        ``values`` are those of all answers: the finished ones, then this round's candidates. ``uniforms`` are ``width``
        independent numbers in (0, 1).
        """
        raise NotImplementedError

    def answer(self, values: Sequence[float], uniform: float) -> int:
        """Place of the one that is returned once all have finished: the highest value, ties to the first."""
        return max(range(len(values)), key=values.__getitem__)

    def rows(self, config: Settings) -> int:
        return self.width

    def slots(self, config: Settings) -> int:
        """Most slots that the answers of one request take together, candidates included, the prompt not."""
        kept, longest = self.width // self.children, config.max_new_tokens
        return min(self.width * longest, kept * longest + self.width * config.segment_length)


def method_from(value: Any, known: Mapping[str, type[Method]]) -> Method:
    """The method that a name, a mapping with ``name`` and parameters, or a method object stands for.

    Raises
    ------
    ValueError, TypeError
        For an unknown name or parameter, listing the known ones.
    """
    if isinstance(value, Method):
        if not isinstance(getattr(value, "name", None), str):
            raise TypeError(f"method={shown(value)} has no name: give its class one, name: ClassVar[str] = ...")
        return value
    if isinstance(value, type) and issubclass(value, Method):
        raise TypeError(f"method={value.__name__} is a class: write {value.__name__}(...)")
    name, parameters = value, {}
    if isinstance(value, Mapping):
        parameters = {key: v for key, v in value.items() if key != "name"}
        name = value.get("name")
    if not isinstance(name, str) or name not in known:
        asked = name if isinstance(name, str) else value
        raise ValueError(f"method={shown(asked)} is unknown{near(asked, known)}; known methods: {', '.join(known)}")
    fields = [field.name for field in dataclasses.fields(known[name])]
    for parameter in parameters:
        if parameter not in fields:
            raise ValueError(no_parameter(known[name], parameter))
    return known[name](**parameters)


def no_parameter(method: type[Method], name: str) -> str:
    """What is said of a parameter that a method does not have."""
    fields = [field.name for field in dataclasses.fields(method)]
    return (
        f"method={method.name!r} has no parameter {shown(name)}{near(name, fields)}; it has "
        f"{', '.join(fields) or 'none'}"
    )

"""What comes back: :class:`StarsOutput`, its traces, and the events of a stream."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple, Protocol

import torch

_SHOWN = 80  # characters of the first answer


class Cause(str):
    """Why a request failed: in words, which is all that copies keep, and the exception behind them.

    Attributes
    ----------
    exception : BaseException or None
        With its traceback. It holds its frames, and they what they worked on.
    kind : str or None
        Name of the exception's class: of what went wrong, the part that quotes nobody.
    """

    exception: BaseException | None
    kind: str | None

    def __new__(cls, words: str, exception: BaseException | None = None, kind: str | None = None) -> Cause:
        cause = super().__new__(cls, words)
        cause.exception, cause.kind = exception, kind if exception is None else type(exception).__name__
        return cause

    @classmethod
    def of(cls, error: BaseException, before: str = "") -> Cause:
        """The words are those ``before``, the exception's class and what it says."""
        try:
            said = " ".join(str(error).split("\n"))
        except Exception as another:  # of a class of the user's own
            said = f"(what it says cannot be read: {type(another).__name__})"
        return cls(f"{before}{type(error).__name__}: {said}", error)

    def after(self, before: str) -> Cause:
        """The same exception, with words in front."""
        return Cause(before + self, self.exception, self.kind)

    def without_frames(self) -> Cause:
        """For who may keep it."""
        return Cause(str(self), kind=self.kind)

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (str(self),)


def as_cause(words: str) -> Cause:
    """What may be plain words, without an exception then."""
    return words if isinstance(words, Cause) else Cause(words)


class CandidateTrace(NamedTuple):
    """One candidate that was drawn. What that is under each method stands in docs/trace.md."""

    attempt: int  # index among the segment's candidates; under populations and chains, among all of the answer's
    tokens: list[int]
    reward: float  # of prompt + response up to and including it; NaN where nobody asked for it
    score: float  # what the selection compared
    threshold: float  # what it was tested against
    verdict: str  # "accepted", "rejected", "fallback", "unseen" (behind the one that was committed) or "error"
    logprob: float  # sum of the raw policy log-probabilities, nats
    parts: dict[str, float] | None = None  # of the reward
    parent: int | None = None  # of a population's: the attempt that it continues; None at the beginning


class Scaffold(NamedTuple):
    """What the policy read before a segment and is no part of the answer: see :class:`stars_fast.methods.Navigator`."""

    tokens: list[int]
    block: int  # the place of the instruction among the method's
    state: list[float] | None = None  # what it was chosen by; None where there was no choice


class SegmentTrace(NamedTuple):
    """One committed segment. What ``threshold``, ``attempts`` and ``accepted`` mean under methods other than STARS
    stands in docs/methods.md.
    """

    tokens: list[int]
    reward: float  # of prompt + response up to and including this segment; NaN where the method did not ask for it
    threshold: float  # what it was tested against; NaN where it was not
    attempts: int  # candidates looked at in index order up to the winner; all of them for a fallback
    accepted: bool  # False for the fallback
    logprob: float  # sum of the raw policy log-probabilities, nats; NaN for a draft model's text
    parts: dict[str, float] | None = None  # what the reward is made of, for a scorer that says so
    candidates: list[CandidateTrace] | None = None  # in the order of their attempts, where ``trace`` asked for them
    scaffold: Scaffold | None = None  # under a method that has any


@dataclass(frozen=True)
class SegmentEvent:
    """What :meth:`StarsEngine.stream` yields: a committed segment, or the end of a request that failed.

    An ``error`` beside a ``finish_reason`` of "stop" or "length" is of what came after the answer was whole: its text
    could not be decoded, or the scorer could not let go of it.
    """

    index: int  # row of the output: prompt * num_return_sequences + sample
    prompt_index: int
    sample_index: int
    segment: SegmentTrace | None  # None only where the request failed
    text: str | None  # the text this segment adds; None without a tokenizer
    finish_reason: str | None  # set on a request's last event
    error: str | None = None


@dataclass(eq=False)
class Stats:
    """Counts of one call. ``policy_tokens == committed_tokens + discarded_tokens``."""

    policy_tokens: int = 0  # tokens sampled: from the policy, and from the draft model where a method has one
    draft_tokens: int = 0  # of these, the draft model's
    scaffold_tokens: int = 0  # that the policy read and that are in no answer: instructions, questions about it
    reward_tokens: int = 0  # tokens the reward model encoded (0 for a callable): not of all that was drawn
    committed_tokens: int = 0
    heartbeats: int = 0
    rows: Counter[int] = field(default_factory=Counter)  # candidates drawn side by side -> heartbeats
    requests: Counter[int] = field(default_factory=Counter)  # requests (or answers) they belong to -> heartbeats
    preemptions: int = 0  # requests that gave their slots back for a while, and were encoded again
    seconds: float = 0.0
    calibration_tokens: int = 0  # of the discarded ones, those of the pilot responses
    calibration_seconds: float = 0.0  # until the last prompt had its target

    @property
    def discarded_tokens(self) -> int:
        """What was drawn and is in no answer."""
        return self.policy_tokens - self.committed_tokens

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "discarded_tokens": self.discarded_tokens}


class Origin(Protocol):
    """What a traced output came of. Who makes outputs has it: writing it down takes what decodes texts."""

    def save(self, output: StarsOutput, path: str | os.PathLike[str]) -> None: ...

    def write(self, output: StarsOutput, file: IO[bytes], before: int = 0) -> int: ...


@dataclass(repr=False)
class StarsOutput:
    """Result of :meth:`StarsEngine.generate`. Row ``i * num_return_sequences + j`` is sample j of prompt i.

    Attributes
    ----------
    sequences : torch.Tensor
        int64 ``[rows, length]``, prompt and completion, right-padded.
    completions : list of list of int
        Without the prompt; the EOS that ended one is included.
    texts : list of str, or None without a tokenizer
        Completions, special tokens left out; "" where the tokenizer cannot decode one, and ``errors`` says so.
    rewards : list of float
        The reward of what was returned; NaN for a request that failed.
    finish_reasons : list of str
        "stop" (EOS, stop string, stopping criterion), "length" or "error".
    errors : list of str or None
        Why a request failed. Beside "stop" or "length", what went wrong once the answer was whole: its text could not
        be decoded, or the scorer could not let go of it. Tracebacks are in the log "stars_fast".
    logprobs, sampling_logprobs : list of list of float
        Per token, nats: of the raw policy (NaN for a token that it has not read, under "rsd"), and of the distribution
        after temperature and filters.
    segments : list of list of SegmentTrace
    stats : dict
        The fields of :class:`Stats`.
    origin : Origin, optional
        What :meth:`save_trace` writes beside the rest, where ``trace`` asked for it.
    """

    sequences: torch.Tensor
    completions: list[list[int]]
    texts: list[str] | None
    rewards: list[float]
    finish_reasons: list[str]
    errors: list[str | None]
    logprobs: list[list[float]]
    sampling_logprobs: list[list[float]]
    segments: list[list[SegmentTrace]]
    stats: dict[str, Any]
    origin: Origin | None = None

    def __repr__(self) -> str:
        """How many answers, what they took, and how the first begins: the fields are pages long."""
        counts = ", ".join(f"{name}={self.stats.get(name)}" for name in ("policy_tokens", "committed_tokens"))
        failed = sum(error is not None for error in self.errors)
        first = self.texts[0] if self.texts else self.completions[0] if self.completions else None
        begins = repr(first)
        begins = begins if len(begins) <= _SHOWN else f"{begins[:_SHOWN]}..."
        return f"StarsOutput({len(self.completions)} answers, {failed} with an error, {counts}, first: {begins})"

    def save_trace(self, path: str | os.PathLike[str]) -> None:
        """Write one line of JSON per answer, which ``stars-fast trace`` shows; docs/trace.md has the fields.

        The file takes its name in one step, once it is whole.

        Raises
        ------
        ValueError
            If the output was generated without ``trace=True``.
        OSError
            If the file cannot be written.
        """
        if self.origin is None:
            raise ValueError("save_trace: this output has no trace: pass trace=True to generate")
        self.origin.save(self, path)

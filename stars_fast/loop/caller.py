"""Who submits requests to the core, and what of it they take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from stars_fast.loop.request import Request
from stars_fast.policy.policy import Policy
from stars_fast.rewards.base import RewardPrompt

# Of a prompt with its answer, and of a segment, where a session does not say: what is set aside grows with them.
MOST_POSITIONS, SEGMENT_LENGTH = 8192, 32


class Size(NamedTuple):
    """What a caller's requests take, at most: pools are made for it."""

    length: int  # of a prompt with its answer
    slots: int  # of all that one request holds at a time
    holders: int  # requests that hold slots side by side
    rows: int
    segment_length: int
    max_new_tokens: int
    prompts: Sequence[RewardPrompt] = ()
    beside: Sequence[Policy] = ()  # models with trees of their own: a draft model, guides

    @classmethod
    def of_session(cls, rows: int, length: int, segment_length: int) -> Size:
        """For whoever may come, with up to so many tokens."""
        return cls(length, length + segment_length, rows, rows, segment_length, length)


class Caller(Protocol):
    """Who submits requests, and is told what becomes of them, by whichever thread takes the step."""

    size: Size
    deadline: float | None  # of time.monotonic()

    @property
    def has_news(self) -> bool:
        """Whether there is something to take: an event, or the end."""

    def start(self) -> Sequence[Request]:
        """Its first requests."""

    def moved(self, request: Request) -> Sequence[Request]:
        """A request has committed a segment, or has ended. Returns further ones."""

    def fail(self, error: Exception, live: Sequence[Request]) -> None:
        """What all callers share has failed for good: nothing comes of these requests but what they have."""

    def end(self, error: BaseException | None) -> None:
        """All its requests have ended, or were ended because of ``error``."""

"""State of one request (a sample of a prompt) and of its candidates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from stars_fast.outputs import SegmentTrace
from stars_fast.policy.policy import Draw
from stars_fast.policy.steps import RowProcessor
from stars_fast.rewards import Completion, Response, RewardPrompt
from stars_fast.text.decode import TextStream

# Tokens of a completion so far -> whether it ends there (a stop string, a stopping criterion). Asked after every token.
StopTest = Callable[[list[int]], bool]


@dataclass(eq=False)
class PromptNode:
    """A prompt in the policy's tree, shared by its samples."""

    ids: list[int]
    reward_prompt: RewardPrompt
    node: int = -1  # in the tree as long as a sample runs
    encoded: int = 0  # tokens that the node holds
    logits: torch.Tensor | None = None  # [V], once it holds all of them
    empty_reward: float | None = None  # r(x), once scored
    personas: Sequence[list[int]] = ()  # its ids under the preferences of who judges and who drafts


@dataclass(eq=False)
class Trunk:
    """What a request holds of a policy's tree: the leaf its answer has grown to."""

    prompt: PromptNode
    leaf: int = -1
    logits: torch.Tensor | None = None  # [V], after the leaf
    pending: list[int] = field(default_factory=list)  # committed tokens that are not in the tree (yet, or any more)


@dataclass(eq=False)
class Candidate:
    """A drawn segment of a request, while it is being judged."""

    draw: Draw
    completion: Completion
    ended: bool  # ends the answer before max_new_tokens does
    leaf: int = -1  # the node that it continues
    place: int = 0  # of the trunks whose tree its branch is in
    reward: float = float("nan")
    score: float = float("nan")  # what the selection compares; the reward, unless the method says otherwise
    unscored: bool = False  # the reward was not asked
    parts: dict[str, float] | None = None  # of the reward
    gumbel: float = 0.0  # noise for methods that draw among candidates
    threshold: float = float("nan")
    error: str | None = None


@dataclass(eq=False)
class Request:
    """One sample of one prompt."""

    index: int  # row of the output
    prompt_index: int
    sample_index: int
    prompt: PromptNode
    key: int  # of the random numbers, int64
    target: float  # r_star
    base: float | None  # r0; None until r(x) is scored
    beta: float
    response: Response
    processor: RowProcessor | None = None
    stop: StopTest | None = None
    # Progress
    trunks: list[Trunk] = field(init=False)  # one per tree that the method uses
    prompts: Sequence[PromptNode] = field(init=False)  # what its answers stand on in the policy's tree
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampling_logprobs: list[float] = field(default_factory=list)
    segments: list[SegmentTrace] = field(default_factory=list)
    reported: int = 0  # segments already streamed
    text: TextStream = field(default_factory=TextStream)  # what of the answer's text was streamed
    # The segment being drawn
    attempts: int = 0
    best: Candidate | None = None
    best_attempt: int = -1
    limit: int | None = None  # candidates that there are, where they can be counted
    # Several answers at once: each is a request of its own, and this one stands for all of them
    members: list[Request] = field(default_factory=list)
    width: int = 1  # rows it takes in a heartbeat, at most
    reserve: int | None = None  # slots set aside for all of it; None: admitted by what it holds
    # Evidence for the scheduler
    acceptance_sum: float = 0.0
    scored: int = 0
    # Result
    reward: float = float("nan")
    finish_reason: str | None = None
    error: str | None = None

    def __post_init__(self) -> None:
        self.trunks, self.prompts = [Trunk(self.prompt)], (self.prompt,)

    @property
    def leaves(self) -> list[Request]:
        """The answers that grow: its own, or those of its members that are not finished."""
        return [member for member in self.members if member.finish_reason is None] if self.members else [self]

"""State of one request (a sample of a prompt) and of its candidates, and what the loop asks of its strategy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Protocol

import torch

from stars_fast.config import StarsConfig
from stars_fast.methods.base import Method, Segments
from stars_fast.methods.stopping import Search
from stars_fast.outputs import CandidateTrace, Cause, Scaffold, SegmentTrace, Stats
from stars_fast.policy.leaf import Draw, Leaf, RowProcessor, Sampling
from stars_fast.rewards.base import Completion, Response, RewardPrompt
from stars_fast.text.decode import TextStream
from stars_fast.text.media import Media

# Tokens of a completion so far -> whether it ends there (a stop string, a stopping criterion). Asked after every token.
StopTest = Callable[[list[int]], bool]

_ids = count()


@dataclass(frozen=True, eq=False)
class Terms:
    """What the requests of one call have in common."""

    config: StarsConfig  # with what its method decides itself
    method: Method
    segments: Segments
    sampling: Sampling
    stats: Stats  # of the call; the loop counts up
    whole: bool = False  # whether a candidate's last token is encoded with it: its hidden state is needed
    draft: Any = None  # a second Policy, where the method has one
    guides: tuple[Any, ...] = ()  # Policies whose logits are mixed with the policy's; it may be among them itself
    weights: tuple[float, ...] = (1.0,)  # of the policy's logits, and of each guide's
    copies: int = 1  # how often an answer lies in the tree that has it most often: below each prompt that is read there
    pilot: bool = False  # drawn for a calibration
    trace: bool = False  # whether what was looked at is kept


@dataclass(eq=False)
class PromptNode:
    """A prompt in a policy's tree, shared by its samples."""

    ids: list[int]
    reward_prompt: RewardPrompt
    node: int = -1  # in the tree as long as a sample runs
    encoded: int = 0  # tokens that the node holds
    logits: torch.Tensor | None = None  # [V], once it holds all of them
    empty_reward: float | None = None  # r(x), once scored
    under_preferences: Sequence[list[int]] = ()  # its ids under each of the method's preferences
    media: Media | None = None  # read whole, in one pass with its batch, and anew where it had to leave the tree
    error: Cause | None = None  # why it cannot be read
    beside: Sequence[PromptNode] = ()  # what each guide reads in its place
    slots: int = 0  # that it takes in the tree where it takes most, what guides read included

    def __post_init__(self) -> None:
        self.slots = self.slots or len(self.ids)


@dataclass(eq=False)
class Trunk:
    """What an answer holds of a policy's tree: the leaf it has grown to."""

    prompt: PromptNode
    leaf: int = -1
    logits: torch.Tensor | None = None  # [V], after the leaf
    pending: list[int] = field(default_factory=list)  # committed tokens that are not in the tree (yet, or any more)
    beside: Sequence[Trunk] = ()  # the same answer in each guide's tree

    @classmethod
    def below(cls, prompt: PromptNode) -> Trunk:
        """Of an answer that has not begun."""
        return cls(prompt, beside=[cls(one) for one in prompt.beside])


@dataclass(eq=False)
class Candidate:
    """A drawn segment of an answer, while it is being judged."""

    answer: Request
    draw: Draw
    completion: Completion
    ended: bool  # ends the answer before max_new_tokens does
    reward: float = float("nan")
    score: float = float("nan")  # what the selection compares; the reward, unless the method says otherwise
    unscored: bool = False  # the reward was not asked
    parts: dict[str, float] | None = None  # of the reward
    gumbel: float = 0.0  # noise for methods that draw among candidates
    threshold: float = float("nan")
    error: str | None = None
    attempt: int = 0  # index among the segment's candidates

    @property
    def segment(self) -> int:
        """Index."""
        return len(self.answer.segments)

    @property
    def before(self) -> float | None:
        """Reward of the answer without it; None at the first segment."""
        return self.answer.segments[-1].reward if self.answer.segments else None

    def traced(self, verdict: str) -> CandidateTrace:
        """What is kept of it."""
        said = verdict if self.error is None else "error"
        values = self.reward, self.score, self.threshold
        return CandidateTrace(self.attempt, self.draw.tokens, *values, said, sum(self.draw.logprobs), self.parts)


@dataclass(eq=False)
class Request:
    """One sample of one prompt: who asked for it, its answer so far, and the segment that is being drawn."""

    terms: Terms
    prompt: PromptNode
    key: int  # of the random numbers, int64
    target: float  # r_star
    base: float | None  # r0; None until r(x) is scored
    beta: float
    index: int = 0  # row of the output
    prompt_index: int = 0
    sample_index: int = 0
    priority: int = 0  # lower runs first
    processor: RowProcessor | None = None
    stop: StopTest | None = None
    id: int = field(default_factory=lambda: next(_ids))  # grows: who came first

    owner: Request | None = None  # whose answer it is, where that one has several
    strategy: Strategy = field(init=False)
    trunk: Trunk = field(init=False)
    response: Response = field(init=False)  # holds the committed tokens
    logprobs: list[float] = field(default_factory=list)
    sampling_logprobs: list[float] = field(default_factory=list)
    segments: list[SegmentTrace] = field(default_factory=list)
    reported: int = 0  # segments already streamed
    text: TextStream = field(default_factory=TextStream)  # what of the answer's text was streamed

    attempts: int = 0  # candidates of the segment being drawn that were looked at
    best: Candidate | None = None  # of them
    best_attempt: int = -1
    search: Search | None = None  # for its segments, where the method has one
    scaffold: Scaffold | None = None  # of the segment being drawn, once it is chosen, where the method has any
    weighed: float = 0.0  # of a population's member: its reward when last some were chosen by it, where that matters
    traced_as: int | None = None  # of a population's member: the candidate that it has grown from
    # Of the segment being drawn, where they are traced; of all of its answers so far, where it has several.
    looked_at: list[CandidateTrace] = field(default_factory=list)

    acceptance_sum: float = 0.0  # probabilities of its candidates, added up: evidence for the scheduler
    scored: int = 0

    reward: float = float("nan")
    finish_reason: str | None = None
    error: str | None = None

    def __post_init__(self) -> None:
        self.trunk, self.response = Trunk.below(self.prompt), Response(self.prompt.reward_prompt)

    @property
    def tokens(self) -> list[int]:
        """What is committed."""
        return self.response.tokens

    @property
    def context(self) -> list[int]:
        """What the policy reads of it: what is committed, each segment behind its scaffold."""
        if self.scaffold is None and all(segment.scaffold is None for segment in self.segments):
            return self.tokens
        scaffolds = [*(segment.scaffold for segment in self.segments), self.scaffold]
        pieces = [*(segment.tokens for segment in self.segments), []]
        return [
            t
            for scaffold, piece in zip(scaffolds, pieces, strict=True)
            for t in (*(scaffold.tokens if scaffold else ()), *piece)
        ]

    @property
    def order(self) -> tuple[int, int]:
        """Who comes first: the lower priority number, then the older."""
        return self.priority, self.id

    @property
    def room(self) -> int:
        """Tokens of the next segment, at most."""
        config = self.terms.config
        return min(config.segment_length, config.max_new_tokens - len(self.tokens))


Drawn = dict[Request, list[Candidate]]  # by the answer that they continue, which may be one of several of a request


class Tree(Protocol):
    """Where trunks are encoded; :class:`stars_fast.loop.trunks.Trunks`."""

    def extend(self, trunks: Sequence[Trunk]) -> None: ...
    def encode(self, trunks: Sequence[Trunk], most: int | None = None) -> int: ...
    def ready(self, trunk: Trunk) -> bool: ...
    def keep_prompts(self, prompts: Sequence[PromptNode]) -> None: ...
    def clear(self) -> None: ...


class Proposer(Protocol):
    """Whose law candidates are drawn from; :class:`stars_fast.loop.trunks.Trunks`."""

    def propose(self, leaves: Sequence[Leaf]) -> list[list[Draw]]: ...


class Strategy(Protocol):
    """How the requests of a kind of method live in the loop.

    :class:`stars_fast.loop.one_answer.OneAnswer` is the plain case: one answer grows, a segment at a time.
    """

    trees: Sequence[Tree]  # besides the policy's
    judges_on_device: bool  # whether :meth:`judge` takes rewards that nobody on the host has looked at

    @property
    def trunks(self) -> Proposer:
        """What its answers hold of the policy's tree and, where they are guided, of guides'."""

    def enter(self, requests: Sequence[Request]) -> None:
        """These were submitted together."""

    def rows(self, request: Request) -> int:
        """Rows that it takes in a heartbeat, at least."""

    def prompts(self, request: Request) -> Sequence[PromptNode]:
        """What it stands on in the policy's tree, each with its ``slots``."""

    def held(self, request: Request) -> int:
        """Slots that it has, or that are set aside for it, besides its prompts'."""

    def branch(self, request: Request) -> int:
        """Slots of a further candidate."""

    def peak(self, request: Request) -> int:
        """Slots that it may take by the end of the next heartbeat, besides its prompts'."""

    def beside(self, request: Request) -> list[tuple[Tree, PromptNode]]:
        """What else stands in which tree as long as the request holds slots."""

    def due(self, request: Request) -> list[tuple[Tree, Trunk]]:
        """What is to be in which tree before it draws."""

    def attempts_there_are(self, request: Request) -> int:
        """Candidates of the segment being drawn, at most."""

    def asks(self, requests: Sequence[Request], rows: int) -> list[tuple[Request, int]]:
        """Which answers draw how many candidates in the proposal that all share; of ``rows`` rows where it is free."""

    def leaf(self, answer: Request, candidates: int, first: int = 0) -> Leaf:
        """What an answer contributes to that proposal: so many candidates, from the ``first`` not looked at on."""

    def candidate(self, answer: Request, draw: Draw) -> Candidate:
        """A draw as it would be returned, to be scored."""

    def draw(self, requests: Sequence[Request], rows: int) -> Drawn:
        """Candidates that it draws by itself."""

    def looks_in_order(self, answer: Request) -> bool:
        """Whether it may be settled before all of its candidates are looked at, so that some need no reward."""

    def asks_reward(self, candidate: Candidate) -> bool:
        """Whether the reward of a candidate is needed: for the selection, or because it would be the answer."""

    def judge(self, requests: Sequence[Request], drawn: Drawn, rewards: torch.Tensor | None) -> None:
        """Accept, fall back or go on, and roll everything else back. Where one of its requests goes on, that has so
        many more ``attempts`` as candidates were looked at.

        ``rewards`` are those of all candidates in their order, where they lie on a device and nobody has looked yet.
        """

    def roll_back(self, candidates: Sequence[Candidate]) -> None:
        """Nobody looks at these any more: release what they hold."""

    def give_back(self, request: Request) -> int:
        """Release its waiting candidates' slots; returns how many those are. Their tokens are kept."""

    def preempt(self, request: Request) -> None:
        """Give all its slots back: it goes on where it was, from its committed tokens."""

    def close(self, request: Request) -> None:
        """It has ended: free what it holds."""

    def leave(self) -> None:
        """The last of its requests has ended."""

    def drop(self, request: Request) -> None:
        """Its trees are to be cleared, and it draws its segment once more: with the same random numbers."""

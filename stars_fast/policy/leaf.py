"""What goes into a proposal, and what comes out of it: leaves, how they are sampled, and draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from stars_fast.outputs import Cause

# Called once per row with the candidate's ids so far and its logits [1, V]; returns the processed logits [1, V]. Where
# it raises ProcessorError, that says which processor it was; anything else is told of as it is.
RowProcessor = Callable[[list[int], torch.Tensor], torch.Tensor]


class ProcessorError(RuntimeError):
    """A logits processor raised: which, and what."""

    @staticmethod
    def told(error: Exception) -> Cause:
        """What ends the request whose processor raised this."""
        if isinstance(error, ProcessorError):
            return Cause(str(error), error.__cause__ or error)
        return Cause.of(error, "its logits processor raised ")


@dataclass(frozen=True)
class Sampling:
    """How the policy is sampled. Neutral values switch a filter off."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    eos_token_ids: tuple[int, ...] = ()


@dataclass
class Leaf:
    """What an answer contributes to a proposal."""

    node: int  # in the policy's tree; candidates are its children
    logits: torch.Tensor  # [V], of the next token
    sampling: Sampling
    key: int  # of the random numbers, int64
    segment: int  # index of the segment, part of the random numbers' counter
    first_attempt: int  # index of the first candidate, likewise
    candidates: int
    length: int  # tokens to draw per candidate
    seen: torch.Tensor | None = None  # [V] bool, ids in prompt and response; for the repetition penalty
    processor: RowProcessor | None = None
    entropy: float = math.inf  # nats: a segment ends before a token whose distribution, as the model gave it, has more
    shortest: int = 1  # once it has this many tokens
    # Of guides, the same answer: nodes in their trees, and logits [V]. All are mixed, the policy's weight being first.
    beside: Sequence[tuple[int, torch.Tensor]] = ()
    weights: Sequence[float] = (1.0,)

    @property
    def nodes(self) -> list[int]:
        """In the policy's tree, and in each guide's."""
        return [self.node, *(node for node, _ in self.beside)]

    @property
    def all_logits(self) -> list[torch.Tensor]:
        """The policy's, and each guide's."""
        return [self.logits, *(logits for _, logits in self.beside)]


@dataclass
class Draw:
    """One candidate as it was drawn."""

    node: int  # its branch: the keys and values of all its tokens but the last, or of all where `logits` is set
    tokens: list[int]
    logprobs: list[float]
    sampling_logprobs: list[float]
    ended: bool  # by EOS
    error: str | None = None  # logits that are not finite, a logits processor that raised
    logits: torch.Tensor | None = None  # [V], after its last token
    beside: list[int] = field(default_factory=list)  # its branches in the guides' trees

    def cut(self, length: int) -> None:
        """Keep the first ``length`` tokens. The branch keeps its slots: see :meth:`Policy.trim`."""
        self.tokens = self.tokens[:length]
        self.logprobs = self.logprobs[:length]
        self.sampling_logprobs = self.sampling_logprobs[:length]


NOT_FINITE = "the policy's logits are not finite"

"""Plans with several answers below each: the rollouts of planning policies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from stars_fast.methods.base import Segments
from stars_fast.methods.numbers import MOST_ANSWERS
from stars_fast.methods.stars import Vanilla


@dataclass(frozen=True)
class Plans(Vanilla):
    """Plain sampling in two levels: plans, and ``children`` answers that go on from each (PTA-GRPO, arXiv 2510.01833).

    Samples ``k * children`` to ``(k + 1) * children - 1`` of a prompt begin with the same plan, whose tokens are drawn
    and encoded once; a plan is worth what its children's rewards are on average. Each answer by itself follows the
    policy's law, and given their plan those of a family are independent. Where the answer ends within its plan, all
    children are that answer. ``num_return_sequences`` is plans times children; the last plan may have fewer.

    A plan ends with the token that completes ``delimiter``, and after ``longest`` tokens at the latest; always then
    where the delimiter is None. ``children`` is at most 65,536. 4 children and 256 tokens are ours.
    """

    name: ClassVar[str] = "plans"
    loop: ClassVar[str] = "plans"
    children: int = 4
    delimiter: str | None = "</plan>"
    longest: int = 256

    def __post_init__(self) -> None:
        self._check_integer("children", MOST_ANSWERS)
        self._check_integer("longest")
        self._check_delimiter()

    @property
    def answers_a_plan(self) -> int:
        return self.children

    def segments(self) -> Segments:
        return Segments(delimiter=self.delimiter)

"""CARDS: segments that end where the policy becomes uncertain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from stars_fast.methods.base import Method, Segments, SettingsT


@dataclass(frozen=True)
class Cards(Method):
    """Segments that end where the policy becomes uncertain, by STARS' rule (CARDS, arXiv 2406.16306).

    A segment ends before a token whose distribution has an entropy of at least ``entropy`` nats (without temperature
    and filters), once it has ``shortest`` tokens, and after ``longest`` at the latest. That token belongs to the next
    segment, and is drawn anew there. alpha 0.5, beta 0.7 and 20 attempts are StarsConfig's defaults already; ``top_k``
    is 40 where StarsConfig leaves it open. After the attempts the best candidate is committed; the paper's code takes a
    further one without a test. ``entropy`` is at least 0, ``shortest`` and ``longest`` at least 1.
    """

    name: ClassVar[str] = "cards"
    uses_fit: ClassVar[bool] = True
    entropy: float = 3.0
    shortest: int = 4
    longest: int = 64

    def __post_init__(self) -> None:
        self._check_real("entropy", 0.0)
        self._check_integer("shortest")
        self._check_integer("longest")

    def rule(self, config: SettingsT) -> SettingsT:
        return config.replace(segment_length=self.longest, top_k=40 if config.top_k is None else config.top_k)

    def segments(self) -> Segments:
        return Segments(self.entropy, self.shortest)

"""RL-of-Thoughts: a small network says, step by step, how the policy is to go on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from stars_fast.methods.base import Method, Scorer, Segments, Settings, SettingsT
from stars_fast.methods.numbers import MOST, MOST_ANSWERS, integer, plain, shown, text_or_ids

_ASKED = "\n[About the last step: {} 1: no, 2: unsure, 3: yes] Score="
# The aspects are the paper's: correctness (three), complexity (two), completeness (two). The words are ours.
QUESTIONS = tuple(
    map(
        _ASKED.format,
        (
            "does it follow from the problem?",
            "is it clear enough to go on from?",
            "is it calculated rightly?",
            "is there much left to reason or calculate?",
            "are there several ways to go on?",
            "is the final answer within reach?",
            "is all known that it needs?",
        ),
    )
)
BLOCKS = (
    "\n[Next: reason exactly one step.]\n",
    "\n[Next: split what is left into subtasks, and solve them one by one.]\n",
    "\n[Next: compare three plans for what is left, and take one step of the best.]\n",
    "\n[Next: check the last step, and write it anew where it is wrong.]\n",
    "\n[Next: give the final answer.]\n",
)


@dataclass(frozen=True)
class Navigator(Method):
    """A network that sees how the policy judges its own answer so far chooses what it is told to do next
    (RL-of-Thoughts, arXiv 2505.14140).

    Before each step the policy reads each of the ``questions`` behind its answer, and its scores are expected values:
    ``s_i = sum_k k p(scores[k]) / sum_k p(scores[k])`` over the next token, k from 1. The questions are rolled back.
    ``arg max network(s)`` is the place of a block, whose instruction the policy reads before it writes the step. An
    instruction stays in the policy's context and is no part of the answer: neither ``completions`` nor the reward has
    it. The last block ends the answer with its step, and is what the last of ``steps`` has. A step ends with
    ``delimiter``, after ``longest`` tokens, or with the answer. Of ``n`` candidates of it the best by reward is kept.

    The aspects asked about, their scale and the five blocks are the paper's, the words are not; there, scores are
    written out by the policy, and decomposing and debating take several calls each. Here, a block is one instruction
    and one step. Given the path of blocks, the answer has the policy's own law where ``n`` is 1.

    Parameters
    ----------
    network : callable
        From scores float32 ``[questions]`` to values ``[blocks]``, the higher the better; a torch.nn.Module is in
        evaluation mode while it is asked. ``examples/train_navigator.py`` trains one.
    blocks : sequence of str or of sequences of int
        Instructions, as text or ids, in the order of the network's values.
    questions : sequence of str or of sequences of int
    scores : sequence of str or int
        The first tokens of these are compared, from the lowest score to the highest.
    steps : int
        Most steps of an answer.
    n : int
        Candidates of a step; 1 asks the reward about the finished answer alone.
    """

    name: ClassVar[str] = "navigator"
    loop: ClassVar[str] = "navigator"
    scores_unfinished: ClassVar[bool] = False
    has_target: ClassVar[bool] = False
    network: Any = None
    blocks: Sequence[str | Sequence[int]] = BLOCKS
    questions: Sequence[str | Sequence[int]] = QUESTIONS
    scores: Sequence[str | int] = ("1", "2", "3")
    steps: int = 8
    n: int = 1
    delimiter: str | None = "\n\n"
    longest: int = 128

    def __post_init__(self) -> None:
        for name in ("steps", "longest"):
            self._check_integer(name)
        self._check_integer("n", MOST_ANSWERS)
        self._check_delimiter()
        if self.network is not None and not callable(self.network):
            raise TypeError(f"navigator: network={shown(self.network)} must be callable: [questions] -> [blocks]")
        for name, least in (("blocks", 1), ("questions", 1), ("scores", 2)):
            values = plain(getattr(self, name))
            if isinstance(values, (str, bytes)) or not isinstance(values, Sequence) or len(values) < least:
                raise ValueError(f"navigator: {name}={shown(values)} must be a sequence of at least {least}")
            whole = (f"navigator: {name}[{place}]" for place in range(len(values)))
            read = _text_or_id if name == "scores" else text_or_ids
            object.__setattr__(self, name, tuple(map(read, whole, values)))

    def rule(self, config: SettingsT) -> SettingsT:
        target = math.inf if self.n > 1 else -math.inf
        return config.replace(target_reward=target, base_reward=None, max_attempts=self.n, segment_length=self.longest)

    def segments(self) -> Segments:
        return Segments(delimiter=self.delimiter)

    @property
    def networks(self) -> Sequence[Any]:
        return (self.network,)

    def check(self, reward: Scorer) -> None:
        super().check(reward)
        if self.network is None:
            raise ValueError(
                f"method='navigator' needs the network that chooses: StarsConfig(method=Navigator(network=...)), a "
                f"callable from [{len(self.questions)}] scores to [{len(self.blocks)}] values"
            )
        if self.n > 1 and not reward.partial:
            raise ValueError(
                f"method='navigator' with n={self.n} scores unfinished answers, which {type(reward).__name__} "
                "(partial=False) cannot do: give n=1"
            )

    def in_ids(self, encode: Callable[[str], list[int]], vocabulary: int) -> Navigator:
        def ids(name: str, place: int, value: Any) -> tuple[int, ...]:
            read = tuple(encode(value)) if isinstance(value, str) else value
            if bad := [token for token in read if token >= vocabulary]:
                raise ValueError(
                    f"navigator: {name}[{place}] holds id {bad[0]}, outside the policy's vocabulary of {vocabulary}"
                )
            return read

        blocks, questions, scores = (
            [ids(name, place, (one,) if isinstance(one, int) else one) for place, one in enumerate(values)]
            for name, values in (("blocks", self.blocks), ("questions", self.questions), ("scores", self.scores))
        )
        for name, values in (("questions", questions), ("scores", scores)):
            if () in values:
                raise ValueError(f"navigator: {name}[{values.index(())}] has no tokens")
        first = [one[0] for one in scores]
        if len(set(first)) < len(first):
            raise ValueError(
                f"navigator: scores={shown(self.scores)} begin with the tokens {first}, which must differ: give the "
                "ids of those that follow a question"
            )
        return dataclasses.replace(self, blocks=blocks, questions=questions, scores=first)

    def action(self, state: Any) -> int:
        """Place of the block that is chosen, the first of equals. state float32 ``[questions]``."""
        import torch

        weight = next(iter(getattr(self.network, "parameters", lambda: ())()), state)
        values = torch.as_tensor(self.network(state.to(weight.device, weight.dtype))).float()
        if values.shape != (len(self.blocks),) or bool(values.isnan().any()):
            raise ValueError(
                f"the network gave {shown(values.tolist())} for scores {shown(state.tolist())}: must be "
                f"{len(self.blocks)} numbers, one per block"
            )
        return int(values.argmax())

    @property
    def longest_block(self) -> int:
        """Tokens, once these are ids."""
        return max(map(len, self.blocks))

    @property
    def asked(self) -> int:
        """Tokens of all questions together, likewise."""
        return sum(map(len, self.questions))

    def scaffold(self, config: Settings) -> int:
        return self.steps * self.longest_block + max(map(len, self.questions))

    def slots(self, config: Settings) -> int:
        return super().slots(config) + self.steps * self.longest_block + self.asked


def _text_or_id(name: str, value: Any) -> str | int:
    return value if isinstance(value, str) else integer(name, value, 0, MOST)

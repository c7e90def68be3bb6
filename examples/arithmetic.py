"""Sums done in steps, and a rule that checks them: a task whose reward is exact, discrete and full of ties.

A problem is a chain of operations, done from left to right::

    17+25-8*3:
    17+25=42
    42-8=34
    34*3=102

The rule reads a text that may break off anywhere. Each completed line is worth 1 if it takes up where the line before
it ended, with the operation that is due, and computes it rightly; it costs 1 otherwise.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

CHARACTERS = "0123456789+-*=:\n"
STEPS, HIGHEST = 6, 199  # operations of a problem; the largest number in it
_DO = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
_WAYS = [(sign, n) for sign in "+-" for n in range(2, 100)] + [("*", n) for n in range(2, 10)] * 6
_OPERATION = re.compile(r"([-+*])(\d+)")
_LINE = re.compile(r"(\d+)([-+*])(\d+)=(\d+)")


def problem(random: random.Random) -> str:
    """One problem; no result leaves the range from 0 to 199."""
    value = random.randint(10, 99)
    text = str(value)
    for _ in range(STEPS):
        sign, number = random.choice([way for way in _WAYS if 0 <= _DO[way[0]](value, way[1]) <= HIGHEST])
        value = _DO[sign](value, number)
        text += f"{sign}{number}"
    return f"{text}:\n"


def worked(problem: str) -> str:
    """The right answer, a line a step."""
    value, lines = int(re.match(r"\d+", problem)[0]), []  # type: ignore[index]
    for sign, number in _OPERATION.findall(problem):
        result = _DO[sign](value, int(number))
        lines.append(f"{value}{sign}{number}={result}\n")
        value = result
    return "".join(lines)


def right_less_wrong(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """The reward: completed steps that are right, less those that are not."""
    return [_right_less_wrong(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]


def _right_less_wrong(problem: str, text: str) -> float:
    value, reward = int(re.match(r"\d+", problem)[0]), 0  # type: ignore[index]
    due = _OPERATION.findall(problem)
    for i, line in enumerate(text.split("\n")[:-1]):
        step = _LINE.fullmatch(line)
        right = step is not None and i < len(due) and (int(step[1]), step[2], step[3]) == (value, *due[i])
        right = right and int(step[4]) == _DO[due[i][0]](value, int(due[i][1]))  # type: ignore[index]
        reward += 1 if right else -1
        value = value if step is None else int(step[4])
    return float(reward)


def solved(problem: str, text: str) -> bool:
    """Whether the last line's result is that of the problem, whatever came before it."""
    return text.rstrip("\n").rpartition("=")[2] == worked(problem).rstrip("\n").rpartition("=")[2]

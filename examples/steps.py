"""Sums whose steps can be done in several ways, and checked: what a navigator has to choose from (train_navigator.py).

A problem is a chain of operations, done from left to right. Each line of a solution does one, by the block in front of
it; its last equation is what counts::

    27+36-38+23
    R27+36=63                      reason one step
    D63-30=33,33-8=25,63-38=25     decompose: tens and units apart
    B25+23=48,23+25=48,25+23=48    debate: the other way round, too
    F25+23=48                      refine: the last step once more
    T#48                           terminate

The letter of a question, a to g, is followed by its score, 1 to 3.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

BLOCKS, QUESTIONS = "RDBFT", "abcdefg"
CHARACTERS = "0123456789+-=,#\n" + BLOCKS + QUESTIONS
OPERATIONS, HIGHEST = 3, 99  # of a problem; the largest number in it
_DO = {"+": int.__add__, "-": int.__sub__}
_STEP = re.compile(r"(\d+)([-+])(\d+)=(\d+)")


@dataclass
class Line:
    """A step: whether its operation was due, and its result right and, with all before it, that of the problem."""

    value: int
    operation: str
    number: int
    result: int
    due: bool
    right: bool
    sound: bool


def problem(chance: random.Random) -> str:
    value = chance.randint(10, 99)
    text = str(value)
    for _ in range(OPERATIONS):
        sign, number = chance.choice(
            [(s, n) for s in "+-" for n in range(11, 100) if n % 10 and 0 <= _DO[s](value, n) <= HIGHEST]
        )
        value = _DO[sign](value, number)
        text += f"{sign}{number}"
    return text + "\n"


def operations(problem: str) -> list[tuple[str, int]]:
    return [(sign, int(number)) for sign, number in re.findall(r"([-+])(\d+)", problem)]


def answer(problem: str) -> int:
    value = int(re.match(r"\d+", problem)[0])  # type: ignore[index]
    for sign, number in operations(problem):
        value = _DO[sign](value, number)
    return value


def written(block: str, value: int, sign: str, number: int, result: int) -> str:
    """A line of a block, which says this result, right or not."""
    tens, step = number // 10 * 10, f"{value}{sign}{number}={result}"
    if block == "D":
        middle = _DO[sign](value, tens)
        return f"{value}{sign}{tens}={middle},{middle}{sign}{number - tens}={result},{step}\n"
    if block == "B":
        other = f"{number}+{value}={result}" if sign == "+" else f"{result}+{number}={value}"
        return f"{step},{other},{step}\n"
    return step + "\n"


def lines(problem: str, text: str) -> list[Line]:
    """What the steps of a solution come to, instructions left out of it; a step done once more replaces the one before
    it.
    """
    due, start, read = operations(problem), int(re.match(r"\d+", problem)[0]), list[Line]()  # type: ignore[index]
    for line in text.split("\n"):
        step = _STEP.fullmatch(line.rpartition(",")[2])
        if step is None:
            continue
        value, sign, number, result = int(step[1]), step[2], int(step[3]), int(step[4])
        again = bool(read) and (read[-1].value, read[-1].operation, read[-1].number) == (value, sign, number)
        if again:
            read.pop()
        before, sound = (read[-1].result, read[-1].sound) if read else (start, True)
        here = len(read) < len(due) and (value, (sign, number)) == (before, due[len(read)])
        right = result == _DO[sign](value, number)
        read.append(Line(value, sign, number, result, here, right, here and right and sound))
    return read


def scores(problem: str, text: str) -> dict[str, int]:
    """What is right to say of a solution so far, by question: the aspects of RL-of-Thoughts."""
    done, due = lines(problem, text), operations(problem)
    last, left = done[-1] if done else None, due[len(done) :]
    value = last.result if last else int(re.match(r"\d+", problem)[0])  # type: ignore[index]
    carries = bool(left) and (value % 10 + left[0][1] % 10 > 9 if left[0][0] == "+" else value % 10 < left[0][1] % 10)
    return {
        "a": 2 if last is None else 3 if last.due else 1,  # does it follow from the problem?
        "b": 2 if last is None else 3,  # is it clear?
        "c": 2 if last is None else 3 if last.right else 1,  # is it calculated rightly?
        "d": 1 + min(len(left), 2),  # is there much left?
        "e": 3 if carries else 1,  # is there a choice of ways to go on: is the next step hard?
        "f": 3 - min(len(left), 2),  # is the answer within reach?
        "g": 2 if last is None else 3 if last.sound else 1,  # is all known that it needs?
    }


def solved(problem: str, text: str) -> bool:
    """Whether the answer that is given at the end is that of the problem."""
    given = re.fullmatch(r"#(\d+)", text.strip().rpartition("\n")[2])
    return given is not None and int(given[1]) == answer(problem)


def lesson(chance: random.Random) -> tuple[str, list[float]]:
    """A text to learn from, and what each character weighs: lines that are wrong are read, not learned."""
    text, weights = problem(chance), list[float]()
    weights, start, due = [0.0] * len(text), len(text), operations(text)
    plain, asked = chance.random() < 0.2, chance.random() < 0.6
    stop = chance.randint(0, len(due)) if asked else len(due)
    value = int(re.match(r"\d+", text)[0])  # type: ignore[index]

    def add(piece: str, weight: float) -> None:
        nonlocal text
        text += piece
        weights.extend([weight] * len(piece))

    for sign, number in due[:stop]:
        wrong, again = chance.random() < 0.3, True
        block = "R" if plain else chance.choice("RDB")
        result = _DO[sign](value, number)
        while again:
            off = chance.choice((-10, -2, -1, 1, 2, 10)) if wrong else 0
            said = abs(result + off)
            add("" if plain else block, 0.0)
            add(written(block, value, sign, number, said), float(not wrong))
            again = not plain and chance.random() < (0.6 if wrong else 0.1)
            wrong, block = False, "F"
        value = said
    if asked:  # all of them: each is a lesson, though none stands behind another later on
        for question, score in chance.sample(list(scores(text[:start], _told(text[start:])).items()), len(QUESTIONS)):
            add(question, 0.0)
            add(str(score), 1.0)
    else:
        add("" if plain else "T", 0.0)
        add(f"#{value}\n", 1.0)
    return text, weights


def _told(text: str) -> str:
    """Without the letters of blocks, as an answer is."""
    return re.sub(f"[{BLOCKS}]", "", text)

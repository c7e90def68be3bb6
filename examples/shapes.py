"""Pictures of coloured shapes and captions of them: a task in which every colour that a caption names can be checked.

A picture is drawn, not loaded: six different shapes in two rows, each in one of eight colours, on a grainy ground. Its
caption names them in reading order, a sentence of six words for each::

    there is a red square . the ring here is blue . we see a pink bar . ...

Each shape has a usual colour. A noisy caption says the usual colour now and then, whatever the picture shows, of every
other shape more often than not: what learns from such captions says what is usual where it should say what it sees.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

COLOURS = {
    "red": (210, 40, 40),
    "orange": (230, 120, 30),
    "yellow": (225, 205, 50),
    "green": (60, 165, 60),
    "teal": (40, 160, 160),
    "blue": (50, 80, 210),
    "purple": (130, 60, 180),
    "pink": (235, 120, 180),
}
SHAPES = ("square", "circle", "triangle", "cross", "ring", "diamond", "bar", "post")
USUAL = dict(zip(SHAPES, COLOURS, strict=True))
HABIT = dict(zip(SHAPES, (0.55, 0.05) * 4, strict=True))  # how often a noisy caption says the usual colour
ROWS, COLUMNS = 2, 3
SIDE, SIZE = 48, 14  # pixels of a picture and of a shape in it, both ways
FORMS = ("there is a {colour} {shape} .", "the {shape} here is {colour} .", "we see a {colour} {shape} .")
QUESTION = "describe the picture :"
WORDS = sorted({w for text in (*FORMS, QUESTION) for w in text.split() if "{" not in w} | {*COLOURS, *SHAPES})


class Scene(NamedTuple):
    """What a picture shows, in reading order."""

    shapes: tuple[str, ...]
    colours: tuple[str, ...]


class Findings(NamedTuple):
    """What a caption says, counted."""

    right: int  # shapes of the picture in their own colours
    wrong: int  # shapes of the picture in other colours
    invented: int  # shapes that the picture has not, or that were named before
    broken: int  # sentences of another form, or that stop half-way
    missed: int  # shapes of the picture that are not named


def new_scene(chance: np.random.Generator) -> Scene:
    """Different shapes; every colour is as likely, whatever the shape."""
    shapes = chance.permutation(SHAPES)[: ROWS * COLUMNS].tolist()
    return Scene(tuple(shapes), tuple(chance.choice(list(COLOURS), len(shapes)).tolist()))


def draw(scene: Scene, chance: np.random.Generator) -> np.ndarray:
    """The picture, uint8 ``[SIDE, SIDE, 3]``: shapes a little off their places, tints a little off their colours."""
    picture = np.full((SIDE, SIDE, 3), chance.uniform(90, 150))
    height, width = SIDE // ROWS, SIDE // COLUMNS
    for i, (shape, colour) in enumerate(zip(*scene, strict=True)):
        y = i // COLUMNS * height + chance.integers(height - SIZE + 1)
        x = i % COLUMNS * width + chance.integers(width - SIZE + 1)
        picture[y : y + SIZE, x : x + SIZE][_mask(shape)] = COLOURS[colour] + chance.normal(0, 20, 3)
    return np.clip(picture + chance.normal(0, 20, picture.shape), 0, 255).astype(np.uint8)


def _mask(shape: str) -> np.ndarray:
    y, x = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j]
    masks = {
        "square": np.maximum(abs(x), abs(y)) < 0.8,
        "circle": x**2 + y**2 < 0.8,
        "triangle": abs(x) < (y + 1) / 2,
        "cross": np.minimum(abs(x), abs(y)) < 0.3,
        "ring": abs(x**2 + y**2 - 0.7) < 0.3,
        "diamond": abs(x) + abs(y) < 1,
        "bar": abs(y) < 0.4,
        "post": abs(x) < 0.4,
    }
    return masks[shape]


def caption(scene: Scene, chance: np.random.Generator, noisy: bool = False) -> str:
    """A caption that is right, but for colours said from habit where it is noisy."""
    habits = [noisy * HABIT[shape] for shape in scene.shapes]
    said = [USUAL[s] if chance.random() < h else c for s, c, h in zip(*scene, habits, strict=True)]
    forms = chance.choice(FORMS, len(said)).tolist()
    return " ".join(f.format(colour=c, shape=s) for f, c, s in zip(forms, said, scene.shapes, strict=True))


def check(scene: Scene, text: str) -> Findings:
    """Compare a caption with what was drawn."""
    truth, named = dict(zip(*scene, strict=True)), set[str]()
    counts = dict.fromkeys(("right", "wrong", "invented", "broken"), 0)
    for sentence in text.replace(".", ".\n").split("\n"):
        words = sentence.split()
        if not words:
            continue
        shape = next((w for w in words if w in SHAPES), "")
        colour = next((w for w in words if w in COLOURS), "")
        if " ".join(words) not in [form.format(colour=colour, shape=shape) for form in FORMS]:
            counts["broken"] += 1
            continue
        if shape not in truth or shape in named:
            counts["invented"] += 1
        else:
            counts["right" if truth[shape] == colour else "wrong"] += 1
        named.add(shape)
    return Findings(**counts, missed=len(truth.keys() - named))

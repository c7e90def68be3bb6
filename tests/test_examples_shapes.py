"""The pictures and captions that guidance is measured on say the same, and mistakes in captions are found."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from examples.shapes import COLOURS, COLUMNS, HABIT, ROWS, SIDE, USUAL, Findings, Scene, caption, check, draw, new_scene

SCENE = Scene(
    shapes=("square", "circle", "triangle", "cross", "ring", "post"),
    colours=("red", "blue", "teal", "pink", "red", "green"),
)


def test_a_shape_has_its_colour_at_its_place():
    """Over many grains and tints: what stands out from the ground is nearest to the colour of the shape there."""
    chance = np.random.default_rng(0)
    palette, names = np.array(list(COLOURS.values())), list(COLOURS)
    right = []
    for _ in range(40):
        scene = new_scene(chance)
        picture = draw(scene, chance).astype(float)
        cells = picture.reshape(ROWS, SIDE // ROWS, COLUMNS, SIDE // COLUMNS, 3).swapaxes(1, 2).reshape(6, -1, 3)
        for cell, colour in zip(cells, scene.colours, strict=True):
            inside = cell[np.abs(cell - np.median(cell, axis=0)).sum(1).argsort()[-40:]]
            right.append(names[((palette - inside.mean(0)) ** 2).sum(1).argmin()] == colour)
    assert np.mean(right) > 0.85


def test_a_right_caption_has_no_fault_and_a_noisy_one_has_its_habits():
    chance = np.random.default_rng(1)
    wrong, could = Counter[str](), Counter[str]()
    for _ in range(600):
        scene = new_scene(chance)
        assert check(scene, caption(scene, chance)) == Findings(6, 0, 0, 0, 0)
        text = caption(scene, chance, noisy=True)
        found, sentences = check(scene, text), text.split(" .")
        assert found[2:] == (0, 0, 0)
        for shape, colour, sentence in zip(*scene, sentences, strict=False):
            wrong[shape] += colour not in sentence.split()
            could[shape] += USUAL[shape] != colour
        assert found.wrong == sum(colour not in s.split() for colour, s in zip(scene.colours, sentences, strict=False))
    for shape, habit in HABIT.items():
        assert abs(wrong[shape] / could[shape] - habit) < 0.1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", (0, 0, 0, 0, 6)),
        ("there is a red square . the circle here is green .", (1, 1, 0, 0, 4)),
        ("there is a red square . there is a red square .", (1, 0, 1, 0, 5)),
        ("we see a red diamond . we see a", (0, 0, 1, 1, 6)),
        ("there is red square . the circle here is blue", (0, 0, 0, 2, 6)),
    ],
)
def test_faults_are_told_apart(text, expected):
    assert check(SCENE, text) == Findings(*expected)

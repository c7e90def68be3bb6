"""The alignment of examples/songmass.py is the cheapest there is, and the example runs."""

import importlib
import itertools
import math
import sys
from pathlib import Path

import pytest

from stars_fast import StarsEngine


@pytest.fixture(scope="module")
def songmass():
    folder = str(Path(__file__).resolve().parents[1] / "examples")
    sys.path.insert(0, folder)
    yield importlib.import_module("songmass")
    sys.path.remove(folder)


def every_alignment(songmass, syllables, melody):
    """The cost by looking at all ways to give each note to a syllable, in order, or to none."""
    cheapest = math.inf
    for owners in itertools.product([None, *range(len(syllables))], repeat=len(melody)):
        sung = [owner for owner in owners if owner is not None]
        if sung != sorted(sung):
            continue
        total = songmass.MISSING * (len(syllables) - len(set(sung)))
        met = set()
        for note, owner in zip(melody, owners, strict=True):
            if owner is None:
                total += songmass.MISSING
            elif owner in met:
                total += songmass.DRAWN_OUT
            else:
                met.add(owner)
                total += songmass.MISFIT * (syllables[owner].isupper() != note.endswith("2"))
        cheapest = min(cheapest, total)
    return cheapest


@pytest.mark.parametrize("syllables", [[], ["la"], ["la", "NA", "O"], ["NA", "la", "la", "O"]], ids="-".join)
def test_an_alignment_costs_what_the_cheapest_of_all_does(songmass, syllables):
    for length in range(5):
        for melody in itertools.product(["C1", "D2"], repeat=length):
            expected = every_alignment(songmass, syllables, melody)
            assert songmass.cost(syllables, melody, ended=True) == pytest.approx(expected)
            begun = min(every_alignment(songmass, syllables[:n], melody) for n in range(len(syllables) + 1))
            assert songmass.cost(syllables, melody, ended=False) == pytest.approx(begun)


def test_rests_cost_where_they_break_a_sentence(songmass):
    line = ["la", "la"]
    assert songmass.cost(line, ["C1", "C1", "R"], ended=True) == 0
    assert songmass.cost(line, ["C1", "R", "C1"], ended=True) == songmass.BREAK
    assert songmass.cost(line, ["R"], ended=False) == songmass.BREAK


def test_the_reward_goes_sentence_by_sentence(songmass):
    prompt = "la NA [sep] o [sep] =>"
    melodies = ["", "C1 D2 [sep] E1 [sep]", "C1 D2", "C1 [sep]", "C1 D2 [sep] E1 [sep] C1", "C1 D2 [sep]", "C1 D2"]
    ended = [False, True, False, False, False, True, True]
    rewards = songmass.singable([prompt] * 7, melodies, [[songmass.EOS] * end for end in ended])
    assert rewards == [0, 0, 0, -songmass.MISSING, -songmass.MISSING, -songmass.MISSING, -songmass.MISSING]
    assert songmass.matching(prompt, "C1 R D2 [sep] E1 E1 [sep]") == 0.5


def test_the_example_runs(songmass, capsys):
    tokenizer = songmass.new_tokenizer()
    engine = StarsEngine(songmass.train(tokenizer, 2, 0), songmass.singable, tokenizer=tokenizer)
    shares = songmass.compare(engine, ["la NA di [sep] O la [sep] =>"] * 2, 0)
    assert {"vanilla", "stars, by the sentence"} < set(shares) and all(0 <= share <= 1 for share in shares.values())
    assert "of sentences match" in capsys.readouterr().out

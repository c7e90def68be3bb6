"""The check of test_law.py rejects faults planted on purpose, with half the samples that it takes there."""

import inspect
from dataclasses import replace

import pytest
import torch
from conftest import tiny_policy
from test_law import PROMPT, RULE, VOCAB, oracle, p_attempts, p_text, run, wave_reward

from stars_fast.loop import selection
from stars_fast.loop.one_answer import OneAnswer
from stars_fast.ops.philox import uniform
from stars_fast.policy import steps

SAMPLES = 1000

# Faults of the fallback show where most segments need it; those of the choice among accepted ones where most rounds
# have several; those of the noise where the first attempt often wins; those of the acceptance test where few candidates
# are certain of it.
HARD, EASY = replace(RULE, target_reward=1.8), replace(RULE, target_reward=0.6)
SOFT = replace(HARD, beta=2.0)


def wrap(monkeypatch, module, name, change):
    """Replace operator ``name`` of ``module`` by ``change(operator, arguments by name)``."""
    operator = getattr(module, name)
    names = list(inspect.signature(operator).parameters)
    monkeypatch.setattr(module, name, lambda *values: change(operator, dict(zip(names, values, strict=True))))


def best_accepted_instead_of_first(monkeypatch, candidates):
    def select(operator, a):
        before = a["attempts"].clone()
        winner, accepted, threshold, finish = operator(**a)
        for group in accepted.nonzero().flatten().tolist():
            rows = torch.arange(a["group_indptr"][group], a["group_indptr"][group + 1])
            numbers = uniform(
                a["keys"][group].expand(len(rows)),
                a["segment"][group].expand(len(rows)),
                before[group] + torch.arange(len(rows), dtype=torch.int32),
            )
            passed = numbers < ((a["reward"][rows] - threshold[rows]) / a["beta"][group]).exp()
            assert winner[group] == rows[passed][0]  # the fault is all that differs
            winner[group] = rows[passed][a["reward"][rows[passed]].argmax()]
        return winner, accepted, threshold, finish

    wrap(monkeypatch, selection, "select_and_commit", select)


def attempts_counted_in_rounds(monkeypatch, candidates):
    attempts = OneAnswer.attempts_there_are
    monkeypatch.setattr(
        OneAnswer, "attempts_there_are", lambda strategy, request: candidates * attempts(strategy, request)
    )


def noise_without_the_segment_index(monkeypatch, candidates):
    # Positions count from the segment's start, so without the index each segment is drawn with the noise of the one
    # before. (Positions counted from the response's start would hide this fault: STARS' segments begin at multiples of
    # K, so no two share a position. It would then show only in a method whose segments vary in length.)
    def without_segment(operator, a):
        return operator(**a | {"segment": torch.zeros_like(a["segment"])})

    wrap(monkeypatch, steps, "sample_step", without_segment)


def acceptance_without_the_segment_index(monkeypatch, candidates):
    def without_segment(operator, a):
        return operator(**a | {"segment": torch.zeros_like(a["segment"])})

    wrap(monkeypatch, selection, "select_and_commit", without_segment)


def fallback_forgets_earlier_rounds(monkeypatch, candidates):
    def select(operator, a):
        a["best_attempt"].fill_(-1)
        return operator(**a)

    wrap(monkeypatch, selection, "select_and_commit", select)


FAULTS = [
    (best_accepted_instead_of_first, 4, EASY),
    (attempts_counted_in_rounds, 2, HARD),
    (noise_without_the_segment_index, 1, EASY),
    (acceptance_without_the_segment_index, 1, SOFT),
    (fallback_forgets_earlier_rounds, 2, HARD),
]


def p_values(candidates, rule):
    """Of the texts, and of the attempts."""
    model = tiny_policy(VOCAB, seed=3)
    runs, oracles = (
        run(model, wave_reward, [PROMPT], SAMPLES, rule, candidates=candidates),
        {0: oracle(model, PROMPT, rule)},
    )
    return p_text(runs, oracles), p_attempts(runs, oracles)


@pytest.mark.parametrize("candidates, rule", [(1, EASY), (4, EASY), (2, HARD), (1, SOFT)], ids=str)
def test_the_engine_as_it_is_passes(candidates, rule):
    assert min(p_values(candidates, rule)) > 1e-3


@pytest.mark.parametrize("plant, candidates, rule", FAULTS, ids=[plant.__name__ for plant, *_ in FAULTS])
def test_a_planted_fault_is_rejected(monkeypatch, plant, candidates, rule):
    plant(monkeypatch, candidates)
    assert min(p_values(candidates, rule)) < 1e-6

"""One model under two prompts: each caller's preferences are its own, and both texts hold what was judged."""

import itertools

import pytest
from conftest import sum_reward, tiny_policy

from stars_fast import StarsConfig, StarsEngine
from stars_fast.methods import PersonaJudge

VOCAB = 32
PROMPTS = [[5, 6, 7], [8]]
CONFIG = StarsConfig(max_new_tokens=14, ignore_eos=True)
ONE, OTHER = PersonaJudge(draft_prompt=[3, 4], judge_prompt=[1], block=3), PersonaJudge([9], [10, 11, 12], block=5)


def make_engine(**limits):
    return StarsEngine(tiny_policy(VOCAB, hidden=32), sum_reward, **limits)


def text(events, index):
    return [token for event in events if event.index == index for token in event.segment.tokens]


@pytest.mark.parametrize("limits", [{}, dict(max_rows=1), dict(kv_cache_tokens=60)], ids=str)
def test_callers_with_preferences_of_their_own_do_not_mix(limits):
    alone = [make_engine().generate(PROMPTS, CONFIG, seed=1, method=method).completions for method in (ONE, OTHER)]
    engine = make_engine(**limits)
    streams = [engine.stream(PROMPTS, CONFIG, seed=1, method=method) for method in (ONE, OTHER)]
    told = [[], []]
    for events in itertools.zip_longest(*streams):
        for mine, event in zip(told, events, strict=True):
            mine += [event] if event else []
    assert [[text(mine, i) for i in range(2)] for mine in told] == alone and alone[0] != alone[1]
    assert engine.policy.tree.nodes == 0


def test_a_draft_that_is_the_judge_stands_as_a_whole():
    same = PersonaJudge(draft_prompt=[3, 4], judge_prompt=[3, 4], block=4)
    out = make_engine().generate(PROMPTS, CONFIG, seed=1, method=same)
    assert all(len(segment.tokens) == 4 for segments in out.segments for segment in segments[:-1])
    assert out.stats["discarded_tokens"] == 0

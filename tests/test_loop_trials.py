"""Whole answers on trial are looked at in the order of their attempts, however many are in the works."""

import pytest
from conftest import sum_reward, tiny_policy

from stars_fast import StarsConfig, StarsEngine
from stars_fast.methods import BestOfN, RejectionSampling

VOCAB = 32
PROMPTS = [[5, 6, 7], [8]]
# EOS is likely, so that later attempts often end before earlier ones.
CONFIG = StarsConfig(segment_length=2, max_new_tokens=24, target_reward=1.2, beta=0.3, max_attempts=6)

pytestmark = pytest.mark.filterwarnings("ignore:method=.* itself")


def generate(method, reward=sum_reward, **overrides):
    limits = {name: overrides.pop(name) for name in ("max_rows", "kv_cache_tokens") if name in overrides}
    engine = StarsEngine(tiny_policy(VOCAB, hidden=32), reward, **limits)
    out = engine.generate(PROMPTS, CONFIG, seed=3, num_return_sequences=4, method=method, **overrides)
    assert engine.policy.tree.nodes == 0
    return out


def test_best_of_n_is_the_best_of_the_same_unguided_answers():
    singles = generate(BestOfN(n=1))
    many = generate(BestOfN(n=6))
    assert all(best >= one for best, one in zip(many.rewards, singles.rewards, strict=True))
    assert many.rewards != singles.rewards
    assert all(segments[0].attempts == 6 and len(segments) == 1 for segments in many.segments)


@pytest.mark.parametrize(
    "overrides", [dict(candidates=1), dict(candidates=6), dict(max_rows=3), dict(max_rows=1)], ids=str
)
def test_an_answer_that_ends_early_does_not_overtake(overrides):
    """An accepted attempt is the first one accepted, and no earlier one was still open."""
    expected, out = generate(RejectionSampling()), generate(RejectionSampling(), **overrides)
    assert out.completions == expected.completions
    assert [s[0].attempts for s in out.segments] == [s[0].attempts for s in expected.segments]
    assert len({s[0].attempts for s in out.segments}) > 1


def test_no_more_answers_are_in_the_works_than_candidates_says():
    engine = StarsEngine(tiny_policy(VOCAB, hidden=32), sum_reward)
    for candidates in (1, 2, 6):
        stats = engine.generate([[5]], CONFIG, seed=0, method=BestOfN(n=6), candidates=candidates).stats
        assert max(stats["rows"]) == candidates


def test_an_attempt_that_fails_costs_nothing_where_an_earlier_one_is_accepted():
    """One at a time it would never have been drawn."""

    def picky(completions):
        values = zip(completions, sum_reward(completions), strict=True)
        return [None if sum(ids) % 5 == 0 else value for ids, value in values]

    alone, beside = (generate(RejectionSampling(), picky, candidates=count) for count in (1, 6))
    assert alone.completions == beside.completions and alone.finish_reasons == beside.finish_reasons
    assert 0 < alone.finish_reasons.count("error") < 8

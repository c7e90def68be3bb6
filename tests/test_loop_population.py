"""Populations grow in step: who is chosen goes on, the best of the last is the answer, and nothing else is left."""

import pytest
from conftest import sum_reward, tiny_policy

from stars_fast import StarsConfig, StarsEngine
from stars_fast.loop.members import Members
from stars_fast.methods import ParticleFilter, TreeBoN

VOCAB = 32
CONFIG = StarsConfig(segment_length=3, max_new_tokens=12, candidates=1)

pytestmark = pytest.mark.filterwarnings("ignore:method=.* itself")


@pytest.mark.parametrize("method", [ParticleFilter(particles=4), TreeBoN(n=4, branching=2, layers=4)], ids=str)
def test_the_answer_is_the_best_of_those_that_the_last_round_left(monkeypatch, method):
    settled, settle = [], Members.settle

    def watched(strategy, request, winner, segments):
        settled.append((winner.reward, [member.reward for member in strategy.members[request]]))
        settle(strategy, request, winner, segments)

    monkeypatch.setattr(Members, "settle", watched)
    engine = StarsEngine(tiny_policy(VOCAB, hidden=32), sum_reward)
    out = engine.generate([[5, 6], [7]], CONFIG, seed=1, method=method)
    assert [won for won, _ in settled] == [max(members) for _, members in settled] and len(settled) == 2
    assert sorted(out.rewards) == sorted(won for won, _ in settled)
    assert [sum(len(s.tokens) for s in segments) for segments in out.segments] == [len(ids) for ids in out.completions]
    assert out.stats["committed_tokens"] == sum(map(len, out.completions))
    assert engine.policy.tree.nodes == 0


def test_equal_rewards_leave_a_population_of_equal_chances():
    """Every particle goes on: nothing is lost where nothing is guided."""
    engine = StarsEngine(tiny_policy(VOCAB, hidden=32), lambda completions: [0.0] * len(completions))
    out = engine.generate([[5, 6]], CONFIG, seed=1, method=ParticleFilter(particles=4), ignore_eos=True)
    assert out.stats["policy_tokens"] == 4 * 12
    assert all(segment.attempts == 4 for segment in out.segments[0])

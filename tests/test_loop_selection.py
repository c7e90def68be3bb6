"""The operator's verdict on each request, in places of its own candidates, wherever the rewards lie."""

import math

import pytest
import torch
from conftest import make_requests

from stars_fast import StarsConfig
from stars_fast.loop.request import Candidate
from stars_fast.loop.selection import first_accepted
from stars_fast.ops.select_and_commit import EARLIER, INVALID, NONE
from stars_fast.policy.leaf import Draw
from stars_fast.rewards import Completion

CONFIG = StarsConfig(segment_length=2, max_attempts=4, target_reward=1.5, beta=1e-6, alpha=1.0, max_new_tokens=8)


def candidates(request, *rewards, ended=False):
    made = []
    for reward in rewards:
        draw = Draw(-1, [1, 2], [0.0] * 2, [0.0] * 2, ended)
        made.append(Candidate(request, draw, Completion(request.response, draw.tokens), ended, reward, reward))
    return made


def some_requests():
    """One accepts, one goes on, one falls back to an earlier round's best, one to this round's, one is invalid."""
    made = make_requests(CONFIG, 3, 3, 3, 3, 3, base=1.5, beta=CONFIG.beta)
    made[2].attempts = made[3].attempts = 2
    for request, value in ((made[2], 0.9), (made[3], 0.1)):
        (request.best,), request.best_attempt = candidates(request, value), 1
    groups = [
        candidates(made[0], 0.0, 2.0, 3.0),
        candidates(made[1], 0.0, 0.5),
        candidates(made[2], 0.2, 0.3),
        candidates(made[3], 0.3, 0.2),
        candidates(made[4], 0.0, math.nan, 9.0),
    ]
    return made, groups


@pytest.mark.parametrize("where", ["host", "device"])
def test_winners_are_places_among_the_requests_own_candidates(where):
    made, groups = some_requests()
    rewards = None
    if where == "device":
        rewards = torch.tensor([one.reward for group in groups for one in group])
        for one in (one for group in groups for one in group):
            one.reward = one.score = math.nan
    verdicts = first_accepted(made, groups, rewards)
    assert [verdict.winner for verdict in verdicts] == [1, NONE, EARLIER, 0, INVALID]
    assert [verdict.accepted for verdict in verdicts] == [True, False, False, False, False]
    assert [verdict.attempts for verdict in verdicts] == [2, 2, 4, 4, 2]
    assert [verdict.best_attempt for verdict in verdicts][1:4] == [1, 1, 2]
    assert [one.score for one in groups[0]] == [0.0, 2.0, 3.0] and groups[0][0].threshold == 1.5
    if where == "device":
        assert groups[4][1].error is not None and groups[4][0].error is None


def test_what_was_accepted_is_evidence_for_the_scheduler():
    made, groups = some_requests()
    first_accepted(made, groups)
    assert (made[0].acceptance_sum, made[0].scored) == (pytest.approx(2.0), 3)
    assert (made[1].acceptance_sum, made[1].scored) == (pytest.approx(0.0, abs=1e-6), 2)

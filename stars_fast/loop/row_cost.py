"""What a row costs beside what a heartbeat costs anyway, learned from the heartbeats that ran."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np

# Cost of one more row relative to the fixed cost of a heartbeat before anything was measured: linear layers on a CPU, 1
# to 64 rows, and a 7B model's decode steps on an H100, 1 to 256 rows.
PRIOR_RATIO = 0.06
PRIOR_RATIO_OF_GPUS = 0.005
# What the prior takes for nothing (of a row, of a pass, of a token), and its standard deviation in units of the mean
# cost, per row for the first and the last.
_PRIOR_SPREAD = 0.5
# Heartbeats that are remembered: contexts grow and requests come and go, so old ones say little.
_WINDOW = 64
_REFIT_EVERY = 8
_ENOUGH = 16
# Residuals beyond this many standard deviations pull no harder (Huber's estimate).
_HUBER = 1.5
_LEAST_SCATTER = 0.02  # of the mean cost: a straight line is no better
_PASSES = 10
_CLOCK = 1e-9  # seconds; nothing takes none


class Line:
    """Seconds of a step, ``fixed + slope * rows``, and of encoding beside it: ``launch`` a pass, ``token`` each token.

    Fitted to the last observations; stalls hardly move it. Huber's M-estimate by reweighted least squares, with a
    Gaussian prior that decides what the observations leave open: a row costs ``ratio`` of what is fixed, a pass that
    encodes costs what is fixed, and a token in it as much as a row.

    Attributes
    ----------
    fixed, slope, launch, token : float
        Seconds; 1, ``ratio``, 1 and ``ratio``, of no unit, before the first observation.
    """

    def __init__(self, ratio: float = PRIOR_RATIO) -> None:
        self.ratio = ratio
        self.fixed, self.slope, self.launch, self.token = 1.0, ratio, 1.0, ratio
        self._seen: deque[tuple[float, float, float, float, float]] = deque(maxlen=_WINDOW)
        self._observed = 0

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Expected seconds for each number of rows, with nothing encoded beside them."""
        return self.fixed + self.slope * rows

    def observe(self, rows: float, encoded: float, seconds: float, steps: int = 1) -> None:
        """Learn from the steps of a heartbeat and the tokens encoded beside them.

        Every eighth is enough once there are some.
        """
        passes = 1 / steps if encoded else 0.0
        self._seen.append((1.0, rows, passes, encoded / steps, max(seconds / steps, _CLOCK)))
        self._observed += 1
        if self._observed <= _REFIT_EVERY or self._observed % _REFIT_EVERY == 0:
            self._fit()

    def unvaried(self) -> bool:
        """Whether a good number of observations are all of as many rows."""
        return len(self._seen) >= _ENOUGH and len({one[1] for one in self._seen}) == 1

    def _fit(self) -> None:
        seen = np.array(self._seen)
        x, y = seen[:, :4], seen[:, 4]  # [observations, 4], [observations]
        cost = np.array([self.fixed, self.slope, self.launch, self.token])
        cost *= np.median(y / (x @ cost))  # the line before has the shape where the search starts
        rows = float(x[:, 1].mean())
        level = float(cost[0] + cost[1] * rows)
        nothing = np.array([[-self.ratio * rows, rows, 0, 0], [1, 0, -1, 0], [0, -rows, 0, rows]])
        for _ in range(_PASSES):
            residual = np.abs(y - x @ cost)
            scatter = max(1.4826 * float(np.median(residual)), _LEAST_SCATTER * level)
            weighted = x / np.maximum(residual / (_HUBER * scatter), 1)[:, None]
            prior = (scatter / level / _PRIOR_SPREAD) ** 2 * (nothing.T @ nothing)
            cost = np.linalg.solve(weighted.T @ x + prior, weighted.T @ y)
        # Noise may turn a line the wrong way; no part of a cost is negative.
        least = 1e-3 * level / np.array([1, rows, 1, rows])
        self.fixed, self.slope, self.launch, self.token = np.maximum(cost, least).tolist()


class Timing(NamedTuple):
    """What a heartbeat did and how long that took, from the looks that the host takes at the device anyway."""

    rows: int
    steps: int  # tokens of the longest row
    encoded: int  # by the policy beside the rows: prompts, and responses that were preempted
    scored: int  # by the reward model beside the rows' own tokens: prompts
    propose_seconds: float  # from the heartbeat's start until the rows were drawn
    score_seconds: float  # from then on
    looked_at: int  # of the rows: the others needed no reward


class Heartbeat(NamedTuple):
    """What :attr:`StarsEngine.on_heartbeat` is told of a heartbeat in which candidates were drawn."""

    requests: int  # that drew
    drawn: int  # tokens
    committed: int  # tokens
    accepted: float  # sum of the acceptance probabilities of all candidates tested since the call began
    tested: int  # how many these were
    measured: bool  # False where something was captured or compiled since the heartbeat before: seconds mean nothing
    timing: Timing


class HeartbeatCost:
    """Seconds of a heartbeat, per token of its segments, as a function of its rows.

    Kept by an engine from call to call: machine and models stay the same. What is measured decides how many candidates
    are drawn side by side, and with that no text.

    Decode steps and scoring are learned apart, since a captured step costs its padding rows too and scoring does not.
    """

    def __init__(self, ratio: float = PRIOR_RATIO) -> None:
        self.propose, self.score = Line(ratio), Line(ratio)

    def observe(self, timing: Timing, padded_rows: int) -> None:
        """Learn from a heartbeat whose decode steps had so many rows, padding included."""
        self.propose.observe(padded_rows, timing.encoded, timing.propose_seconds, timing.steps)
        self.score.observe(timing.looked_at, timing.scored, timing.score_seconds, timing.steps)

    def per_token(self, padded_rows: np.ndarray, looked_at: np.ndarray) -> np.ndarray:
        """Expected seconds per token of the segments, for numbers of rows ``[...]``, padded and to be scored."""
        return self.propose(padded_rows) + self.score(looked_at)

    def unvaried(self) -> bool:
        """Whether the last heartbeats had equally many rows, so that what one more costs is the prior's guess."""
        return self.propose.unvaried()

    def line(self, in_order: bool = False) -> tuple[float, float]:
        """What is fixed in it, and what a row adds: where scoring goes in order, none that it would not cost later."""
        row = self.propose.slope + (0.0 if in_order else self.score.slope)
        return self.propose.fixed + self.score.fixed, row

    def encoding_worth(self, rows: int, steps: int) -> float:
        """Tokens that are encoded in the time of so many decode steps of so many rows.

        Where a pass costs more than that by itself, as many as take as long as the pass does without them.
        """
        line = self.propose
        return max(steps * (line.fixed + line.slope * rows) - line.launch, line.launch) / line.token

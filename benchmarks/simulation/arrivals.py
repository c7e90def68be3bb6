"""When requests come and how long they are, in the shape of a public trace: drawn, no data of it are here."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_GRID = 4096  # points of a day's rate
Quantiles = tuple[tuple[float, float], ...]  # (share of the requests, at most so many tokens)


@dataclass(frozen=True)
class Shape:
    """What was published of a trace, and what is drawn from it.

    Lengths are drawn from the straight line, in log tokens, through the published quantiles; the lowest is a guess.
    """

    name: str
    rate: float  # requests a second, mean of the week
    peak_to_trough: float  # requests of the busiest hour of a weekday, over those of the quietest
    gaps: float  # shape of the Gamma law of the times between requests; 1 is a Poisson process
    prompt: Quantiles
    answer: Quantiles


# Azure LLM inference trace 2024 (2408.00741; 27.3 M and 16.8 M requests of a week). Quantiles, and the hours' ratio, as
# the analysis in github.com/ctdunlap32/data-center-flexibility-resource-adequacy prints them. The shape of the gaps is
# the one whose median over its mean is the printed 1.37 ms over 15.33 ms, and 2.34 over 19.06.
SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            "conversation",
            rate=45.1,
            peak_to_trough=2.0,
            gaps=0.189,
            prompt=((0.0, 100), (0.5, 928), (0.9, 3830), (0.99, 6683), (1.0, 7999)),
            answer=((0.0, 1), (0.5, 41), (0.9, 342), (0.95, 455), (0.99, 694), (1.0, 1500)),
        ),
        Shape(
            "coding",
            rate=27.8,
            peak_to_trough=10.0,
            gaps=0.214,
            prompt=((0.0, 100), (0.5, 1930), (0.9, 6251), (0.99, 7685), (1.0, 7743)),
            answer=((0.0, 1), (0.5, 8), (0.9, 43), (0.95, 79), (0.99, 271), (1.0, 5000)),
        ),
    )
}


@dataclass(frozen=True)
class Surge:
    """The rate of arrivals is multiplied from an hour of the day on, for a share of the day."""

    hour: float = 0.0
    factor: float = 1.0
    share: float = 0.0


def daily_rate(hours: np.ndarray, shape: Shape, surge: Surge = Surge()) -> np.ndarray:
    """Rate at hours of a day ``[n]`` over its mean: a sine between trough and peak, which is at 15:00."""
    swing = (shape.peak_to_trough - 1) / (shape.peak_to_trough + 1)
    rate = 1 + swing * np.cos((hours - 15) / 24 * 2 * np.pi)
    return np.where((hours >= surge.hour) & (hours < surge.hour + 24 * surge.share), rate * surge.factor, rate)


def arrival_times(
    requests: int,
    day: float,
    shape: Shape,
    streams: int = 1,
    surge: Surge = Surge(),
    seed: int = 0,
) -> np.ndarray:
    """Seconds ``[requests]``, sorted, of requests in a day that takes ``day`` seconds.

    Gaps between requests follow the shape's Gamma law where time runs with the daily rate. With several streams, which
    are independent and equally busy, these are merged, which evens bursts out.
    """
    rng = np.random.default_rng(seed)
    sizes = np.full(streams, requests // streams)
    sizes[: requests % streams] += 1
    merged = []
    for size in sizes.tolist():
        passed = rng.gamma(shape.gaps, size=size + 1).cumsum()
        merged.append(passed[:-1] / passed[-1])
    hours = np.linspace(0, 24, _GRID)
    below = np.concatenate([[0.0], daily_rate((hours[1:] + hours[:-1]) / 2, shape, surge).cumsum()])
    return np.interp(np.sort(np.concatenate(merged)), below / below[-1], hours / 24 * day)


def lengths(quantiles: Quantiles, requests: int, rng: np.random.Generator) -> np.ndarray:
    """Whole tokens ``[requests]``, at least 1, of a law with these quantiles."""
    shares, tokens = np.array(quantiles).T
    drawn = np.exp(np.interp(rng.random(requests), shares, np.log(tokens)))
    return np.maximum(drawn.round(), 1).astype(np.int64)

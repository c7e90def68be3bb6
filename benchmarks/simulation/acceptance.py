"""Which attempt of which segment is accepted: drawn, or as a run of the engine recorded it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Course:
    """What the candidates of one request will be, whoever schedules them."""

    acceptance: float  # P(accept) of a candidate
    winners: list[
        int
    ]  # per segment the first attempt that is accepted, from 1 on; more than are allowed for a fallback
    tokens: list[int]  # per segment


def rates(acceptance: str, requests: int, seed: int) -> np.ndarray:
    """P(accept) per request ``[requests]``: "0.3" for all, or "beta(1.5,3.5)" drawn for each.

    Raises
    ------
    ValueError
        For anything else.
    """
    drawn = re.fullmatch(r"beta\(([\d.]+),\s*([\d.]+)\)", acceptance.strip().lower())
    try:
        if drawn is not None:
            values = np.random.default_rng(seed).beta(float(drawn[1]), float(drawn[2]), requests)
            return np.clip(values, 1e-3, 1.0)
        rate = float(acceptance)
    except ValueError:
        rate = -1.0
    if not 0 < rate <= 1:
        raise ValueError(
            f"acceptance={acceptance!r}: a probability above 0 and at most 1, beta(a,b) with both above 0, or a file "
            "that stars-fast generate wrote"
        )
    return np.full(requests, rate)


def synthetic(acceptance: np.ndarray, response: int, segment: int, seed: int) -> list[Course]:
    """Responses of so many tokens, each candidate accepted with its request's probability."""
    tokens = [min(segment, response - start) for start in range(0, response, segment)]
    rng = np.random.default_rng(seed)
    winners = rng.geometric(acceptance[:, None], (len(acceptance), len(tokens)))
    return [Course(float(a), row, tokens) for a, row in zip(acceptance, winners.tolist(), strict=True)]


def recorded(lines: Iterable[str], max_attempts: int) -> list[Course]:
    """Responses as rows of ``stars-fast generate`` tell them. Rows that failed are left out.

    Raises
    ------
    ValueError
        For lines that are no such rows, naming the first, or where none is left.
    """
    courses = []
    for number, line in enumerate(lines, 1):
        try:
            segments = json.loads(line)["segments"]
            if segments:
                courses.append(_course(segments, max_attempts))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"line {number} is no row that stars-fast generate wrote: {error!r}") from error
    if not courses:
        raise ValueError("no row holds a segment")
    return courses


def _course(segments: list[dict[str, Any]], max_attempts: int) -> Course:
    winners = [int(s["attempts"]) if s["accepted"] else max_attempts + 1 for s in segments]
    looked_at = sum(int(s["attempts"]) for s in segments)
    accepted = sum(bool(s["accepted"]) for s in segments)
    return Course((accepted + 0.5) / (looked_at + 1), winners, [int(s["tokens"]) for s in segments])

"""How far a method's answers are from the policy's: KL divergence per text, from what a run keeps of its segments."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from stars_fast.evaluation.cells import ACCEPTING, BASELINE

_BEST_OF = ("best_of_n", "blockwise_best_of_n")
_SEARCH = "optimal_stopping"
_MOST_FALLBACKS = 0.1  # of the segments: beyond it what a fallback's law is not decides the figure

Segment = Mapping[str, Any]  # as records have it


class Divergence(NamedTuple):
    """KL(method || policy) of a text, in nats; NaN where there is no formula."""

    value: float
    at_most: bool = False  # the value bounds it


def divergence(method: str, texts: Sequence[Sequence[Segment]]) -> Divergence:
    """KL divergence of a method's texts from the policy's as it is sampled, a mean over texts of their segments' sum.

    The chain rule makes the divergence of a text the expected sum of those of its segments, given what is before them.
    NaN also where more than a tenth of the segments of a method that tests fell back.

    Parameters
    ----------
    method : str
        In ``stars_fast.methods.METHODS``.
    texts : sequence of sequence of mapping
        Of each text its segments, with ``attempts``, ``accepted`` and, where candidates are tested,
        ``log_acceptance``. At least one.
    """
    if method == BASELINE:
        return Divergence(0.0)
    if method in ACCEPTING:
        if fallbacks(method, texts) > _MOST_FALLBACKS:
            return Divergence(math.nan)
        return Divergence(fmean(sum(map(of_tested, text)) for text in texts))
    if method in _BEST_OF:
        return Divergence(fmean(sum(of_best(segment["attempts"]) for segment in text) for text in texts))
    if method == _SEARCH:
        return Divergence(of_search([[segment["attempts"] for segment in text] for text in texts]), at_most=True)
    return Divergence(math.nan)


def fallbacks(method: str, texts: Sequence[Sequence[Segment]]) -> float:
    """Share of the segments of a method's texts of which no candidate passed; NaN where none is tested."""
    fell_back = [not segment["accepted"] for text in texts for segment in text]
    return fmean(fell_back) if method in ACCEPTING and fell_back else math.nan


def of_tested(segment: Segment) -> float:
    """An estimate of ``E log A(s) - log a``, A being the acceptance probability of a segment and a its mean over them.

    Behind J candidates that were looked at, J geometric, ``sum_{k < J} 1 / k`` has the mean ``-log a`` without a bias:
    ``E sum_{k < J} 1 / k = sum_k P(J > k) / k = sum_k (1 - a)^k / k``. A fallback counts as the best of its attempts.

    Fallbacks bias the mean either way: the sum is cut off, a fallback is the best of rejected candidates and not of the
    policy's, and its law overlaps with that of the accepted. Where a share f of what follows a prefix falls back the
    bias is at most ``-f log f - (1 - f) log(1 - f) - f log a``: the first two terms are what the mixture of both laws
    can lack of their mean divergence, the last is what a fallback's is off by.
    """
    attempts = segment["attempts"]
    if not segment["accepted"]:
        return of_best(attempts)
    log: float = segment["log_acceptance"]
    return log + sum(1 / k for k in range(1, attempts))


def of_best(n: int) -> float:
    """``log n - (n - 1) / n``: of the best of n candidates whose rewards all differ; else at most that
    (arXiv 2401.01879).
    """
    return math.log(n) - (n - 1) / n


def of_search(attempts: Sequence[Sequence[int]]) -> float:
    """A bound for what looks at J_k candidates and takes one: ``sum_k P(k segments or more) log E[J_k]``.

    One of J candidates is taken, so ``q(s) <= E[J] pi(s)`` behind each prefix, and ``KL <= log E[J]``. By Jensen's
    inequality the mean over prefixes goes into the logarithm.
    """
    longest = max(map(len, attempts))
    counts = [[text[k] for text in attempts if len(text) > k] for k in range(longest)]
    return sum(len(here) * math.log(fmean(here)) for here in counts) / len(attempts)

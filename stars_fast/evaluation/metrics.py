"""Figures of an evaluation, as pure functions of rewards, tokens and counts."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from statistics import fmean
from typing import NamedTuple

import numpy as np

_RESAMPLES = 2000
_BOOTSTRAP_SEED = 0


class Interval(NamedTuple):
    """An estimate and its 95 % bootstrap percentile interval."""

    value: float
    low: float
    high: float


def bootstrap(values: Sequence[float]) -> Interval:
    """Mean over prompts with its 95 % percentile interval (Efron 1979); the same for the same values.

    Parameters
    ----------
    values : sequence of float
        One per prompt; at least one. NaN is an error of the caller's.

    Raises
    ------
    ValueError
        For no values, or one that is NaN.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.size == 0 or np.isnan(sample).any():
        raise ValueError(
            f"values has {sample.size} entries, {int(np.isnan(sample).sum())} of them NaN: nothing to mean"
        )
    return interval(float(sample.mean()), resamples(sample))


def resamples(values: np.ndarray) -> np.ndarray:
    """Means ``[2000]`` of resamples of the values of prompts ``[n]``: the same prompts for the same n, so that means of
    several methods are paired.
    """
    drawn = np.random.default_rng(_BOOTSTRAP_SEED).integers(values.size, size=(_RESAMPLES, values.size))
    means: np.ndarray = values[drawn].mean(axis=1)
    return means


def interval(value: float, resampled: np.ndarray) -> Interval:
    """An estimate with the percentiles of what it is in resamples ``[n]``."""
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Interval(value, float(low), float(high))


def outcomes(rewards: Sequence[float], baseline: Sequence[float], tie: float = 0.0) -> list[float]:
    """Per prompt: 1 where a reward exceeds its baseline by more than ``tie``, 0.5 within ``tie``, else 0.

    Against itself everything scores 0.5, so that 50 % means "no better".
    """
    if len(rewards) != len(baseline):
        raise ValueError(f"rewards has {len(rewards)} entries, baseline {len(baseline)}: they are paired by prompt")
    differences = [reward - other for reward, other in zip(rewards, baseline, strict=True)]
    return [0.5 if abs(difference) <= tie else float(difference > 0) for difference in differences]


def perplexity(logprobs: Iterable[Sequence[float | None]]) -> float:
    """``exp`` of the mean negative log-probability per token, all texts together. NaN without a token, or with one that
    the policy has not read.
    """
    tokens = [logprob for text in logprobs for logprob in text]
    known = [logprob for logprob in tokens if logprob is not None]
    return math.exp(-fmean(known)) if known and len(known) == len(tokens) else math.nan


def distinct(texts: Iterable[Sequence[Hashable]], n: int) -> float:
    """Distinct-n (Li et al. 2016): different n-grams over all n-grams of all texts. NaN without an n-gram."""
    seen, total = set[tuple[Hashable, ...]](), 0
    for tokens in texts:
        grams = list(zip(*(tokens[i:] for i in range(n)), strict=False))
        seen.update(grams)
        total += len(grams)
    return len(seen) / total if total else math.nan

"""What is learned once for a policy and a reward model: the law of a segment's rewards, given the reward before it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

FIT_NAME = "stars_fit.json"
# Quantiles that are kept of a distribution's shape, and prefixes of each segment.
_ATOMS, _PREFIXES = 400, 64
# Candidates a segment of which a report speaks.
_BUDGETS = (1, 2, 3, 4, 6, 8, 12, 16)
# Answers from which it is learned what unfinished ones come to; and what of their reward counts in the end, at least.
_LEAST_PROSPECTS, _LEAST_CARRIED = 12, 0.25
# Below this, partial rewards say too little about final ones to guide by.
_GUIDABLE_CORRELATION = 0.3
# Largest logarithm of a spread, whose square is to be a number still.
_WIDEST = 100.0
# Of the mean variance of all segments, what one is taken to have whose rewards do not vary.
_LEAST_VARIANCE = 0.01


class SegmentLaw(NamedTuple):
    """Rewards of the candidates of one segment, in the reward's units, behind a prefix with the reward ``before``.

    Their mean varies among such prefixes, around ``mean + slope * before`` with the standard deviation ``between``.
    Within a prefix they have the standard deviation ``exp(log_spread + spread_slope * before)``, ``before`` being
    clipped there to what was seen, from ``lowest`` to ``highest``. The first segment has nothing before it: 0. A prefix
    that was rejected for good, and went on because nothing better was found, is taken for the lowest that was seen.

    An unfinished answer that has the reward r after it, and goes on with n candidates a segment, ends with
    ``ahead + carried * r + searched * log(n)`` on average.
    """

    mean: float
    slope: float
    between: float
    log_spread: float
    spread_slope: float
    lowest: float
    highest: float
    ahead: float = 0.0
    carried: float = 1.0
    searched: float = 0.0

    def centre(self, before: float) -> float:
        """Mean reward to expect behind such a prefix."""
        return self.mean + self.slope * (self.lowest if before == -math.inf else before)

    def variance(self, before: float) -> float:
        """Of the candidates within such a prefix, as far as is known before they are drawn."""
        return math.exp(2 * (self.log_spread + self.spread_slope * min(max(before, self.lowest), self.highest)))

    def unfinished(self, final: float, candidates: float) -> float:
        """Reward of an unfinished answer that is worth as much as a finished one with the reward ``final``."""
        return (final - self.ahead - self.searched * math.log(candidates)) / self.carried


class Prefix(NamedTuple):
    """A prefix that was met, and the rewards of its candidates in the order in which they were drawn."""

    before: float  # its own; 0 for the first segment
    rewards: tuple[float, ...]


@dataclass(frozen=True, repr=False)
class Fit:
    """What :func:`stars_fast.fit` learned for a pair of models; serves any prompt.

    Attributes
    ----------
    laws : tuple of SegmentLaw
        By segment index; the last one holds for later segments as well.
    levels : tuple of float
        Rewards less what was to be expected before the segment was drawn, in standard deviations of that: atoms of
        equal weight, ascending.
    prefixes : tuple of tuple of Prefix
        By segment index, some of those that it was learned from, by ascending reward. Those of a calibration have one
        candidate each: enough for quantiles, and for nothing else.
    outlook : tuple of (float, float)
        Candidates a segment, the best of which went on, and the reward of the finished answers; ascending.
    made_for : mapping
        The models, segmenter and sampling it was made for. It says nothing about others.
    figures : mapping
        What it was made from, and what that says about the reward.
    """

    laws: tuple[SegmentLaw, ...]
    levels: tuple[float, ...]
    prefixes: tuple[tuple[Prefix, ...], ...]
    outlook: tuple[tuple[float, float], ...] = ()
    made_for: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    figures: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __hash__(self) -> int:  # asked for each request, by what is kept of costs: of the part that is short
        return hash((self.laws, self.levels))

    def __repr__(self) -> str:
        return f"Fit({len(self.laws)} segments, {self.figures.get('prompts', 0):.0f} prompts)"

    def law(self, segment: int) -> SegmentLaw:
        """Of the segment with this index, from 0 on."""
        return self.laws[min(segment, len(self.laws) - 1)]

    def level(self, segment: int, before: float, reward: float) -> float:
        """``F(reward)`` in (0, 1), strictly increasing: the share of candidates of such prefixes with lower rewards."""
        law = self.law(segment)
        scale = math.sqrt(law.variance(before) + law.between**2)
        return _share_below((reward - law.centre(before)) / scale, self.levels)

    def to_dict(self) -> dict[str, Any]:
        """As plain, JSON-ready values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return {**plain, "laws": [law._asdict() for law in self.laws]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Fit:
        """What :meth:`to_dict` gave. Raises ValueError for anything else."""
        try:
            laws = tuple(SegmentLaw(**{name: float(v) for name, v in law.items()}) for law in values["laws"])
            prefixes = tuple(
                tuple(Prefix(float(before), tuple(map(float, rewards))) for before, rewards in segment)
                for segment in values["prefixes"]
            )
            fit = cls(
                laws,
                tuple(map(float, values["levels"])),
                prefixes,
                tuple((float(a), float(b)) for a, b in values["outlook"]),
                dict(values["made_for"]),
                dict(values["figures"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            said = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"fit: not what Fit.to_dict gives ({said}): make it anew with stars_fast.fit(engine, prompts)"
            ) from error
        fit._check()
        return fit

    def _check(self) -> None:
        """Raise ValueError for what no fit has: a file may be damaged, or edited by hand."""
        numbers = [*self.levels, *(number for law in self.laws for number in law)]
        rewards = [reward for met in self.prefixes for one in met for reward in (one.before, *one.rewards)]
        counts = {len(one.rewards) for met in self.prefixes for one in met}
        faults = {
            "laws, levels or prefixes are empty": not (self.laws and self.levels and all(self.prefixes)),
            "laws and prefixes are not of as many segments": len(self.laws) != len(self.prefixes),
            "a number is NaN or beyond 1e30": not all(abs(one) <= 1e30 for one in (*numbers, *rewards)),
            "levels do not ascend": any(a > b for a, b in pairwise(self.levels)),
            "prefixes have no candidates, or not as many each": len(counts) != 1 or 0 in counts,
            "more than 10,000 levels or prefixes of a segment": max(map(len, (self.levels, *self.prefixes))) > 10_000,
        }
        for i, law in enumerate(self.laws):
            widest = abs(law.log_spread) + abs(law.spread_slope) * max(abs(law.lowest), abs(law.highest))
            faults[f"law {i}: between={law.between:g} must be > 0"] = not (law.between > 0 or counts == {1})
            faults[f"law {i}: carried={law.carried:g} must be > 0"] = not law.carried > 0
            faults[f"law {i}: lowest={law.lowest:g} is above highest={law.highest:g}"] = law.lowest > law.highest
            faults[f"law {i}: a spread of exp({widest:g})"] = not widest <= _WIDEST
        found = next((fault for fault, there in faults.items() if there), None)
        if found is not None:
            raise ValueError(f"fit: {found}: make it anew with stars_fast.fit(engine, prompts)")

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write ``stars_fit.json`` into a folder, which is made if needed."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FIT_NAME).write_text(json.dumps(self.to_dict(), allow_nan=False) + "\n")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str]) -> Fit:
        """Read what :meth:`save_pretrained` wrote: a folder, or the file itself."""
        path = Path(pretrained_model_name_or_path)
        path = path / FIT_NAME if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"no {FIT_NAME} at {path}: stars_fast.fit(engine, prompts) makes one")
        try:
            return cls.from_dict(json.loads(path.read_text()))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: {error}") from error

    def report(self) -> Report:
        """What it was made from, how far partial rewards predict final ones, and which reward to expect for how much.

        Keys: ``prompts``, ``samples``, ``policy_tokens`` (drawn for it), ``unguided_reward``, ``rank_correlation`` (of
        partial and final rewards, unguided), ``log_z`` (how far the reward is from a value function, ``E |log Z|`` over
        prefixes, 0 where it is one: docs/methods.md), ``outlook`` (by candidates a segment, the reward of the best of
        as many, between those that were tried by their logarithm; optimal stopping is to do better).
        """
        if not self.outlook:
            raise ValueError("fit: a calibration's, which has no outlook: Calibration.report() says what to expect")
        tried, rewards = zip(*self.outlook, strict=True)
        budgets = [budget for budget in _BUDGETS if budget <= tried[-1]]
        expected = np.interp(np.log(budgets), np.log(tried), rewards).tolist()
        warnings = unguidable(self.figures.get("rank_correlation", math.nan))
        return Report(self.figures, outlook=dict(zip(budgets, expected, strict=True)), warnings=warnings)

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """What it was made for and what is at hand, where that is not the same, in words."""
        return [
            f"{name} is {other.get(name)!r} here, {self.made_for.get(name)!r} in the fit"
            for name in {**self.made_for, **other}
            if self.made_for.get(name) != other.get(name)
        ]


class Report(dict[str, Any]):
    """Figures of a fit; a mapping that prints as text."""

    def __str__(self) -> str:
        lines = [
            f"made from                {self['prompts']:.0f} prompts, {self['policy_tokens']:.0f} policy tokens",
            f"partial/final rank corr. {_shown(self.get('rank_correlation'))}",
            f"E |log Z| of a segment   {_shown(self.get('log_z'))} (0: the law of a segment is that of whole texts)",
            "candidates a segment     " + " ".join(f"{budget:6g}" for budget in self["outlook"]),
            "reward to expect, about  " + " ".join(f"{reward:+6.2f}" for reward in self["outlook"].values()),
            *(f"warning: {warning}" for warning in self["warnings"]),
        ]
        return "\n".join(lines)


def _shown(figure: float | None) -> str:
    return "unknown: answers have one segment" if figure is None else f"{figure:.2f}"


def unguidable(correlation: float) -> list[str]:
    """The warning for a reward whose partial values say little about final ones, if that is so."""
    if math.isnan(correlation):
        return ["too few segments, or rewards too alike, to tell if partial rewards predict final ones"]
    if correlation < _GUIDABLE_CORRELATION:
        return [
            f"partial rewards hardly predict final ones (rank correlation {correlation:.2f}, below "
            f"{_GUIDABLE_CORRELATION}): this reward model cannot guide partial text; consider best-of-N"
        ]
    return []


class Group(NamedTuple):
    """The candidates of one prefix."""

    segment: int
    before: float  # reward of the prefix; 0 for the first segment
    rewards: Sequence[float]  # of its candidates, in the order in which they were drawn
    kept: float = math.nan  # reward of the one that the answer went on with; NaN where it ended there
    among: int = 1  # of so many it was the best
    final: float = math.nan  # reward of the finished answer


def learn(groups: Sequence[Group], made_for: Mapping[str, Any], figures: Mapping[str, float]) -> Fit:
    """The fit of what was drawn, every group being of as many candidates: at least 4, or one.

    Per segment, least squares for the mean of a prefix, given the reward before it, and for what unfinished answers
    come to; where there are several candidates, for the logarithm of their spread as well, and moments for what the
    means of prefixes vary beyond that.

    Raises
    ------
    ValueError
        For rewards that do not vary.
    """
    by_segment = [[g for g in groups if g.segment == k] for k in range(max(group.segment for group in groups) + 1)]
    by_segment = list(takewhile(lambda here: len(here) >= 3, by_segment))
    if not by_segment:
        raise ValueError("fit: fewer than three prefixes with finite rewards: give more prompts")
    mean_variance = fmean(map(_variance, by_segment))
    size = math.sqrt(fmean(reward**2 for here in by_segment for group in here for reward in group.rewards))
    if not mean_variance > (1e-6 * size) ** 2:
        raise ValueError(
            "fit: the rewards of a segment's candidates are all the same, so that none is better and nothing is guided "
            "(a reward that is called with token ids may need tokenizer=)"
        )
    laws, levels = [], []
    for here in by_segment:
        before, rewards = np.array([g.before for g in here]), np.array([g.rewards for g in here])  # [n], [n, m]
        count, deviations = rewards.shape[1], rewards.std(1)
        slope, mean = _line(before, rewards.mean(1))
        varies = deviations > 1e-6 * math.sqrt(mean_variance)
        spread_slope, _ = _line(before[varies], np.log(deviations[varies]))
        shape, off = np.exp(2 * spread_slope * before), rewards - (mean + slope * before)[:, None]
        least = _LEAST_VARIANCE * mean_variance
        if count > 1:
            variances = rewards.var(1, ddof=1)
            scale = max(float((variances / shape).mean()), least)  # so that it is the mean variance which is right
            between = math.sqrt(max(float((off.mean(1) ** 2).mean() - variances.mean() / count), 1e-4 * scale))
        else:
            scale, between = max(float((off**2).mean()), least), 0.0
        limits = float(before.min()), float(before.max())
        laws.append(SegmentLaw(mean, slope, between, 0.5 * math.log(scale), spread_slope, *limits, *_prospect(here)))
        levels.append((off / np.sqrt(scale * shape + between**2)[:, None]).ravel())
    return Fit(
        tuple(laws),
        _atoms(np.concatenate(levels)),
        tuple(map(_kept, by_segment)),
        made_for=dict(made_for),
        figures=dict(figures),
    )


def _variance(groups: Sequence[Group]) -> float:
    """Of the candidates of a prefix, on average; of all, where each has one."""
    rewards = np.array([group.rewards for group in groups])
    return float((rewards.var(1) if rewards.shape[1] > 1 else rewards.var()).mean())


def _kept(groups: Sequence[Group]) -> tuple[Prefix, ...]:
    """At most 64 of them, of all levels."""
    ordered = sorted(groups, key=lambda group: group.before)
    places = np.unique(np.linspace(0, len(ordered) - 1, _PREFIXES).round().astype(int))
    return tuple(Prefix(_short(ordered[i].before), tuple(map(_short, ordered[i].rewards))) for i in places)


def _short(reward: float) -> float:
    """Six digits of it, whatever its unit."""
    return float(f"{reward:.6g}")


def _prospect(groups: Sequence[Group]) -> tuple[float, float, float]:
    """``ahead``, ``carried`` and ``searched`` of answers that went on; as they are where too few did."""
    on = [group for group in groups if not math.isnan(group.kept + group.final)]
    if len(on) < _LEAST_PROSPECTS:
        return 0.0, 1.0, 0.0
    x = np.array([(1.0, group.kept, math.log(group.among)) for group in on])
    ahead, carried, searched = np.linalg.lstsq(x, np.array([group.final for group in on]), rcond=None)[0].tolist()
    return ahead, max(carried, _LEAST_CARRIED), searched


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """(slope, intercept) of least squares; a slope of 0 where x does not vary."""
    if len(x) == 0:
        return 0.0, 0.0
    spread = float(((x - x.mean()) ** 2).sum())
    slope = float(((x - x.mean()) * (y - y.mean())).sum()) / spread if spread > 0 else 0.0
    return slope, float(y.mean()) - slope * float(x.mean())


def _atoms(values: np.ndarray) -> tuple[float, ...]:
    """At most 400 numbers of equal weight with the same distribution: means of runs of the sorted values."""
    runs = np.array_split(np.sort(values), min(_ATOMS, len(values)))
    return tuple(round(float(run.mean()), 4) for run in runs)


def _share_below(x: float, atoms: Sequence[float]) -> float:
    """Of a distribution given by atoms, made continuous: linear between them, and beyond them a tail that never ends.

    The i-th of n atoms is its quantile ``(i + 1/2) / n``.
    """
    n, width = len(atoms), max(atoms[-1] - atoms[0], 1e-6) / 2
    if x <= atoms[0]:
        return 0.5 / n * math.exp((x - atoms[0]) / width)
    if x >= atoms[-1]:
        return 1 - 0.5 / n * math.exp((atoms[-1] - x) / width)
    i = bisect_right(atoms, x) - 1
    return (i + 0.5 + (x - atoms[i]) / (atoms[i + 1] - atoms[i])) / n

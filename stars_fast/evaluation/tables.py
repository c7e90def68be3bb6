"""From a run's records to one row per method and budget, and from there to Markdown and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from stars_fast.evaluation.cells import BASELINE
from stars_fast.evaluation.divergence import divergence, fallbacks
from stars_fast.evaluation.metrics import Interval, bootstrap, distinct, outcomes, perplexity
from stars_fast.evaluation.records import Record

_TOKENS = ("policy_tokens", "reward_tokens", "committed_tokens")
_PASSES = ("policy_passes", "draft_passes", "reward_passes")
YARDSTICK = "best_of_n"
# Methods whose candidates pass or fail a test; of others an acceptance says nothing.
_TESTING = ("stars", "cards", "rejection_sampling", "rsd", "mara")
# Farther from a budget than this factor, a cell does not stand for its method there.
_NEAR = 1.5


@dataclass(frozen=True)
class Row:
    """Figures of one cell. Prompts that failed in the cell or in the baseline are left out of what is paired.

    Intervals are over prompts, a prompt's value being the mean over its seeds.
    """

    cell: str
    method: str
    budget: float | None
    prompts: int
    seeds: int
    errors: int
    guide: Interval
    judge: Interval
    win: Interval  # against the baseline on the judge's reward, ties counting half
    ties: float
    kl: float  # to the policy, of a text, in nats; NaN where there is no formula, or too many segments fell back
    kl_at_most: bool  # whether it is a bound
    perplexity: float
    distinct_1: float
    distinct_2: float
    distinct_3: float
    length: float  # tokens
    answers: float  # policy tokens drawn for an answer, in those of the baseline's: unguided answers' worth
    policy_tokens: float  # these three per committed token
    reward_tokens: float
    compute: float  # of a committed token, in forward passes of the policy over one token: all models that read
    acceptance: float  # segments accepted over candidates looked at
    fallbacks: float  # share of segments of which no candidate passed; NaN where none is tested
    tokens_per_second: float


def summarise(generations: Sequence[Record], batches: Sequence[Record], tie: float = 0.0) -> list[Row]:
    """One row per cell, in the order they were run.

    Parameters
    ----------
    generations, batches : sequence of dict
        What :class:`stars_fast.evaluation.records.Records` holds.
    tie : float
        Largest difference of the judge's rewards that counts as a tie.

    Raises
    ------
    ValueError
        If the baseline was not run.
    """
    names = list(dict.fromkeys(row["cell"] for row in generations))
    cells = {name: [row for row in generations if row["cell"] == name] for name in names}
    baseline = next((rows for rows in cells.values() if rows[0]["method"] == BASELINE), None)
    if baseline is None:
        raise ValueError(
            f"no cell of method {BASELINE!r} among {', '.join(names) or 'none'}: wins are counted against it"
        )
    judged = {_key(row): row["judge"] for row in baseline if row["error"] is None}
    drawn = {
        name: sum(batch["policy_tokens"] for batch in batches if batch["cell"] == name) / len(rows)
        for name, rows in cells.items()
    }
    unguided = drawn[baseline[0]["cell"]]
    return [
        _row(rows, [batch for batch in batches if batch["cell"] == name], judged, tie, drawn[name] / unguided)
        for name, rows in cells.items()
    ]


def _key(row: Record) -> tuple[int, int]:
    """What pairs generations of different cells."""
    return row["place"], row["seed"]


def by_prompt(rows: Sequence[Record], values: Sequence[float]) -> dict[int, float]:
    """Means over a prompt's seeds, by place: what is resampled are prompts."""
    grouped: dict[int, list[float]] = {}
    for row, value in zip(rows, values, strict=True):
        grouped.setdefault(row["place"], []).append(value)
    return {place: fmean(grouped[place]) for place in sorted(grouped)}


def rewards(generations: Sequence[Record], scorer: str) -> dict[str, dict[int, float]]:
    """By cell and place, the mean reward under "guide" or "judge", of what did not fail."""
    sound = [row for row in generations if row["error"] is None]
    cells = {
        name: [row for row in sound if row["cell"] == name] for name in dict.fromkeys(row["cell"] for row in sound)
    }
    return {name: by_prompt(rows, [row[scorer] for row in rows]) for name, rows in cells.items()}


def _row(
    rows: Sequence[Record],
    batches: Sequence[Record],
    baseline: Mapping[tuple[int, int], float],
    tie: float,
    answers: float,
) -> Row:
    sound = [row for row in rows if row["error"] is None and _key(row) in baseline]
    if not sound:
        raise ValueError(f"{rows[0]['cell']}: all {len(rows)} responses failed, the first with {rows[0]['error']!r}")
    wins = outcomes([row["judge"] for row in sound], [baseline[_key(row)] for row in sound], tie)
    totals = {name: sum(batch[name] for batch in batches) for name in (*_TOKENS, *_PASSES, "seconds")}
    committed = totals["committed_tokens"]
    method, answered = rows[0]["method"].partition("+")[0], [row["segments"] for row in sound]
    kl = divergence(method, answered)
    segments = [segment for text in answered for segment in text]
    attempts = sum(segment["attempts"] for segment in segments)
    # Texts of one seed together: among more texts more is said twice.
    texts = [[row["completion_ids"] for row in sound if row["seed"] == seed] for seed in _seeds(sound)]
    return Row(
        cell=rows[0]["cell"],
        method=rows[0]["method"],
        budget=rows[0]["budget"],
        prompts=len({row["place"] for row in sound}),
        seeds=len(texts),
        errors=sum(row["error"] is not None for row in rows),
        guide=bootstrap([*by_prompt(sound, [row["guide"] for row in sound]).values()]),
        judge=bootstrap([*by_prompt(sound, [row["judge"] for row in sound]).values()]),
        win=bootstrap([*by_prompt(sound, wins).values()]),
        ties=fmean(win == 0.5 for win in wins),
        kl=kl.value,
        kl_at_most=kl.at_most,
        perplexity=perplexity(row["logprobs"] for row in sound),
        distinct_1=fmean(distinct(some, 1) for some in texts),
        distinct_2=fmean(distinct(some, 2) for some in texts),
        distinct_3=fmean(distinct(some, 3) for some in texts),
        length=fmean(len(row["completion_ids"]) for row in sound),
        answers=answers,
        policy_tokens=totals["policy_tokens"] / committed,
        reward_tokens=totals["reward_tokens"] / committed,
        compute=sum(totals[name] for name in _PASSES) / committed,
        acceptance=sum(segment["accepted"] for segment in segments) / attempts if attempts else math.nan,
        fallbacks=fallbacks(method, answered),
        tokens_per_second=committed / totals["seconds"],
    )


def _seeds(rows: Sequence[Record]) -> list[int]:
    return sorted({row["seed"] for row in rows})


def markdown(rows: Sequence[Row]) -> str:
    """A table for people, of one row at least: intervals in brackets."""
    return lines(list(map(_cells, rows)))


def lines(cells: Sequence[Mapping[str, str]]) -> str:
    """A Markdown table of rows with the same columns."""
    rows = [cells[0], ["---"] * len(cells[0]), *(one.values() for one in cells)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _cells(row: Row) -> dict[str, str]:
    return {
        "method": row.method,
        "budget": budget_text(row.budget),
        "compute": f"{row.compute:.2f}",
        "guide": f"{row.guide.value:+.2f}",
        "judge [95 %]": f"{row.judge.value:+.2f} [{row.judge.low:+.2f}, {row.judge.high:+.2f}]",
        "win % [95 %]": f"{100 * row.win.value:.1f} [{100 * row.win.low:.0f}, {100 * row.win.high:.0f}]",
        "ties %": f"{100 * row.ties:.0f}",
        "KL": kl_text(row),
        "perplexity": f"{row.perplexity:.1f}",
        "distinct-2": f"{row.distinct_2:.3f}",
        "tokens": f"{row.length:.0f}",
        "answers": f"{row.answers:.2f}",
        "policy tok": f"{row.policy_tokens:.2f}",
        "reward tok": f"{row.reward_tokens:.2f}",
        "acceptance": f"{row.acceptance:.2f}" if row.method.partition("+")[0] in _TESTING else "",
        "fallbacks %": "" if math.isnan(row.fallbacks) else f"{100 * row.fallbacks:.1f}",
        "tok/s": f"{row.tokens_per_second:.0f}",
    }


def kl_text(row: Row) -> str:
    """A divergence as a table shows it."""
    return "" if math.isnan(row.kl) else f"{'≤ ' * row.kl_at_most}{row.kl:.2f}"


def budget_text(budget: float | None) -> str:
    """A budget as a table shows it."""
    return "" if budget is None else f"{budget:g}"


def to_csv(rows: Sequence[Row]) -> str:
    """All figures, an interval in three columns."""
    out, every = io.StringIO(), list(map(flat, rows))
    writer = csv.DictWriter(out, every[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(every)
    return out.getvalue()


def flat(figures: Any) -> dict[str, Any]:
    """The fields of a dataclass, an interval as three of them."""
    values: dict[str, Any] = {}
    for name, value in vars(figures).items():
        if isinstance(value, Interval):
            values |= {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
        else:
            values[name] = value
    return values


def at_compute(rows: Sequence[Row], compute: float) -> list[Row]:
    """Per method the cell whose compute is nearest, on a log scale; methods without one within a factor 1.5 lack."""
    nearest: dict[str, Row] = {}
    for row in rows:
        off = abs(math.log(row.compute / compute))
        held = nearest.get(row.method)
        if off <= math.log(_NEAR) and (held is None or off < abs(math.log(held.compute / compute))):
            nearest[row.method] = row
    return sorted(nearest.values(), key=lambda row: -row.win.value)


def equal_compute(rows: Sequence[Row]) -> str:
    """Markdown tables at the compute of each cell of best-of-N, the best judged first."""
    sections = []
    for yardstick in rows:
        if yardstick.method == YARDSTICK:
            title = f"At the compute of {YARDSTICK} with n = {budget_text(yardstick.budget)} ({yardstick.compute:.1f})"
            near = at_compute(rows, yardstick.compute)
            alone = all(row.method == YARDSTICK for row in near)
            remark = f"\nNo other method is within a factor {_NEAR:g} of this compute.\n" if alone else ""
            sections.append(f"\n{title}:\n\n{markdown(near)}{remark}")
    return "".join(sections)

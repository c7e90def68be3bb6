"""What a run says in the end: its table, methods against each other, and both as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stars_fast.evaluation.metrics import Interval
from stars_fast.evaluation.paired import SCORERS, YARDSTICK_BUDGET, Comparison, Reached, compare, to_reach
from stars_fast.evaluation.records import Record
from stars_fast.evaluation.tables import (
    YARDSTICK,
    Row,
    budget_text,
    equal_compute,
    flat,
    lines,
    markdown,
    rewards,
    summarise,
    to_csv,
)
from stars_fast.methods.fit import FIT_NAME
from stars_fast.report.files import replace_file, rounded


@dataclass(frozen=True)
class Summary:
    """Of a run, or of as much of it as there is."""

    rows: list[Row]
    reached: dict[str, dict[str, Reached | None]]  # by method and scorer
    equal_tokens: list[Comparison]
    equal_budgets: list[Comparison]
    fits: dict[str, Mapping[str, float]]  # by the folder they lie in: what they were made from, and what that took

    @classmethod
    def of(
        cls,
        generations: Sequence[Record],
        batches: Sequence[Record],
        folder: Path,
        tie: float = 0.0,
        pairs: Sequence[Sequence[str]] = (),
    ) -> Summary:
        """From what :class:`stars_fast.evaluation.records.Records` holds, and the fits in its folder."""
        rows = summarise(generations, batches, tie)
        by_scorer = {scorer: rewards(generations, scorer) for scorer in SCORERS}
        fits = {
            path.parent.relative_to(folder).as_posix(): json.loads(path.read_text(encoding="utf-8"))["figures"]
            for path in sorted((folder / "fit").rglob(FIT_NAME))
        }
        return cls(rows, to_reach(rows), *compare(rows, by_scorer, pairs), fits)

    def markdown(self) -> str:
        """For people."""
        parts = [markdown(self.rows), equal_compute(self.rows)]
        if self.reached:
            reached = [{"method": name, **_reached_cells(of)} for name, of in self.reached.items()]
            title = (
                f"Policy tokens, in unguided answers, that reach the reward of {YARDSTICK} with n = {YARDSTICK_BUDGET}"
            )
            parts.append(f"\n{title}:\n\n{lines(reached)}")
        for title, found in (
            ("At equal policy tokens, the other's rewards being interpolated", self.equal_tokens),
            ("At equal budgets", self.equal_budgets),
        ):
            if found:
                parts.append(f"\n{title}:\n\n{lines(_compared_cells(found))}{_alone(found)}")
        for name, figures in self.fits.items():
            made = f"{figures['prompts']:.0f} prompts, {figures['policy_tokens']:,.0f} policy tokens"
            parts.append(f"\n`{name}` was learned once from {made}; the rows do not count them.\n")
        return "".join(parts)

    def to_json(self) -> str:
        """All figures, and no texts."""
        values = {
            "fits": self.fits,
            "rows": [_plain(flat(row)) for row in self.rows],
            "to_reach": {
                name: {scorer: None if one is None else one._asdict() for scorer, one in of.items()}
                for name, of in self.reached.items()
            },
            "equal_tokens": [_plain(flat(one)) for one in self.equal_tokens],
            "equal_budgets": [_plain(flat(one)) for one in self.equal_budgets],
        }
        return json.dumps(values, indent=1) + "\n"

    def write(self, folder: Path) -> None:
        """``table.md``, ``table.csv`` and ``table.json`` into a folder. Raises OSError."""
        for name, text in (("md", self.markdown()), ("csv", to_csv(self.rows)), ("json", self.to_json())):
            replace_file(folder / f"table.{name}", text)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: rounded(value) if isinstance(value, float) else value for name, value in values.items()}


def _reached_cells(of: Mapping[str, Reached | None]) -> dict[str, str]:
    return {scorer: "" if one is None else f"{'≤ ' * one.at_most}{one.cost:.2f}" for scorer, one in of.items()}


def _compared_cells(found: Sequence[Comparison]) -> list[dict[str, str]]:
    """A row for each method, other and budget, with the figures of both scorers."""
    rows: dict[tuple[str, str, float | None], dict[str, str]] = {}
    by_ratio = any(one.ratio is not None for one in found)
    for one in found:
        head = {
            "method": one.method,
            "budget": budget_text(one.budget),
            "answers": f"{one.cost:.2f}",
            "against": one.other,
            "its answers": "" if one.difference is None else f"{one.other_cost:.2f}",
        }
        row = rows.setdefault((one.method, one.other, one.budget), head)
        row[f"{one.scorer}, difference [95 %]"] = _interval(one.difference, "+")
        if by_ratio:
            row[f"{one.scorer}, ratio of gains [95 %]"] = _interval(one.ratio)
    return list(rows.values())


def _alone(found: Sequence[Comparison]) -> str:
    """A line on rows without a difference."""
    rows = [f"{one.method} at {budget_text(one.budget)} ({one.other})" for one in found if one.difference is None]
    named = ", ".join(dict.fromkeys(rows))
    return f"\nEmpty, since the other has no budget as dear: {named}.\n" if rows else ""


def _interval(one: Interval | None, sign: str = "") -> str:
    if one is None:
        return ""
    return f"{one.value:{sign}.2f} [{one.low:{sign}.2f}, {one.high:{sign}.2f}]"

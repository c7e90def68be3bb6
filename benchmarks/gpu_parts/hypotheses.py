"""Whether a run bears out what was predicted of it (``hypotheses.yaml``).

A prediction is a band: a value and its tolerance, or everything from a bound on. A measurement is a few repeats on one
card in one process; what is measured is their median, its spread the largest less the smallest. The prediction is

- **confirmed** where every repeat lies in the band,
- **refuted** where the median lies outside, further from the band than the spread,
- **unclear** otherwise: so with a single repeat, and on another machine or pair than the prediction is about.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

HYPOTHESES: list[dict[str, Any]] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
_ABOUT = "llama-2-7b on an H200"


class Verdict(NamedTuple):
    """One of "confirmed", "refuted" and "unclear", and what it rests on."""

    word: str
    measured: float
    spread: float


def verdict(predicted: float, repeats: Sequence[float], tolerance: float = 0.0, bound: str = "") -> Verdict:
    """The rule at the head of this module.

    Parameters
    ----------
    predicted : float
    repeats : sequence of float
        At least one.
    tolerance : float
        Share of ``predicted``; a bound has none.
    bound : {"", "at least", "at most"}
    """
    reach = tolerance * abs(predicted)
    low = -math.inf if bound == "at most" else predicted - reach
    high = math.inf if bound == "at least" else predicted + reach
    measured, spread = statistics.median(repeats), max(repeats) - min(repeats)
    word = "unclear"
    if len(repeats) > 1 and all(low <= one <= high for one in repeats):
        word = "confirmed"
    elif len(repeats) > 1 and max(low - measured, measured - high) > spread:
        word = "refuted"
    return Verdict(word, measured, spread)


def judged(content: dict[str, Any], part: str) -> dict[str, dict[str, Any]]:
    """What a record's part says of each hypothesis that it was to decide: the hypothesis, and its verdict."""
    rows, found = content["parts"][part]["rows"], {}
    for one in HYPOTHESES:
        if one["part"] != part:
            continue
        repeats = _repeats(rows, one["rows"], one["value"])
        absent = next((row["what"] for row in rows if row["kind"] == "absent"), None)
        if repeats:
            word, measured, spread = verdict(one["predicted"], repeats, one.get("tolerance", 0.0), one.get("bound", ""))
            remark = _remark(content, one.get("everywhere", False))
            told = {"verdict": "unclear" if remark else word, "measured": measured, "spread": spread, "remark": remark}
        else:
            told = {"verdict": f"not in this build ({absent})" if absent else "not measured"}
        found[one["id"]] = one | {"repeats": repeats} | told
    return found


def line(told: dict[str, Any]) -> str:
    """``H3: predicted 5.5 ms, measured 5.62, confirmed (spread 0.08): products of ...``"""
    measured = told["verdict"]
    if "measured" in told:
        remark = told["remark"] and f"; {told['remark']}"
        measured = f"measured {told['measured']:.3g}, {told['verdict']} (spread {told['spread']:.2g}{remark})"
    return f"{told['id']}: predicted {prediction(told)}, {measured}: {told['what']}"


def prediction(told: dict[str, Any]) -> str:
    """``at least 600 TFLOP/s``"""
    return f"{told.get('bound', '')} {told['predicted']:g} {told['unit']}".strip()


def _remark(content: dict[str, Any], everywhere: bool) -> str:
    if content["tiny"]:
        return "toy models"
    meant = content.get("pair") == "llama-2-7b" and "H200" in content.get("machine", {}).get("gpu", "")
    return "" if everywhere or meant else f"predicted for {_ABOUT}"


def _repeats(rows: Iterable[dict[str, Any]], wanted: dict[str, Any], path: str) -> list[float]:
    for row in rows:
        if all(row.get(name) == value for name, value in wanted.items()):
            value: Any = row
            for name in path.split("."):
                value = value.get(name) if isinstance(value, dict) else None
            if value is not None:
                return list(value) if isinstance(value, list) else [value]
    return []

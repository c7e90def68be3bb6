"""The tables of docs that hold GPU figures: from the newest records in ``benchmarks/results``.

python benchmarks/pages.py            # prints them
python benchmarks/pages.py --write    # puts each between its marks

Of each kind of figure the newest record that has any is shown. *Expected* is what the roofline expects at 0.95 of the
copy bandwidth and 0.77 of the matrix rate that the same run measured, launches included; the *floor* takes all of both
and no launches. Both are of a heartbeat in which no prompt is let in, with as many candidates as were drawn.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_parts.expected import device, expectation  # noqa: E402
from benchmarks.gpu_parts.hypotheses import prediction  # noqa: E402
from benchmarks.gpu_parts.kernels import by_class  # noqa: E402
from benchmarks.roofline import GPUS, Gpu, ModelCost  # noqa: E402

_FINDINGS = ROOT / "docs" / "findings"
PAGES = [ROOT / "docs" / "scale.md", _FINDINGS / "gpu-heartbeat.md", _FINDINGS / "gpu-kernels.md"]
END = "<!-- end -->"
NOTHING = "Not measured yet."
_BATCH, _SEGMENT, _CONTEXT = 64, 16, 256
_LEAST_BEATS = 3  # steady heartbeats of a figure in docs/scale.md
_ACCEPTANCES = (0.15, 0.3, 0.5)
_NAMES = {"llama-2-7b": "Llama-2-7B", "qwen2.5-7b": "Qwen2.5-7B", "llama-3.2-1b": "Llama-3.2-1B"}

Record = dict[str, Any]
Row = dict[str, Any]


def records(folder: Path = ROOT / "benchmarks" / "results") -> list[Record]:
    """Those of ``benchmarks/gpu.py`` on a GPU, the newest first."""
    found = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    found = [record for record in found if record.get("machine", {}).get("gpu") and not record.get("tiny")]
    return sorted(found, key=lambda record: record["date"], reverse=True)


def rows_of(record: Record, kind: str) -> list[Row]:
    """The figures of a kind, from all parts."""
    return [row for entry in record["parts"].values() for row in entry["rows"] if row["kind"] == kind]


def newest(kind: str, found: list[Record]) -> Record | None:
    """The latest record with figures of that kind."""
    return next((record for record in found if rows_of(record, kind)), None)


def gpu_of(record: Record) -> Gpu:
    """The record's GPU with the rates it measured."""
    (rates,) = rows_of(record, "rates")
    return device(record["machine"].get("gpu", ""), rates["copy"], rates["matrix"])


@lru_cache
def _costs(pair: str) -> tuple[ModelCost, ModelCost]:
    reward = "llama-3.2-1b-reward" if pair == "llama-3.2-1b" else "llama-2-7b-reward"
    return ModelCost.named(pair, "policy"), ModelCost.named(reward, "reward")


def steady(record: Record, row: Row) -> dict[str, float]:
    """An engine's row as a page tells it, at the acceptance that was wanted: a commit is counted as often as that
    acceptance makes it, 1 - (1 - a)^M, and not as often as it happened.
    """
    candidates = row["rows"] / row["batch"]
    work = row["batch"], row["segment"], row["wanted"], row["context"], candidates
    told = row.get("expected", {})
    if "floor_milliseconds" not in told:  # an earlier program's, of the best number of candidates
        told = expectation(_costs(row["pair"]), gpu_of(record), *work)
    commit = 1 - (1 - row["wanted"]) ** candidates
    return {
        "candidates": candidates,
        "milliseconds": row["milliseconds"],
        "expected": told["milliseconds"],
        "floor": told["floor_milliseconds"],
        "rate": row["batch"] * row["segment"] * commit / (row["milliseconds"] / 1e3),
    }


def rates(found: list[Record]) -> str:
    """The table of docs/scale.md: batch 64 at three acceptances, beside what is expected and the baselines."""
    record = newest("engine", found)
    source = NOTHING if record is None else f"Measured {_source(record)}."
    lines = [
        f"{source} Batch {_BATCH}, segments of {_SEGMENT}, bfloat16, a 7B reward model; steady heartbeats, at the "
        "acceptance that was wanted, beside what is expected at 0.95 and 0.77 of the copy and product rates that the "
        "run measured, and the floor at all of both:",
        "",
        *_heading(
            "policy, accepted, candidates, heartbeat ms, expected, floor, accepted tok/s, x strong, x plain, "
            "x one candidate"
        ),
    ]
    for pair in ("llama-2-7b", "qwen2.5-7b"):
        for wanted in _ACCEPTANCES:
            lines.append(_line(_NAMES[pair], f"{wanted:.0%}", *_rate_cells(record, pair, wanted)))
    return "\n".join(lines)


def _rate_cells(record: Record | None, pair: str, wanted: float) -> list[str]:
    own = {"pair": pair, "segment": _SEGMENT, "wanted": wanted}
    engines = [row for row in _matching(record, "engine", batch=_BATCH, **own) if row["beats"] >= _LEAST_BEATS]
    gpu = gpu_of(record) if record else GPUS["h200"]
    if record is None or not engines:
        ideal = expectation(_costs(pair), gpu, _BATCH, _SEGMENT, wanted, _CONTEXT)
        cells = [f"{ideal['candidates']}", "not measured yet", f"{ideal['milliseconds']:.0f}"]
        return [*cells, f"{ideal['floor_milliseconds']:.0f}", "", "", "", ""]
    best = max((steady(record, row) for row in engines), key=lambda one: one["rate"])
    one = [steady(record, row)["rate"] for row in engines if row["candidates"] == 1]
    strong = [row["tokens_per_second"] for row in _matching(record, "strong", batch=_BATCH, **own)]
    plain = [row["tokens_per_second"] for row in _matching(record, "plain", **own)]
    cells = [f"{best['candidates']:.2g}", *(f"{best[name]:.0f}" for name in ("milliseconds", "expected", "floor"))]
    over = [f"{best['rate'] / others[0]:.3g}x" if others else "" for others in (strong, plain, one)]
    return [*cells, f"{best['rate']:,.0f}", *over]


def heartbeats(found: list[Record]) -> str:
    """What the rates rest on: every run of the engine, with how many steady heartbeats it had, and all of it."""
    record = newest("engine", found)
    if record is None:
        return NOTHING
    lines = _heading(
        "policy, batch, wanted, candidates, steady of all, mean ms, median, expected, floor, expected / mean, tok/s, "
        "tok/s of the whole run"
    )
    for row in rows_of(record, "engine"):
        name = f"{row['candidates']}"
        beats = row["all_beats"]
        cells = [_NAMES[row["pair"]], f"{row['batch']}", f"{row['wanted']:.0%}"]
        whole = sum(beat["committed"] for beat in beats) / sum(beat["seconds"] for beat in beats)
        if row["beats"]:
            told = steady(record, row)
            name += f" ({told['candidates']:.3g})" if name == "auto" else ""
            figures = [f"{row['milliseconds']:.1f}", f"{row['median_milliseconds']:.1f}"]
            figures += [f"{told['expected']:.1f}", f"{told['floor']:.1f}"]
            figures += [f"{told['expected'] / told['milliseconds']:.0%}", f"{told['rate']:,.0f}"]
        else:
            figures = ["-"] * 6
        lines.append(_line(*cells, name, f"{row['beats']} of {len(beats)}", *figures, f"{whole:,.0f}"))
    return "\n".join([f"{_source(record)}:", "", *lines])


def stages(found: list[Record]) -> str:
    """Where the time of heartbeats goes, with a wait around each stage."""
    record = newest("split", found)
    if record is None:
        return NOTHING
    lines = _heading("batch x candidates, stage, ms, expected, floor")
    for row in rows_of(record, "split"):
        work = row["batch"], row["segment"], 0.3, _CONTEXT, row["candidates"]
        ideal = expectation(_costs(row["pair"]), gpu_of(record), *work)
        spent = dict(row["stages_milliseconds"])
        name = f"{row['batch']} x {row['candidates']}"
        expected, floor = ideal["stages_milliseconds"], ideal["stages_floor_milliseconds"]
        spent["propose"] += spent.pop("extend")  # as on paper
        for one in ("propose", "score"):
            lines.append(_line(name, one, f"{spent.pop(one):.1f}", f"{expected[one]:.1f}", f"{floor[one]:.1f}"))
        rest = sum(expected.values()) - expected["propose"] - expected["score"]
        lines.append(_line(name, "admit, select", f"{sum(spent.values()):.1f}", f"{rest:.1f}", "0.0"))
        whole = row["heartbeat_milliseconds"]
        told = [f"{ideal[one]:.1f} ({ideal[one] / whole:.0%})" for one in ("milliseconds", "floor_milliseconds")]
        lines.append(_line(name, "heartbeat", f"{whole:.1f}", *told))
    return "\n".join([f"{_source(record)}:", "", *lines])


def kernels(found: list[Record]) -> str:
    """Device time by what kernels are for: of the passes that were profiled, or of a heartbeat."""
    record = newest("profile", found) or newest("kernels", found)
    if record is None:
        return NOTHING
    lines = _heading("what, kernels, ms, count, TB/s, TFLOP/s")
    for row in rows_of(record, "profile") or rows_of(record, "kernels"):
        spent = by_class((one["name"], one["milliseconds"], one["count"]) for one in row["top"])
        if row["kind"] == "profile":
            size = f"{row['tokens']:,}" if "tokens" in row else f"{row['groups']} x {row['candidates']}"
            name = f"{row['what']} {size}"
            wall, working = (median(row[f"{one}milliseconds"]) for one in ("", "busy_"))
            spent = {one: (median(each["milliseconds"]), each["count"]) for one, each in row["classes"].items()}
        else:
            name, wall, working = f"a heartbeat, batch {row['batch']}", row["milliseconds"], row["busy_milliseconds"]
            listed = [sum(column) for column in zip(*spent.values(), strict=True)]
            spent["not listed"] = working - listed[0], row["launches"] - listed[1]
        lines += [_line(name, one, f"{ms:.2f}", f"{count:,}", "", "") for one, (ms, count) in spent.items()]
        lines.append(_line(name, "none: the device waits", f"{wall - working:.2f}", "", "", ""))
        for one in row.get("products", ()):
            shape = f"{one['rows']:,} x {one['inner']:,} x {one['columns']:,}, launched"
            rates_of_it = f"{one['terabytes_per_second']:.2f}", f"{one['teraflops']:.0f}"
            lines.append(_line(name, shape, f"{one['microseconds'] / 1e3:.4f} each", f"{one['count']}", *rates_of_it))
    return "\n".join([f"{_source(record)}:", "", *lines])


def steps(found: list[Record]) -> str:
    """Decode steps against their floor, by how they run."""
    record = newest("step", found)
    if record is None:
        return NOTHING
    each = {(row["rows"], row["mode"]): row for row in rows_of(record, "step")}
    modes = list(dict.fromkeys(mode for _, mode in each))
    lines = _heading(", ".join(["rows, floor ms, expected ms", *(f"{mode} ms (over floor)" for mode in modes)]))
    for rows in sorted({rows for rows, _ in each}):
        same = next(row for (own, _), row in each.items() if own == rows)
        cells = [f"{rows}", f"{same['floor_milliseconds']:.2f}", f"{same['expected_milliseconds']:.2f}"]
        for mode in modes:
            row = each.get((rows, mode))
            cells.append(f"{row['milliseconds']:.2f} ({row['over_floor']:.2f}x)" if row else "")
        lines.append(_line(*cells))
    return "\n".join([f"{_source(record)}:", "", *lines])


def calls(found: list[Record]) -> str:
    """Whole calls, from a first one on, beside the rate of their own warm heartbeats."""
    record = newest("throughput", found)
    if record is None:
        return NOTHING
    lines = _heading("call, seconds, tok/s, tok/s of warm heartbeats, expected with prompts, requests at a time")
    for number, one in enumerate(rows_of(record, "throughput")[0]["calls"], 1):
        speeds = [one["tokens_per_second"], one["warm_tokens_per_second"], one["expected_tokens_per_second"]]
        cells = [f"{number}", f"{one['seconds']:.1f}", *("-" if speed is None else f"{speed:,.0f}" for speed in speeds)]
        lines.append(_line(*cells, f"{one['requests']}"))
    return "\n".join([f"{_source(record)}:", "", *lines])


def products(found: list[Record]) -> str:
    """Each product by who computes it and by rows."""
    record = newest("product", found)
    if record is None:
        return NOTHING
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for row in rows_of(record, "product"):
        told = f"{median(row['microseconds']):.1f} / {row['terabytes_per_second']:.2f} / {row['teraflops']:.0f}"
        cells.setdefault((row["shape"], row["contender"]), {})[row["rows"]] = told
    counts = sorted({rows for one in cells.values() for rows in one})
    lines = _heading("product; by; " + "; ".join(f"{rows} rows" for rows in counts), "; ")
    lines += [_line(*names, *(one.get(rows, "") for rows in counts)) for names, one in cells.items()]
    return "\n".join([f"{_source(record)}, us / TB/s / TFLOP/s:", "", *lines])


def verdicts(found: list[Record]) -> str:
    """What was predicted, and what became of it."""
    record = next((one for one in found if one.get("verdicts")), None)
    if record is None:
        return "No record has verdicts yet: `python benchmarks/gpu.py --out gpu.json` gives them."
    lines = _heading(" , what, predicted, measured, spread, verdict")
    for name, one in record["verdicts"].items():
        seen = [f"{one['measured']:.3g}", f"{one['spread']:.2g}"] if "measured" in one else ["", ""]
        lines.append(_line(name, one["what"], prediction(one), *seen, one["verdict"]))
    return "\n".join([f"{_source(record)}:", "", *lines])


TABLES: dict[str, Callable[[list[Record]], str]] = {
    one.__name__: one for one in (rates, heartbeats, stages, kernels, steps, calls, products, verdicts)
}


def filled(page: str, found: list[Record]) -> str:
    """``page`` with what stands between the marks of each table replaced."""
    for name, table in TABLES.items():
        begin = f"<!-- benchmarks/pages.py: {name} -->"
        if begin in page:
            before, rest = page.split(begin)
            page = f"{before}{begin}\n{table(found)}\n{END}{rest.split(END, 1)[1]}"
    return page


def _matching(record: Record | None, kind: str, **fields: Any) -> list[Row]:
    rows = rows_of(record, kind) if record else []
    return [row for row in rows if all(row.get(name) == value for name, value in fields.items())]


def _source(record: Record) -> str:
    about = record["machine"]
    return f"{record['date'][:10]}, {about.get('gpu', 'a CPU')}, torch {about['torch']}"


def _heading(names: str, between: str = ", ") -> list[str]:
    columns = names.split(between)
    return [_line(*columns), "|" + "---|" * len(columns)]


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    known = records()
    for name, table in TABLES.items():
        print(f"{name}\n\n{table(known)}\n")
    if "--write" in sys.argv[1:]:
        for path in PAGES:
            path.write_text(filled(path.read_text(), known))

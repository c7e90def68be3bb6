"""The short table at the end, from the record alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def lines(content: dict[str, Any]) -> list[str]:
    """What a reader wants first: ratios and shares of what the roofline expects, then steps, operators, stages."""
    rows = [row for entry in content["parts"].values() for row in entry["rows"]]
    found = [
        *_machine(content, rows),
        *_heartbeats(rows),
        *_others(rows),
        *_split(rows),
        *_steps(rows),
        *_overlap(rows),
        *_operators(rows),
        *(f"{row['case']}, tile {row['tile']}: {row['microseconds']:.1f} us" for row in _of(rows, "tile")),
        *_tests(rows),
        *_parts(content),
    ]
    return ["", *found]


def _machine(content: dict[str, Any], rows: list[dict[str, Any]]) -> Iterable[str]:
    about = content.get("machine", {})
    yield ", ".join(f"{name} {about[name]}" for name in ("gpu", "driver", "torch", "triton") if about.get(name))
    for row in _of(rows, "rates"):
        share = f" ({row['of_data_sheet']:.0%} of the data sheet)" if row["of_data_sheet"] else ""
        yield f"a copy moves {row['copy'] / 1e12:.3g} TB/s{share}, a large product {row['matrix'] / 1e12:.4g} TFLOP/s"


def _heartbeats(rows: list[dict[str, Any]]) -> Iterable[str]:
    engines = [row for row in _of(rows, "engine") if row.get("beats")]
    if not engines:
        return
    yield ""
    yield "accepted tokens/s; 'of exp.': of what the roofline expects at the realised acceptance; x: over"
    yield (
        f"{'pair':18}{'batch':>5}{'K':>3}{'a':>5}{'M':>5}{'x M=1':>6}{'x plain':>8}{'x strong':>9}{'of exp.':>8}"
        f"{'tok/s':>7}{'exp.':>7}{'ms/beat':>8}{'exp.':>6}{'rows':>5}"
    )
    for row in engines:
        expected, rate = row["expected"], row["tokens_per_second"]
        one = _rate(engines, row, candidates=1)
        plain = _rate(_of(rows, "plain"), {**row, "batch": 1})
        strong = _rate(_of(rows, "strong"), row)
        yield (
            f"{row['pair']:18}{row['batch']:5}{row['segment']:3}{row['acceptance']:5.2f}{row['candidates']!s:>5}"
            f"{_ratio(rate, one):>6}{_ratio(rate, plain):>8}{_ratio(rate, strong):>9}"
            f"{rate / expected['tokens_per_second']:8.0%}{rate:7.0f}{expected['tokens_per_second']:7.0f}"
            f"{row['milliseconds']:8.1f}{expected['milliseconds']:6.1f}{row['rows']:5.0f}"
        )


def _others(rows: list[dict[str, Any]]) -> Iterable[str]:
    for kind in ("strong", "plain"):
        for row in _of(rows, kind):
            yield (
                f"{kind:9}{row['pair']:13} batch {row['batch']:3}, K {row['segment']}, a {row['acceptance']:.2f}: "
                f"{row['tokens_per_second']:.4g} accepted tok/s ({row['attempts']} attempts in {row['seconds']:.3g} s)"
            )
    for row in _of(rows, "generate"):
        yield (
            f"generate {row['pair']:13} batch {row['batch']:3}: {row['tokens_per_second']:.4g} unguided tok/s, "
            f"{row['milliseconds_per_step']:.3g} ms a step"
        )


def _split(rows: list[dict[str, Any]]) -> Iterable[str]:
    for row in _of(rows, "split"):
        stages = row["stages_milliseconds"]
        expected = row["expected"]["stages_milliseconds"]
        yield ""
        yield f"a heartbeat of {row['pair']}, batch {row['batch']}, M {row['candidates']}: ms"
        yield "  " + ", ".join(f"{name} {value:.1f}" for name, value in stages.items())
        yield "  roofline: " + ", ".join(f"{name} {value:.1f}" for name, value in expected.items())
    for row in _of(rows, "kernels"):
        share = row["busy_milliseconds"] / row["milliseconds"]
        yield f"  kernels: {row['launches']} launches, the GPU is busy {share:.0%} of {row['milliseconds']:.1f} ms"
        yield from (
            f"    {one['milliseconds']:8.2f} ms {one['count']:6} x {one['name'][:80]}" for one in row["top"][:10]
        )


def _steps(rows: list[dict[str, Any]]) -> Iterable[str]:
    steps = _of(rows, "step")
    if steps:
        yield ""
        yield f"{'decode step':13}{'mode':>10}{'rows':>6}{'ms':>8}{'floor':>8}{'exp.':>8}{'x floor':>9}{'GB/s':>8}"
    for row in steps:
        yield (
            f"{row['pair']:13}{row['mode']:>10}{row['rows']:6}{row['milliseconds']:8.2f}"
            f"{row['floor_milliseconds']:8.2f}{row['expected_milliseconds']:8.2f}{row['over_floor']:9.2f}"
            f"{row['gigabytes_per_second']:8.0f}"
        )


def _overlap(rows: list[dict[str, Any]]) -> Iterable[str]:
    for row in _of(rows, "overlap"):
        yield ""
        yield (
            f"{row['pair']}, {row['rows']} rows: {row['tokens']} decode steps {row['decode_milliseconds']:.2f} ms, "
            f"scoring as many tokens {row['score_milliseconds']:.2f} ms; one after the other "
            f"{row['serial_milliseconds']:.2f} ms, on two streams {row['concurrent_milliseconds']:.2f} ms: "
            f"{row['saved_milliseconds']:.2f} ms saved"
        )


def _operators(rows: list[dict[str, Any]]) -> Iterable[str]:
    operators = _of(rows, "operator")
    if operators:
        yield ""
        yield f"{'operator':18}{'case':40}{'who':14}{'us':>10}{'floor':>9}{'x floor':>9}"
    for row in operators:
        head = f"{row['operator']:18}{row['case']:40}{row['contender']:14}"
        if "error" in row:
            yield f"{head} {row['error'][:90]}"
        else:
            yield f"{head}{row['microseconds']:10.1f}{row['floor_microseconds']:9.1f}{row['over_floor'] or 0:9.2f}"


def _tests(rows: list[dict[str, Any]]) -> Iterable[str]:
    for row in _of(rows, "tests"):
        counts = ", ".join(f"{row[word]} {word}" for word in ("passed", "failed", "error", "skipped") if word in row)
        yield ""
        yield f"pytest {row['selection'][:60]}: {row['status']}{': ' if counts else ''}{counts}"
        yield from (line for line in row["output"].splitlines() if line.startswith(("FAILED", "ERROR")))


def _parts(content: dict[str, Any]) -> Iterable[str]:
    yield ""
    if content.get("ended"):
        yield f"the last process ended early: {content['ended']}"
    for name, entry in content["parts"].items():
        left_out = sum(row["kind"] == "left_out" for row in entry["rows"])
        remark = ", cut short" if left_out and entry["status"] == "done" else ""
        cause = f": {entry['error'].strip().splitlines()[-1][:150]}" if entry.get("error") else ""
        yield f"part {name}: {entry['status']}{remark}, {entry['seconds']:.0f} s{cause}"


def _of(rows: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["kind"] == kind]


def _rate(rows: list[dict[str, Any]], like: dict[str, Any], **fields: Any) -> float | None:
    """Tokens per second of the row for the same work; None where it was not measured."""
    wanted = {name: like[name] for name in ("pair", "batch", "segment", "wanted")} | fields
    return next((r["tokens_per_second"] for r in rows if all(r.get(n) == v for n, v in wanted.items())), None)


def _ratio(rate: float, other: float | None) -> str:
    return f"{rate / other:.3g}" if other else "-"

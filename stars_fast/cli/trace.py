"""``stars-fast trace``: what was looked at and what became of it, in the terminal or as a page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stars_fast.cli.console import fail, harmless, note, refusing, stdout

_WIDEST = 110  # columns; longer lines of prose are hard to read
_WON = ("accepted", "fallback")
_BARS = "▁▂▃▄▅▆▇█"
Record = Mapping[str, Any]


def run(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="What generate --trace or StarsOutput.save_trace wrote; two files, with --html, are compared."
        ),
    ],
    html: Annotated[Path | None, typer.Option(help="Write a page instead, which a browser shows.")] = None,
    row: Annotated[list[int] | None, typer.Option(min=0, help="Only this row of the output. Repeatable.")] = None,
    candidates: Annotated[bool, typer.Option("--candidates", help="Show what was not kept, too.")] = False,
) -> None:
    """Show a trace: texts with their segments, attempts, rewards against thresholds, and what was not kept."""
    from stars_fast.report.trace import load_trace

    if len(files) > (1 if html is None else 2):
        fail("give one file to read here, or up to two with --html, which compares them")
    if html is not None and any(html.resolve() == path.resolve() for path in files):
        fail(f"--html {html} is a trace that is to be read: name another file")
    with refusing(OSError, ValueError):
        runs = [(path.name, _wanted(load_trace(path), path, row)) for path in files]
    if html is None:
        _show(runs[0][1], candidates)
        return
    from stars_fast.report.files import replace_file
    from stars_fast.report.page import page

    with refusing(OSError):
        replace_file(html, page(runs))
    note(f"written to {html}: open it in a browser")


def _wanted(records: list[dict[str, Any]], path: Path, rows: Sequence[int] | None) -> list[dict[str, Any]]:
    known = {record["row"] for record in records}
    if missing := [row for row in rows or () if row not in known]:
        raise ValueError(f"--row {missing[0]}: {path} has rows 0 to {max(known)}")
    return [record for record in records if not rows or record["row"] in rows]


def _show(records: Sequence[Record], candidates: bool) -> None:
    console = stdout()
    console.width = min(console.width, _WIDEST)
    if len(records) > 1:
        _show_overview(console, records)
    for record in records:
        _show_answer(console, record, candidates)


def _show_overview(console: Console, records: Sequence[Record]) -> None:
    table = Table(box=box.SIMPLE_HEAD, expand=True, padding=(0, 1))
    for name in ("row", "reward", "candidates"):
        table.add_column(name, justify="right")
    table.add_column("prompt", ratio=1, no_wrap=True)
    table.add_column("reward by segment", no_wrap=True)
    for one in records:
        attempts = str(sum(segment["attempts"] for segment in one["segments"]))
        reward = "error" if one["error"] else shown(one["reward"])
        table.add_row(str(one["row"]), reward, attempts, Text(_one_line(_prompt(one))), _spark(one["segments"]))
    console.print(table)


def _show_answer(console: Console, record: Record, candidates: bool) -> None:
    console.rule(Text(f"row {record['row']}, {harmless(record['method'])}"), align="left", style="dim")
    facts = [
        f"reward {shown(record['reward'])}",
        f"{len(record['tokens'])} tokens",
        f"ended by {harmless(record['finish_reason'])}",
    ]
    if math.isfinite(target := _number(record["target"])):
        facts.insert(1, f"target {shown(target)}")
    console.print(Text(", ".join(facts), style="dim"))
    if record["error"]:
        console.print(Text(harmless(record["error"]), style="red"))
    parts = [(_prompt(record), "bold"), *((_text(one), _style(one, i)) for i, one in enumerate(record["segments"]))]
    console.print(Text.assemble(*parts))
    table = Table(box=box.SIMPLE_HEAD, expand=True, padding=(0, 1))
    table.add_column("segment", ratio=1)
    for name in ("reward", "threshold", "attempts"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    for place, segment in enumerate(record["segments"]):
        table.add_row(
            Text(_one_line(_text(segment)), style=_style(segment, place)),
            shown(segment["reward"]),
            shown(segment["threshold"]),
            str(segment["attempts"]),
            "" if math.isinf(_number(segment["threshold"])) else "accepted" if segment["accepted"] else "fallback",
        )
        if candidates:
            _add_candidates(table, segment["candidates"])
    if candidates and record["unfinished"]:
        table.add_row(Text("broke off here", style="red"), "", "", "", "")
        _add_candidates(table, record["unfinished"])
    console.print(table)


def _add_candidates(table: Table, group: Sequence[Record]) -> None:
    for one in group:
        if one["verdict"] not in _WON:
            text = Text(f"  {one['attempt'] + 1}  {_one_line(_text(one))}")
            table.add_row(
                text, shown(one["reward"]), shown(one["threshold"]), "", Text(harmless(one["verdict"])), style="dim"
            )


def _style(segment: Record, place: int) -> str:
    """Neighbours differ; a fallback is underlined."""
    fell = not segment["accepted"] and math.isfinite(_number(segment["threshold"]))
    return ("cyan" if place % 2 else "") + (" underline yellow" if fell else "")


def _text(one: Record) -> str:
    return str(one["tokens"]) if one["text"] is None else harmless(one["text"])


def _prompt(record: Record) -> str:
    return str(record["prompt_ids"]) if record["prompt_text"] is None else harmless(record["prompt_text"])


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _number(value: float | str | None) -> float:
    from stars_fast.report.trace import number

    return number(value)


def shown(value: float | str | None) -> str:
    """A reward in two places behind the point, or nothing."""
    number = _number(value)
    return (
        "" if math.isnan(number) else "∞" if number == math.inf else "-∞" if number == -math.inf else f"{number:+.2f}"
    )


def _spark(segments: Sequence[Record]) -> str:
    """Rewards as bars, between the lowest and the highest of the answer."""
    values = [_number(segment["reward"]) for segment in segments]
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    low, height = min(finite), max(finite) - min(finite) or 1.0
    return "".join(
        _BARS[round((value - low) / height * (len(_BARS) - 1))] if math.isfinite(value) else " " for value in values
    )

"""``python -m benchmarks.simulation``: the engine's scheduler on thousands of requests, without models."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from benchmarks.roofline import ModelCost, Workload, gpu_named
from benchmarks.simulation.acceptance import Course, rates, recorded, synthetic
from benchmarks.simulation.machine import LinearMachine, Machine, RooflineMachine
from benchmarks.simulation.run import Outcome, Work, simulate
from stars_fast.cli.console import plain_table, refusing_models, stdout
from stars_fast.cli.words import speaking_of

app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


@app.command()
def run(
    acceptance: Annotated[
        str, typer.Option(help="P(accept): a number, beta(a,b) drawn per request, or rows that generate wrote.")
    ] = "0.3",
    requests: Annotated[int, typer.Option(min=1, help="Responses, all waiting from the start.")] = 10_000,
    batch: Annotated[int, typer.Option(help="Running requests.")] = 64,
    segment: Annotated[int, typer.Option(min=1, help="Tokens of a segment.")] = 16,
    response: Annotated[int, typer.Option(min=1, help="Tokens of a response.")] = 128,
    context: Annotated[float, typer.Option(help="Mean tokens of prompt and accepted text.")] = 256,
    max_attempts: Annotated[int, typer.Option(help="Candidates per segment before the best is kept.")] = 20,
    max_rows: Annotated[int, typer.Option(help="Most candidates side by side.")] = 256,
    in_order: Annotated[bool, typer.Option("--in-order", help="Score no candidate behind an accepted one.")] = False,
    policy: Annotated[str, typer.Option(help="Config of the policy, as for roofline.")] = "llama-2-7b",
    reward: Annotated[str, typer.Option(help="Config of the reward model.")] = "llama-2-7b",
    gpu: Annotated[str, typer.Option(help="As for roofline.")] = "h200",
    fixed_cost: Annotated[float | None, typer.Option(help="Milliseconds of any heartbeat, instead of a GPU's.")] = None,
    row_cost: Annotated[float | None, typer.Option(help="Milliseconds of a row, with --fixed-cost.")] = None,
    fixed: Annotated[
        str, typer.Option(help="Fixed numbers of candidates to compare with, as in 1,2,4; all where empty.")
    ] = "1,2,3,4,6,8,12,16,20",
    seed: Annotated[int, typer.Option(help="Of acceptances and noise.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare adaptive candidates with fixed ones, with waiting for the slowest, and with knowing everything."""
    with speaking_of(acceptance="--acceptance", max_attempts="--max-attempts"), refusing_models():
        courses = _courses(acceptance, requests, response, segment, max_attempts, seed)
        paper = Workload(batch, segment, context=context, response=response, max_attempts=max_attempts)
        machine = _machine(policy, reward, gpu, paper, fixed_cost, row_cost)
        work = Work(courses, batch, segment, max_attempts, max(int(context - response / 2), 1), max_rows, in_order)
        schedules: list[str | int] = ["auto", "oracle", "barrier", *_numbers(fixed, max_attempts)]
        outcomes = [simulate(work, machine, schedule, seed) for schedule in schedules]
    if as_json:
        record = {
            "acceptance": acceptance,
            "requests": len(courses),
            "batch": batch,
            "segment": segment,
            "max_attempts": max_attempts,
            "max_rows": max_rows,
            "in_order": in_order,
            "machine": {"fixed_ms": fixed_cost, "row_ms": row_cost}
            if fixed_cost is not None
            else {"policy": policy, "reward": reward, "gpu": gpu, "context": context},
            "schedules": [_record(outcome) for outcome in outcomes],
        }
        typer.echo(json.dumps(record, indent=2))
    else:
        _print(outcomes, len(courses), batch, acceptance)


def _courses(acceptance: str, requests: int, response: int, segment: int, max_attempts: int, seed: int) -> list[Course]:
    if Path(acceptance).is_file():
        with Path(acceptance).open() as lines:
            return recorded(lines, max_attempts)[:requests]
    return synthetic(rates(acceptance, requests, seed), response, segment, seed + 1)


def _machine(
    policy: str, reward: str, gpu: str, paper: Workload, fixed_cost: float | None, row_cost: float | None
) -> Machine:
    if (fixed_cost is None) != (row_cost is None):
        raise ValueError(f"fixed_cost={fixed_cost}, row_cost={row_cost}: give both or neither")
    if fixed_cost is not None and row_cost is not None:
        return LinearMachine(fixed_cost / 1e3, row_cost / 1e3)
    costs = ModelCost.named(policy, "policy"), ModelCost.named(reward, "reward")
    return RooflineMachine(*costs, paper, gpu_named(gpu))


def _numbers(fixed: str, most: int) -> list[int]:
    try:
        numbers = [int(part) for part in fixed.split(",")] if fixed else list(range(1, most + 1))
    except ValueError:
        raise ValueError(f"fixed={fixed!r}: numbers of candidates with commas between them, as in 1,2,4") from None
    if any(number < 1 for number in numbers):
        raise ValueError(f"fixed={fixed!r}: each at least 1")
    return [number for number in numbers if number <= most]


def _record(outcome: Outcome) -> dict[str, Any]:
    return {**asdict(outcome), "tokens_per_second": outcome.tokens_per_second, "waste": outcome.waste}


def _print(outcomes: list[Outcome], requests: int, batch: int, acceptance: str) -> None:
    fixed = [outcome for outcome in outcomes if outcome.name.isdigit()]
    best = max(fixed or outcomes, key=lambda outcome: outcome.tokens_per_second)
    title = f"{requests:,} requests, {batch} at a time, acceptance {acceptance}"
    headings = ("heartbeats", "rows", "waste", "accepted tok/s", "x best fixed", "host us")
    table = plain_table(title, ["candidates"], headings)
    for outcome in outcomes:
        table.add_row(
            outcome.name,
            f"{outcome.heartbeats:,}",
            f"{outcome.rows:.1f}",
            f"{outcome.waste:.2f}",
            f"{outcome.tokens_per_second:,.0f}",
            f"{outcome.tokens_per_second / best.tokens_per_second:.3f}",
            f"{outcome.host_us:.0f}",
            style="bold" if outcome in (outcomes[0], best) else None,
        )
    console = stdout()
    console.print(table)
    console.print(
        Text(
            "auto: the engine's scheduler. oracle: the same, told acceptance and costs. barrier: one candidate at a "
            "time, everybody waiting for the slowest at the end of each segment. waste: tokens discarded per token "
            "committed. host us: the scheduler's own time per heartbeat, here."
        )
    )


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.simulation")

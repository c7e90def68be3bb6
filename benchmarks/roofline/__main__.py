"""``python -m benchmarks.roofline``: how fast the loop can be on a GPU, on paper."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from benchmarks.roofline import (
    Gpu,
    Heartbeat,
    ModelCost,
    Stage,
    Workload,
    best_candidates,
    gpu_named,
    heartbeat,
)
from stars_fast.cli.console import plain_table, refusing_models, stdout

app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)

# Numbers of candidates in the table, beside the best.
_SHOWN = (1, 2, 3, 4, 6, 8, 12, 16, 20)


@app.command()
def run(
    policy: Annotated[
        str, typer.Option(help="Config of the policy: folder, config.json, hub id, short name or 'demo'.")
    ],
    reward: Annotated[str, typer.Option(help="Config of the reward model, named likewise.")],
    gpu: Annotated[str, typer.Option(help="a100-80gb, b200, h100-sxm, h200 or l40s.")] = "h200",
    batch: Annotated[int, typer.Option(help="Running requests.")] = 64,
    segment: Annotated[int, typer.Option(help="Tokens of a segment.")] = 16,
    acceptance: Annotated[float, typer.Option(help="P(accept) of a candidate.")] = 0.3,
    context: Annotated[float, typer.Option(help="Mean tokens of prompt and accepted text.")] = 256,
    response: Annotated[int, typer.Option(help="Tokens of a whole response; each costs a prefill.")] = 128,
    max_attempts: Annotated[int, typer.Option(help="Candidates per segment before the best is kept.")] = 20,
    tail: Annotated[int, typer.Option(help="Template tokens the reward model reads behind each candidate.")] = 0,
    in_order: Annotated[bool, typer.Option("--in-order", help="Score no candidate behind an accepted one.")] = False,
    policy_bytes: Annotated[
        float | None, typer.Option(help="Bytes of each weight in the policy's layers: 1 for 8-bit ones.")
    ] = None,
    reward_bytes: Annotated[float | None, typer.Option(help="The same of the reward model.")] = None,
    bandwidth: Annotated[float | None, typer.Option(help="TB/s, instead of the GPU's.")] = None,
    tflops: Annotated[
        float | None, typer.Option(help="Dense TFLOP/s of matrix products, instead of the GPU's 16-bit rate.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what a heartbeat must move and compute, how long that takes, and the best number of candidates."""
    with refusing_models():
        device = _overridden(gpu_named(gpu), bandwidth, tflops)
        workload = Workload(batch, segment, acceptance, context, response, max_attempts, tail, in_order)
        costs = _cost(policy, "policy", policy_bytes), _cost(reward, "reward", reward_bytes)
    best = best_candidates(*costs, workload, device)
    shown = sorted({m for m in _SHOWN if m <= max_attempts} | {best.candidates})
    rows = [heartbeat(*costs, workload, m, device) for m in shown]
    report = {
        "gpu": asdict(device),
        "workload": {**asdict(workload), "prompt": workload.prompt},
        "policy": _model_record(policy, costs[0]),
        "reward": _model_record(reward, costs[1]),
        "best_candidates": best.candidates,
        "heartbeats": [_record(row) for row in rows],
    }
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _print(report, best, rows)


def _cost(name: str, role: str, bytes_per_weight: float | None) -> ModelCost:
    cost = ModelCost.named(name, role)
    return cost if bytes_per_weight is None else cost.quantised(bytes_per_weight)


def _overridden(gpu: Gpu, bandwidth: float | None, tflops: float | None) -> Gpu:
    for name, value in (("bandwidth", bandwidth), ("tflops", tflops)):
        if value is not None and value <= 0:
            raise ValueError(f"{name}={value}: above 0")
    changes: dict[str, Any] = {}
    if bandwidth is not None:
        changes["bandwidth"] = bandwidth * 1e12
    if tflops is not None:
        changes["matrix_rate"] = tflops * 1e12
    return replace(gpu, **changes, source=f"{gpu.source}; as overridden") if changes else gpu


def _model_record(name: str, cost: ModelCost) -> dict[str, Any]:
    counts = {field: getattr(cost, field) for field in ("parameters", "body", "active", "head")}
    return {
        "name": name,
        "class": cost.name,
        **counts,
        "weight_bytes": cost.bytes,
        "dtype": str(cost.dtype).removeprefix("torch."),
        "kv_bytes_per_token": cost.kv_bytes_per_token,
        "experts_read_in_full": cost.experts > 0,
    }


def _record(row: Heartbeat) -> dict[str, Any]:
    return {
        **asdict(row),
        "total": asdict(row.total),
        "tokens_per_second": row.tokens_per_second,
        "floor_tokens_per_second": row.floor_tokens_per_second,
    }


def _print(report: dict[str, Any], best: Heartbeat, rows: list[Heartbeat]) -> None:
    console = stdout()
    console.print(_assumptions(report))
    console.print()
    console.print(_stage_table(best))
    console.print()
    console.print(_candidates_table(best, rows))
    if not best.fits:
        console.print(Text(f"needs {best.memory / 1e9:.0f} GB: more than this GPU has", style="red"))


def _assumptions(report: dict[str, Any]) -> Table:
    gpu, work = report["gpu"], report["workload"]
    achievable = gpu["achievable"]
    lines = {
        role: f"{report[role]['name']}: {report[role]['parameters'] / 1e9:.2f} B parameters in "
        f"{report[role]['weight_bytes'] / 1e9:.1f} GB, "
        f"{report[role]['kv_bytes_per_token']:,} bytes of keys and values a token"
        + (", all experts read" if report[role]["experts_read_in_full"] else "")
        for role in ("policy", "reward")
    }
    lines["gpu"] = (
        f"{gpu['name']}: {gpu['bandwidth'] / 1e12:.3g} TB/s, {gpu['matrix_rate'] / 1e12:.4g} TFLOP/s; achievable "
        f"{achievable['bandwidth']:.0%} and {achievable['matrix'] * gpu['matrix_rate'] / 1e12:.0f} TFLOP/s"
    )
    lines["work"] = (
        f"batch {work['batch']}, segments of {work['segment']}, acceptance {work['acceptance']:g}, "
        f"{work['max_attempts']} attempts, context {work['context']:g}, {work['response']} tokens a response"
    )
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, line in lines.items():
        table.add_row(name, line)
    return table


def _stage_table(best: Heartbeat) -> Table:
    headings = ("GB", "attn GB", "per row", "TFLOP", "floor ms", "ms", "launches")
    table = plain_table(f"A heartbeat with the best M = {best.candidates}", ["stage"], headings)
    for stage in best.stages:
        table.add_row(*_cells(stage))
    table.add_row(*_cells(best.total), style="bold")
    return table


def _cells(stage: Stage) -> list[str]:
    gigabytes = (stage.bytes / 1e9, stage.attention_bytes / 1e9, stage.per_row_attention_bytes / 1e9)
    work = (f"{amount:.2f}" for amount in (*gigabytes, stage.operations / 1e12))
    return [stage.name, *work, *map(_ms, (stage.floor_s, stage.achievable_s, stage.launch_s))]


def _candidates_table(best: Heartbeat, rows: list[Heartbeat]) -> Table:
    headings = ("M", "rows", "commit", "tokens", "floor ms", "ms", "floor tok/s", "tok/s", "x M=1", "GB")
    table = plain_table("Candidates per request", [], headings)
    for row in rows:
        table.add_row(
            str(row.candidates),
            f"{row.rows:.0f}",
            f"{row.commit_probability:.0%}",
            f"{row.committed_tokens:.0f}",
            _ms(row.total.floor_s),
            _ms(row.total.achievable_s),
            f"{row.floor_tokens_per_second:,.0f}",
            f"{row.tokens_per_second:,.0f}",
            f"{row.tokens_per_second / rows[0].tokens_per_second:.2f}",
            f"{row.memory / 1e9:.0f}" + ("" if row.fits else "!"),
            style="bold" if row.candidates == best.candidates else None,
        )
    return table


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.roofline")

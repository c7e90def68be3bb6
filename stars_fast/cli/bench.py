"""``stars-fast bench``: the engine beside what else does the same work, and how cost grows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stars_fast.cli.console import (
    fail,
    note,
    plain_table,
    print_whole,
    progress,
    refusing,
    refusing_models,
    stderr,
    stdout,
    torch_threads,
)
from stars_fast.rows.engines import quiet_transformers

if TYPE_CHECKING:
    from stars_fast.bench.models import Pair

_DTYPES = ("float32", "bfloat16")
_BATCHES = (1, 16)
_SWEEP_BATCH = 4
_PROMPT_LENGTH = 32

Record = dict[str, Any]


def run(
    policy: Annotated[str | None, typer.Option(help="Policy: folder or hub id. Default: random weights.")] = None,
    reward: Annotated[str | None, typer.Option(help="Reward model that reads the policy's ids.")] = None,
    demo: Annotated[bool, typer.Option("--demo", help="Measure the demo models on their openings.")] = False,
    size: Annotated[str, typer.Option(help="Of the random Llamas: 27m, or 1m to try this command.")] = "27m",
    dtype: Annotated[str, typer.Option(help=f"Of both models: {' or '.join(_DTYPES)}.")] = "float32",
    device: Annotated[str, typer.Option(help="Of both models; auto takes a GPU where there is one.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch on the CPU. Default: torch's own.")] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(min=1, show_default="1 and 16; 4 for a sweep", help="Prompts of a call. Repeatable."),
    ] = None,
    prompt_length: Annotated[
        int | None, typer.Option(min=1, show_default="32; the demo's openings", help="Random ids a prompt.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a text.")] = 32,
    segment_length: Annotated[int, typer.Option(min=1, help="Tokens of a segment.")] = 16,
    acceptance: Annotated[
        float, typer.Option(show_default="1/6", help="Share of candidates that the target lets pass.")
    ] = 1 / 6,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each contestant that count.")] = 3,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            help="Vary instead: batch, candidates, acceptance, segment-length, prompts, prompt-length or new-tokens. "
            "Repeatable."
        ),
    ] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for a PNG and an SVG of each sweep.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object; tables go to stderr.")] = False,
) -> None:
    """Measure accepted tokens/s beside baselines in one run, alternating: ratios first. Minutes on a CPU.

    plain: one prompt and one attempt at a time. strong: batched generate and reward passes. best of N: with N as small
    as equals the engine's mean reward. generate: the policy alone, beside an engine that accepts everything.
    """
    from stars_fast.bench import record
    from stars_fast.bench.workload import Workload
    from stars_fast.cli.doctor import examine_machine

    quiet_transformers()
    with refusing(ImportError):
        _check_plots(plots, sweep)
    with refusing_models(), torch_threads(threads):
        if not 0 < acceptance < 1:
            raise ValueError(f"--acceptance {acceptance}: must lie strictly between 0 and 1")
        if sweep and batch and len(batch) > 1:
            raise ValueError(f"--batch {' --batch '.join(map(str, batch))}: a sweep is taken around one workload")
        batches = batch or (_BATCHES if not sweep else (_SWEEP_BATCH,))
        length = prompt_length or (None if demo else _PROMPT_LENGTH)
        loads = [Workload(one, length, max_new_tokens, segment_length, acceptance) for one in batches]
        series = record.swept(loads[0], sweep) if sweep else record.side_by_side(loads)
        pair = _pair(policy, reward, demo, size, dtype, device)
        with progress(record.steps(series, rounds), "measuring") as done:
            found = record.run(pair, series, rounds, done)
    machine = examine_machine()
    found["machine"] = {name: machine[name] for name in ("versions", "platform", "devices", "kernels")}
    _show(stderr() if as_json else stdout(), found)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    if plots is not None:
        from stars_fast.bench.plots import draw

        note("plots: " + " ".join(str(path) for path in draw(found, plots)))


def _check_plots(plots: Path | None, sweep: list[str] | None) -> None:
    """Before minutes of measuring."""
    if plots is None:
        return
    if not sweep:
        fail(f"--plots {plots}: there is nothing to draw without a --sweep")
    from stars_fast.report.figures import require_matplotlib

    require_matplotlib()


def _pair(policy: str | None, reward: str | None, demo: bool, size: str, dtype: str, device: str) -> Pair:
    import torch

    from stars_fast.bench.models import Pair, random_pair
    from stars_fast.demo import NAME, PROMPTS
    from stars_fast.inputs.models import load_classifier, load_policy, placement

    if dtype not in _DTYPES:
        raise ValueError(f"--dtype {dtype!r}: must be one of {', '.join(_DTYPES)}")
    if (policy is None) != (reward is None):
        raise ValueError("give both --policy and --reward, or neither")
    if policy is None and not demo:
        return random_pair(size, getattr(torch, dtype), placement(device))
    if policy is not None and demo:
        raise ValueError(f"--policy {policy!r} and --demo: give one of them")
    names = (policy or NAME, reward or NAME)
    causal, tokenizer, _ = load_policy(names[0], None, device, dtype)
    classifier, _ = load_classifier(names[1], None, device, dtype)
    openings = [list(tokenizer(opening)["input_ids"]) for opening in PROMPTS] if demo else []
    return Pair(NAME if demo else " and ".join(names), causal, classifier, openings)


def _show(console: Console, found: Record) -> None:
    yard = found["yardsticks"]
    amounts = f"{found['threads']} threads", f"{found['rounds']} rounds"
    about = (found["models"], found["dtype"], found["device"], *amounts)
    console.print(
        f"{', '.join(about)}. A copy moves {yard['copy_bytes_per_second'] / 1e9:.3g} GB/s, a large product takes "
        f"{yard['product_operations_per_second'] / 1e9:.4g} GFLOP/s."
    )
    side_by_side = [point for point in found["points"] if point["sweep"] is None]
    for point in side_by_side:
        console.print()
        print_whole(console, _table([point], None))
        console.print(Text(_about_n(point["equal_reward"]), style="dim"))
        if found["random"]:
            console.print(Text(_RANDOM, style="dim"))
    for name, field in found["sweeps"].items():
        console.print()
        print_whole(console, _table([point for point in found["points"] if point["sweep"] == name], field))
    console.print(Text(_LEGEND, style="dim"))


_RANDOM = (
    "With random weights the reward of a beginning says little of the whole text's, which is the worst case for "
    "choosing segment by segment: this N says nothing of trained models."
)
_LEGEND = (
    "x: how many times as fast the engine is (generate: the accepting engine), median and range over the rounds; all: "
    "all tokens over all seconds; per attempt: candidates looked at per second. x first: seconds of a call over those "
    "of the first value. tok/s: accepted tokens. GB/s: weights read by forward passes; GFLOP/s: products with them."
)


_HEADINGS = ("x", "range", "all", "per attempt", "tok/s", "range", "attempts", "reward", "GB/s", "GFLOP/s")


def _table(points: list[Record], field: str | None) -> Table:
    """Of one workload, or of a sweep over ``field``: then with seconds, and how many times those of the first value."""
    from stars_fast.bench.workload import title

    varied, more = ((), ()) if field is None else ((field.replace("_", " "),), ("x first", "seconds"))
    table = plain_table(title(points[0]["workload"], field), (*varied, ""), (*more, *_HEADINGS))
    table.columns[0].justify = "left" if field is None else "right"
    for point in points:
        for name, one in point["contestants"].items():
            label = f"best of {point['equal_reward']['n']}" if name == "best of N" else name
            cells = [label, *_cells(one)]
            if field is not None:
                first, own = points[0]["contestants"][name]["seconds"]["median"], one["seconds"]["median"]
                value = f"{point['workload'][field]:.3g}" if field == "acceptance" else str(point["workload"][field])
                cells = [value, label, _number(own / first, 2), _number(own, 2), *cells[1:]]
            table.add_row(*cells)
    return table


def _cells(one: Record) -> list[str]:
    ratio, speed = one["ratio"], one["tokens_per_second"]
    return [
        *(_number(ratio["median"], 2), f"{ratio['min']:.2f}-{ratio['max']:.2f}"),
        *(_number(ratio["all_rounds"], 2), _number(ratio["per_attempt"], 2)),
        *(_number(speed["median"], 1), f"{speed['min']:.0f}-{speed['max']:.0f}"),
        *(_number(one["attempts_per_segment"], 1), _number(one["mean_reward"], 2)),
        *(_number(one[f"{what}_per_second"], 1, 1e9) for what in ("weight_bytes", "operations")),
    ]


def _number(value: float | None, digits: int, unit: float = 1.0) -> str:
    return "-" if value is None else f"{value / unit:.{digits}f}"


def _about_n(equal: Record) -> str:
    engine = f"the engine's {equal['wanted']:.3f} +- {equal['error']:.3f}"
    found = f"best of {equal['n']}: expected reward {equal['reward']:.3f}, {engine}"
    if not equal["reached"]:
        return f"{found}: not even that many texts are enough"
    return f"{found}; equal at N = {equal['between']:.1f}"

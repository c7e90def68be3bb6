"""``stars-fast kernels``: compiles the Triton kernels for GPUs that need not be there, and shows what came out."""

from __future__ import annotations

import json
from importlib import import_module
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from stars_fast.cli.console import fail, plain_table, print_whole, refusing, stderr, stdout

_LOOPS = ("buffers", "waits")  # what a record has one of for each loop


def run(
    target: Annotated[
        list[str] | None, typer.Option(help="sm_80, sm_90, sm_100 or gfx942; all if not given. Repeatable.")
    ] = None,
    kernel: Annotated[
        list[str] | None,
        typer.Option(help="Operator, kernel or variant; all if not given. Repeatable."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
) -> None:
    """Compile the Triton kernels, without a GPU.

    Exit code 1 if one spills over 32 bytes, misses the matrix instructions, does not pipeline although it should, or
    needs more shared memory than there is.
    """
    try:
        import_module("triton")
    except ImportError as error:
        fail(f"compiling the kernels needs Triton: pip install triton ({error})", 1)
    aot = import_module("stars_fast.kernels.aot")
    with refusing(ValueError):
        jobs = aot.jobs_for(target or (), kernel or ())
    try:
        with Progress(console=stderr(), transient=True) as progress:
            task = progress.add_task("compiling", total=len(jobs))
            records = aot.compile_all(jobs, done=lambda _: progress.advance(task))
    except RuntimeError as error:
        fail(error, 1)
    if as_json:
        typer.echo(json.dumps([record._asdict() for record in records], indent=2))
    else:
        print_whole(stdout(), _table(records))
    failures = aot.failures(records)
    if failures:
        fail("; ".join(failures), 1)


def _table(records: list[Any]) -> Table:
    table = plain_table(None, ("kernel", "target", "matrix"), ("registers", "shared", "spilled", *_LOOPS, "seconds"))
    for record in records:
        loops = (" ".join("-" if n is None else str(n) for n in getattr(record, name)) for name in _LOOPS)
        numbers = (record.registers, record.shared_bytes, record.spill_bytes, *loops, f"{record.seconds:.2f}")
        table.add_row(escape(record.kernel), record.target, record.matrix_instruction or "-", *map(str, numbers))
    return table

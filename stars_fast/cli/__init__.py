"""The command ``stars-fast``. Heavy modules are imported by the commands that need them, not here."""

from __future__ import annotations

from typing import Annotated

import typer

from stars_fast.cli import batch, bench, demo, doctor, eval, fit, generate, kernels, serve, trace
from stars_fast.cli.console import print_version, show_tracebacks, warn_in_one_line

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo.run)
app.command("generate")(generate.run)
app.command("batch")(batch.run)
app.command("fit")(fit.run)
app.command("serve")(serve.run)
app.command("eval")(eval.run)
app.command("trace")(trace.run)
app.command("doctor")(doctor.run)
app.command("bench")(bench.run)
app.command("kernels")(kernels.run)

__all__ = ["app"]


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    debug: Annotated[
        bool,
        typer.Option(
            "--debug",
            callback=show_tracebacks,
            is_eager=True,
            envvar="STARS_FAST_DEBUG",
            help="Show the traceback of an error.",
        ),
    ] = False,
) -> None:
    """Reward-guided generation for Hugging Face models: exact, many candidates at a time."""
    warn_in_one_line()

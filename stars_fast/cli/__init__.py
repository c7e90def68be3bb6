"""The command ``stars-fast``. Heavy modules are imported by the commands that need them, not here."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from stars_fast.cli import batch, bench, demo, doctor, eval, fit, generate, kernels, serve, trace
from stars_fast.cli.console import print_version, show_tracebacks, warn_in_one_line


class Command(TyperCommand):
    """One that says of an option that it lacks, and that is a setting, how it is set."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            name = getattr(error, "option_name", "").lstrip("-").replace("-", "_")
            if name and any(parameter.name == "set_" for parameter in self.params):
                from stars_fast.config import StarsConfig  # and with it torch

                if name in StarsConfig.__dataclass_fields__:
                    error.possibilities = [f"--set {name}=VALUE"]  # type: ignore[attr-defined]
            raise


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (demo, generate, batch, fit, serve, eval, trace, doctor, bench, kernels):
    app.command(module.__name__.rpartition(".")[2], cls=Command)(module.run)

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

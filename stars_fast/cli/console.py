"""Where the commands print: results to stdout, everything about them to stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

BAD_USAGE = 2
# What transformers and the engine raise for models that do not exist, do not load, or cannot be used.
LOADING_ERRORS = (OSError, ValueError, TypeError, NotImplementedError, ImportError)


def stdout() -> Console:
    """A console for results; 80 columns wide where it is not a terminal."""
    return Console(highlight=False)


def stderr() -> Console:
    """A console for progress and complaints. Long lines are left to the terminal, so that a pipe gets one."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def note(message: str) -> None:
    """One line about what happens."""
    stderr().print(Text(message, style="dim"))


def fail(message: object, code: int = BAD_USAGE) -> NoReturn:
    """Say in one line what is wrong, and leave."""
    stderr().print(Text.assemble(("error: ", "bold red"), one_line(message)))
    raise typer.Exit(code)


def one_line(message: object) -> str:
    """A message with its line breaks and runs of blanks squeezed."""
    return " ".join(str(message).split()) or type(message).__name__


def plain_table(title: str | None, labels: Iterable[str], figures: Iterable[str]) -> Table:
    """A table without lines, of these columns: labels to the left, figures to the right."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None)
    for heading in labels:
        table.add_column(heading, no_wrap=True)
    for heading in figures:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


@contextmanager
def refusing(*errors: type[Exception]) -> Iterator[None]:
    """Report these errors in one line, as bad usage, instead of a traceback."""
    try:
        yield
    except errors as error:
        fail(error)


def quiet_transformers() -> None:
    """No bars while weights load. Warnings stay: a head that the checkpoint lacks is drawn at random."""
    from transformers.utils import logging

    logging.disable_progress_bar()


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Run with so many of torch's threads, its own number where None."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def progress(total: int, about: str) -> Iterator[Callable[..., None]]:
    """A bar over ``total`` steps. Yields what moves it on: by how many (1), and what it shows from then on."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=stderr(), transient=True) as bar:
        task = bar.add_task(about, total=total)
        yield lambda count=1, about=None: bar.update(task, advance=count, description=about)


def print_version(wanted: bool) -> None:
    """Callback of ``--version``."""
    if wanted:
        from stars_fast import __version__

        typer.echo(f"stars-fast {__version__}")
        raise typer.Exit

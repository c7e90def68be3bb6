"""Where the commands print: results to stdout, everything about them to stderr."""

from __future__ import annotations

import errno
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stars_fast.rows.engines import MEANT

BAD_USAGE = 2
INTERRUPTED = 130
_LONGEST = 2000  # characters of a complaint; some errors of libraries quote all that they were given
_UNPRINTED = {*range(32), *range(127, 160), *range(0xD800, 0xE000)} - {*b"\t\n"}
_CONTROLS = dict.fromkeys(_UNPRINTED, "\ufffd") | {ord("\r"): None}
_debugging = False


def show_tracebacks(wanted: bool) -> None:
    """Callback of ``--debug``: whether complaints come with the traceback of what led to them."""
    global _debugging
    _debugging = wanted


def stdout() -> Console:
    """A console for results; 80 columns wide where it is not a terminal."""
    return Console(highlight=False)


def stderr() -> Console:
    """A console for progress and complaints. Long lines are left to the terminal, so that a pipe gets one."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def warn_in_one_line() -> None:
    """Warnings from here on are a line each, as everything else is; where in the code they arose helps nobody here."""
    warnings.showwarning = lambda message, *_: stderr().print(
        Text.assemble(("warning: ", "bold yellow"), one_line(message))
    )


def note(message: str) -> None:
    """One line about what happens."""
    stderr().print(Text(harmless(message), style="dim"))


def fail(message: object, code: int = BAD_USAGE) -> NoReturn:
    """Say in one line what is wrong, and leave."""
    if _debugging and sys.exc_info()[0] is not None:
        traceback.print_exc()
    stderr().print(Text.assemble(("error: ", "bold red"), one_line(message)))
    raise typer.Exit(code)


def harmless(text: object) -> str:
    """Without the controls that a terminal acts on, whoever wrote them, and halves of surrogate pairs, which no stream
    takes; line breaks and tabs stay.
    """
    return str(text).translate(_CONTROLS)


def one_line(message: object) -> str:
    """A message with its line breaks and runs of blanks squeezed, its end cut off where it is very long, and options
    where the library speaks of arguments.
    """
    from stars_fast.cli.words import in_options

    words = " ".join(harmless(message).split()) or type(message).__name__
    words = in_options(words) if len(words) <= _LONGEST else words
    return words if len(words) <= _LONGEST else words[:_LONGEST] + " ..."


def print_whole(console: Console, table: Table) -> None:
    """A table that is not cut to the width of a terminal, nor to the 80 columns that a pipe is taken to have."""
    unbounded = console.options.update(max_width=1 << 20)
    console.width = max(console.width, console.measure(table, options=unbounded).maximum)
    console.print(table)


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


@contextmanager
def refusing_models(again: str = "") -> Iterator[None]:
    """Report in one line whatever a user's models lead to, as bad usage; an interruption and a full machine as such.

    What our own code raises without meaning it for users is a bug, and passes. ``again`` says how to go on.
    """
    try:
        yield
    except KeyboardInterrupt:
        fail(f"interrupted{again}", INTERRUPTED)
    except (typer.Exit, BrokenPipeError):  # it has been said; nobody reads on, which is no error of a command
        raise
    except BaseException as error:
        if not isinstance(error, Exception):
            from stars_fast.text.tokens import is_panic  # and with it torch, which the start does not wait for

            if not is_panic(error):
                raise
        if _is_shortage(error):
            fail(f"{one_line(error)}{again}", 1)
        if isinstance(error, MEANT):
            fail(error)
        if _is_ours(error):
            raise
        fail(f"{type(error).__name__}: {error}")


def _is_shortage(error: BaseException) -> bool:
    """Whether the machine, rather than the program, is at fault: memory or disk ran out."""
    from stars_fast.tree.lack import is_lack_of_memory

    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM)
    return full or is_lack_of_memory(error)


def _is_ours(error: BaseException) -> bool:
    """Whether the line that raised is in this package."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return str(frames[-1].f_globals.get("__name__")).startswith("stars_fast")


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

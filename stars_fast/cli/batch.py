"""``stars-fast batch``: rows of many files, answered by actors on Ray, on this machine or on a cluster."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stars_fast.cli import models
from stars_fast.cli.console import fail, note, progress, refusing, refusing_models
from stars_fast.cli.generate import recipe_of, warn_of_n
from stars_fast.cli.models import check_models, template_variables
from stars_fast.names import with_extra
from stars_fast.rows.engines import Names

if TYPE_CHECKING:
    from stars_fast.rows.reading import Id, Row

_PATIENCE = 20.0  # seconds for a cluster's nodes to join, and for its other jobs to leave


def run(
    input_: Annotated[
        str, typer.Option("--input", help="JSON Lines as `generate` reads them: a file, or a pattern of several.")
    ],
    output: Annotated[
        Path, typer.Option(help="Folder for parts in JSON Lines; ids in it are skipped, failed ones tried again.")
    ],
    policy: models.PolicyName = None,
    reward: models.RewardName = None,
    method: models.MethodName = None,
    max_new_tokens: models.MaxNewTokens = None,
    n: models.Answers = None,
    config: models.SettingsFile = None,
    fit: models.FitName = None,
    set_: models.Assignments = None,
    seed: Annotated[int, typer.Option(help="Each row draws by this and its id.")] = 0,
    actors: Annotated[
        str | None, typer.Option(metavar="N|MIN:MAX", help="Default: one per GPU of the cluster, or one.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a part; an actor has two under way.")] = 64,
    gpus_per_actor: Annotated[
        float | None, typer.Option(min=0, help="Default: one where the cluster has any.", show_default=False)
    ] = None,
    cpus_per_actor: Annotated[float, typer.Option(min=0.01, help="Logical CPUs; fractions share one.")] = 1.0,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder for what is done.", show_default="OUTPUT/_checkpoint")
    ] = None,
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster, or auto. Default: this machine alone.")] = None,
    tokenizer: models.TokenizerName = None,
    processor: models.ProcessorName = None,
    reward_tokenizer: models.RewardTokenizerName = None,
    reward_tail: models.RewardTail = "auto",
    chat_template_kwargs: models.TemplateVariables = None,
    max_rows: models.MaxRows = None,
    kv_cache_tokens: models.KvCacheTokens = None,
    dtype: models.Dtype = "auto",
    device: models.Device = "auto",
) -> None:
    """Complete prompts with many workers, each with models of its own.

    A row with an id has the text that `generate` gives it: neither workers nor batches nor an interruption change it.
    Run the same command again to go on where it stopped. The exit status is 1 where a row failed.
    """
    if find_spec("ray") is None or find_spec("pyarrow") is None:
        fail(f"this command needs Ray: {with_extra('ray')}")
    from stars_fast.cli.settings import read_settings
    from stars_fast.report.files import sole_run
    from stars_fast.rows.records import check_settings, write_settings
    from stars_fast.scale.job import connected, make_room, run_job
    from stars_fast.scale.parts import Parts

    with refusing(OSError, ValueError, TypeError):
        fields = {"method": method, "max_new_tokens": max_new_tokens, "num_return_sequences": n, "fit": fit}
        settings = read_settings(config, set_ or (), **fields)
    warn_of_n(n, settings.config)
    names = Names(
        policy or settings.policy, reward or settings.reward, tokenizer, reward_tokenizer, reward_tail, processor
    )
    check_models(names, dtype)
    names = _found(names)
    variables = template_variables(chat_template_kwargs)
    numbers = _numbers(actors)
    output = Path(os.path.realpath(output))
    files = _named(_files(input_, output), input_)
    recipe = recipe_of(names, settings.config, seed, dtype, variables)
    with refusing(OSError, ValueError):
        parts = Parts.open(output, checkpoint and Path(os.path.realpath(checkpoint)))
    again = f"; {output} keeps what was written: run the same command again to go on"
    with refusing(OSError, ValueError), sole_run(output):
        done = parts.done()
        if done:
            check_settings(output, recipe)
        todo = sum(1 for _ in _todo(files, seed, done, output))
        if not todo:
            note(f"nothing to do: {output} holds all rows")
            return
        worker = (settings.config, variables, names, dtype, device, max_rows, kv_cache_tokens)
        try:
            with refusing_models(again), connected(address):
                pool = make_room(numbers, cpus_per_actor, gpus_per_actor, _PATIENCE if address else 0.0)
                rows = _todo(files, seed, done, output)
                write_settings(output, recipe)
                parts.begin()
                with progress(todo, "rows") as advance:
                    failed = run_job(rows, parts, pool, batch_size, worker, advance)
        finally:
            parts.end()
    errors = f", {failed} with an error, in {parts.errors}" if failed else ""
    skipped = f", {len(done)} were there before" if done else ""
    note(f"{todo} rows written to {output}{errors}{skipped}")
    if failed:
        raise typer.Exit(1)


def _numbers(actors: str | None) -> tuple[int, int] | None:
    """The least and the most."""
    if actors is None:
        return None
    numbers = re.fullmatch(r"([1-9]\d{0,5})(?::([1-9]\d{0,5}))?", actors)
    if numbers is None:
        fail(f"--actors {actors}: give a number, or the least and the most: 2:8")
    least, most = int(numbers[1]), int(numbers[2] or numbers[1])
    if most < least:
        fail(f"--actors {actors}: the most is less than the least")
    return least, most


def _files(pattern: str, output: Path) -> list[Path]:
    if "://" in pattern:
        fail(f"--input {pattern}: give files; what Ray Data reads elsewhere goes through stars_fast.scale.StarsBatch")
    found = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)  # a name may have brackets
    files = sorted(Path(one) for one in found if os.path.isfile(one))
    if not files:
        fail(f"--input {pattern}: there is no such file")
    for file in files:
        if output in Path(os.path.realpath(file)).parents:
            fail(f"--input {pattern}: {file} lies in --output")
    return files


def _found(names: Names) -> Names:
    """Folders, and the file of a reward, by their whole paths: workers start elsewhere."""
    from stars_fast.inputs.functions import file_of

    given = {field: name for field, name in names._asdict().items() if name and (os.path.isdir(name) or file_of(name))}
    return names._replace(**{field: os.path.abspath(name) for field, name in given.items()})


def _named(files: list[Path], pattern: str) -> dict[str, Path]:
    """Files by what a pattern leaves open of their paths, be it one or many: more may come under other names."""
    fixed = Path(*takewhile(lambda part: not glob.has_magic(part), Path(pattern).parent.parts))
    return {file.relative_to(fixed).as_posix(): file for file in files}


def _todo(files: dict[str, Path], seed: int, done: dict[Id, str], output: Path) -> Iterator[Row]:
    """Rows that are not done; at the end, those that were done for other prompts or seeds are named."""
    from stars_fast.rows.reading import each_row, lines_of
    from stars_fast.rows.records import check_unchanged
    from stars_fast.scale.parts import is_same

    seen, changed = dict[Any, str](), list[Any]()
    for name, path in files.items():
        with path.open("rb") as file:
            for row in each_row(lines_of(file), seed, seen, name, os.path.abspath(path)):
                if row.id not in done:
                    yield row
                elif not is_same(row, done[row.id]):
                    changed.append(row.id)
    check_unchanged(output, changed)

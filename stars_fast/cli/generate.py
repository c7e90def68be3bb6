"""``stars-fast generate``: prompts in, rewarded completions out, one JSON line each."""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from rich.padding import Padding
from rich.text import Text

from stars_fast.cli import models
from stars_fast.cli.console import fail, note, refusing, refusing_models, stdout
from stars_fast.cli.models import Names, check_models, load_engine, template_variables

if TYPE_CHECKING:
    from stars_fast.cli.rows import Row
    from stars_fast.config import StarsConfig
    from stars_fast.engine import StarsEngine

Records = list[dict[str, Any]]


def run(
    policy: models.PolicyName = None,
    reward: models.RewardName = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue; may be repeated.")] = None,
    input_: Annotated[
        Path | None,
        typer.Option("--input", help="JSON Lines with prompt, messages or prompt_ids, maybe id, seed. '-': stdin."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="JSON Lines to write to, row by row; ids in it are skipped, failed ones tried again."),
    ] = None,
    config: models.SettingsFile = None,
    set_: models.Assignments = None,
    seed: Annotated[int, typer.Option(help="Each row draws by this and its id.")] = 0,
    tokenizer: models.TokenizerName = None,
    reward_tokenizer: models.RewardTokenizerName = None,
    reward_tail: models.RewardTail = "auto",
    chat_template_kwargs: models.TemplateVariables = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows calibrated and admitted together.")] = 128,
    max_rows: models.MaxRows = None,
    kv_cache_tokens: models.KvCacheTokens = None,
    dtype: models.Dtype = "auto",
    device: models.Device = "auto",
) -> None:
    """Complete prompts under the guidance of a reward model.

    Texts depend on the seed and a row's id only: not on the order of rows, on batches, or on an interruption.
    Run the same command again to go on where it stopped. The exit status is 1 where a row failed.
    """
    from stars_fast.cli.settings import read_settings
    from stars_fast.report.files import sole_run

    with refusing(OSError, ValueError, TypeError):
        settings = read_settings(config, set_ or ())
    names = Names(policy or settings.policy, reward or settings.reward, tokenizer, reward_tokenizer, reward_tail)
    _check_usage(names, prompt, input_, output, dtype)
    rows = _read_input(prompt, input_, seed)
    variables = template_variables(chat_template_kwargs)
    with ExitStack() as held:
        if output is not None:
            output = Path(os.path.realpath(output))  # a link stays one: what it leads to is written
            with refusing(OSError, ValueError):
                held.enter_context(sole_run(output))
        made_with = recipe_of(names, settings.config, seed, dtype)
        made_with |= {"chat_template_kwargs": variables} if variables else {}
        todo = _todo(rows, output, settings.config.num_return_sequences, made_with)
        if not todo:
            note(f"nothing to do: {output} holds all {len(rows)} rows")
            return
        engine = load_engine(names, dtype, device, max_rows, kv_cache_tokens)
        failed = _run_all(engine, todo, settings.config, output, batch_size, made_with, variables)
    errors = f", {failed} with an error" if failed else ""
    if output is not None:
        skipped = f", {len(rows) - len(todo)} were there before" if len(todo) < len(rows) else ""
        note(f"{len(todo)} rows written to {output}{errors}{skipped}")
    elif failed:
        note(f"{len(todo)} rows{errors}")
    if failed:
        raise typer.Exit(1)


def _check_usage(names: Names, prompt: list[str] | None, input_: Path | None, output: Path | None, dtype: str) -> None:
    check_models(names, dtype)
    if bool(prompt) == (input_ is not None):
        fail("give either --prompt or --input" + (", not both" if prompt else ""))
    if output is None:
        return
    if output.exists() and not output.is_file():
        fail(f"--output {output}: is a folder or a device, not a file")
    if not output.parent.is_dir():
        fail(f"--output {output}: there is no folder {output.parent}")
    if input_ is not None and output.exists() and input_.exists() and output.samefile(input_):
        fail(f"--output {output} is also the input")


def _read_input(prompt: list[str] | None, input_: Path | None, seed: int) -> list[Row]:
    from stars_fast.cli.rows import Row, lines_of, read_rows, row_seed

    if prompt:
        return [Row(number, text, row_seed(seed, number)) for number, text in enumerate(prompt, 1)]
    assert input_ is not None
    with refusing(OSError, ValueError):
        if str(input_) == "-":
            rows = read_rows(lines_of(sys.stdin.buffer), seed)
        else:
            with input_.open("rb") as file:
                rows = read_rows(lines_of(file), seed)
        if not rows:
            raise ValueError(f"--input {input_} holds no rows")
    return rows


def recipe_of(names: Names, config: StarsConfig, seed: int, dtype: str) -> dict[str, Any]:
    """What the texts depend on."""
    with refusing(ValueError):
        fields = config.to_dict()
    del fields["candidates"]
    if fields["fit"] is not None:  # it is long, and only has to be told from others
        contents = json.dumps(fields["fit"], sort_keys=True).encode()
        fields["fit"] = hashlib.blake2b(contents, digest_size=8).hexdigest()
    return {**names._asdict(), "dtype": dtype, "seed": seed, **fields}


def _todo(rows: list[Row], output: Path | None, samples: int, made_with: dict[str, Any]) -> list[Row]:
    from stars_fast.cli.rows import resume

    if output is None:
        return rows
    with refusing(OSError, ValueError):
        done = resume(output, samples, rows, made_with)
    return [row for row in rows if row.id not in done]


def _run_all(
    engine: StarsEngine,
    rows: list[Row],
    config: StarsConfig,
    output: Path | None,
    batch_size: int,
    made_with: dict[str, Any],
    variables: dict[str, Any] | None = None,
) -> int:
    """Write every row as it is finished. Returns how many ended with an error."""
    from stars_fast.cli.responses import finished_rows
    from stars_fast.cli.rows import write_settings
    from stars_fast.loop.stream import progress_bar

    again = "" if output is None else f"; {output} keeps what was written: run the same command again to go on"
    reading = output is None and sys.stdout.isatty()
    failed = 0
    with refusing_models(again):
        if output is not None:
            write_settings(output, made_with)
        with _sink(output) as write, progress_bar(not reading, len(rows) * config.num_return_sequences) as advance:
            for records in finished_rows(engine, rows, config, batch_size, advance, variables):
                write(records)
                failed += any(record["error"] is not None for record in records)
    return failed


@contextmanager
def _sink(output: Path | None) -> Iterator[Callable[[Records], None]]:
    """A function that writes the records of one row: to the file, or to stdout as text or as JSON Lines."""
    if output is not None:
        # A lone half of a surrogate pair, in an error message, is written as JSON's own escape.
        with output.open("a", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            yield lambda records: _write_lines(file, records)
    elif sys.stdout.isatty():
        yield _print_text
    else:
        lines = sys.stdout
        if isinstance(lines, io.TextIOWrapper):  # JSON Lines are UTF-8, whatever the terminal speaks
            lines.reconfigure(encoding="utf-8", errors="backslashreplace")
        yield lambda records: _write_lines(lines, records)


def _write_lines(file: TextIO, records: Records) -> None:
    from stars_fast.report.files import to_line

    file.write("".join(to_line(record) for record in records))
    file.flush()


def _print_text(records: Records) -> None:
    console = stdout()
    for record in records:
        if record["error"] is not None:
            console.print(Text.assemble((f"{record['id']}  ", "bold"), (f"error: {record['error']}", "red")))
            continue
        prompt = record["prompt"] if isinstance(record["prompt"], str) else ""
        text = record["completion"]
        if text is None:
            text = " ".join(map(str, record["completion_ids"]))
        reward = f"reward {record['reward']}, {record['tokens']} tokens, {record['finish_reason']}"
        console.print(Text.assemble((f"{record['id']}  ", "bold"), (reward, "dim")))
        console.print(Padding(Text.assemble((prompt, "bold"), text), (0, 0, 1, 2)))

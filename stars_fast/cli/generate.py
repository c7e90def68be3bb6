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
from stars_fast.cli.console import fail, harmless, note, one_line, refusing, refusing_models, stdout
from stars_fast.cli.models import check_models, load_engine, template_variables
from stars_fast.rows.engines import Names

if TYPE_CHECKING:
    from stars_fast.config import StarsConfig
    from stars_fast.engine import StarsEngine
    from stars_fast.outputs import StarsOutput
    from stars_fast.rows.reading import Row
    from stars_fast.rows.responses import Records


def run(
    policy: models.PolicyName = None,
    reward: models.RewardName = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text to continue; may be repeated. The answer alone goes to stdout.")
    ] = None,
    input_: Annotated[
        Path | None,
        typer.Option(
            "--input", help="JSON Lines with prompt, messages or prompt_ids, maybe image, id, seed. '-': stdin."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="JSON Lines to write to, row by row; ids in it are skipped, failed ones tried again."),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="File for what was drawn and why it lost, of the rows of this run (see stars-fast trace)."),
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option(help="Picture to show with --prompt, which is a user's turn then; may be repeated."),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="--prompt is a user's turn, to be answered.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON Lines, whatever stdout is.")] = False,
    method: models.MethodName = None,
    max_new_tokens: models.MaxNewTokens = None,
    n: models.Answers = None,
    config: models.SettingsFile = None,
    fit: models.FitName = None,
    set_: models.Assignments = None,
    seed: Annotated[int, typer.Option(help="Each row draws by this and its id.")] = 0,
    tokenizer: models.TokenizerName = None,
    processor: models.ProcessorName = None,
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
        fields = {"method": method, "max_new_tokens": max_new_tokens, "num_return_sequences": n, "fit": fit}
        settings = read_settings(config, set_ or (), **fields)
    warn_of_n(n, settings.config)
    names = Names(
        policy or settings.policy, reward or settings.reward, tokenizer, reward_tokenizer, reward_tail, processor
    )
    _check_usage(names, prompt, input_, output, as_json, dtype)
    _check_target("--trace", trace, input=input_, output=output, config=config)
    if image and not prompt:
        fail("--image is of --prompt; rows of --input have a column image")
    if chat and not prompt:
        fail("--chat is of --prompt; rows of --input are chats where they have messages")
    rows = _read_input(prompt, image, chat, input_, seed)
    variables = template_variables(chat_template_kwargs)
    with ExitStack() as held:
        if output is not None:
            output = Path(os.path.realpath(output))  # a link stays one: what it leads to is written
            with refusing(OSError, ValueError):
                held.enter_context(sole_run(output))
        made_with = recipe_of(names, settings.config, seed, dtype, variables)
        todo = _todo(rows, output, settings.config.num_return_sequences, made_with)
        if not todo:
            note(f"nothing to do: {output} holds all {len(rows)} rows")
            return
        engine = load_engine(names, dtype, device, max_rows, kv_cache_tokens)
        lines = as_json or not (prompt or sys.stdout.isatty())
        target = output or ("json" if lines else "text" if prompt else "rows")
        failed = _run_all(engine, todo, settings.config, target, batch_size, made_with, variables, trace)
    errors = f", {failed} with an error" if failed else ""
    if output is not None:
        skipped = f", {len(rows) - len(todo)} were there before" if len(todo) < len(rows) else ""
        note(f"{len(todo)} rows written to {output}{errors}{skipped}")
    elif failed:
        note(f"{len(todo)} rows{errors}")
    if failed:
        raise typer.Exit(1)


def warn_of_n(answers: int | None, config: StarsConfig) -> None:
    """Some methods have an n of their own, which is another thing."""
    method = config.chosen_method
    if answers and "n" in vars(method):
        note(
            f"--n {answers}: so many answers to each prompt, each of them {method.name} with n={vars(method)['n']} "
            "(--set n=...)"
        )


def _check_usage(
    names: Names, prompt: list[str] | None, input_: Path | None, output: Path | None, as_json: bool, dtype: str
) -> None:
    check_models(names, dtype)
    if as_json and output is not None:
        fail("--json says how to print, and --output is JSON Lines in any case: give one of them")
    if bool(prompt) == (input_ is not None):
        fail("give either --prompt or --input" + (", not both" if prompt else ""))
    if prompt and not any(prompt):
        fail("--prompt is empty: a prompt has at least one token")
    _check_target("--output", output, input=input_)


def _check_target(option: str, path: Path | None, **others: Path | None) -> None:
    """Refuse a file that cannot be written, or is another one of the command's."""
    if path is None:
        return
    if path.exists() and not path.is_file():
        fail(f"{option} {path}: is a folder or a device, not a file")
    if not path.parent.is_dir():
        fail(f"{option} {path}: there is no folder {path.parent}")
    for what, other in others.items():
        if other is not None and _same_file(path, other):
            fail(f"{option} {path} is also the {what}")


def _same_file(one: Path, other: Path) -> bool:
    both_there = one.exists() and other.exists()
    return one.samefile(other) if both_there else os.path.realpath(one) == os.path.realpath(other)


def _read_input(
    prompt: list[str] | None, image: list[str] | None, chat: bool, input_: Path | None, seed: int
) -> list[Row]:
    from stars_fast.rows.reading import Row, lines_of, read_rows, row_seed

    if prompt:
        given: list[Any] = [[{"role": "user", "content": text}] for text in prompt] if chat else prompt
        return [
            Row(number, text, row_seed(seed, number), image=image or None, line=number)
            for number, text in enumerate(given, 1)
        ]
    assert input_ is not None
    with refusing(OSError, ValueError):
        if str(input_) == "-":
            rows = read_rows(lines_of(sys.stdin.buffer), seed)
        else:
            with input_.open("rb") as file:
                rows = read_rows(lines_of(file), seed, str(input_))
        if not rows:
            raise ValueError(f"--input {input_} holds no rows")
    return rows


def recipe_of(
    names: Names, config: StarsConfig, seed: int, dtype: str, variables: dict[str, Any] | None
) -> dict[str, Any]:
    """What the texts depend on."""
    from stars_fast.inputs.functions import file_of

    with refusing(ValueError):
        fields = config.to_dict()
    del fields["candidates"]
    if fields["fit"] is not None:  # it is long, and only has to be told from others
        fields["fit"] = _digest(json.dumps(fields["fit"], sort_keys=True).encode())
    script = file_of(names.reward)  # another text in it is another reward
    ran = None if script is None or not script.is_file() else _digest(script.read_bytes())
    given = {"reward_file": ran, "dtype": dtype, "seed": seed, "chat_template_kwargs": variables or None}
    return {**names._asdict(), **given, **fields}


def _digest(contents: bytes) -> str:
    return hashlib.blake2b(contents, digest_size=8).hexdigest()


def _todo(rows: list[Row], output: Path | None, samples: int, made_with: dict[str, Any]) -> list[Row]:
    from stars_fast.rows.records import resume

    if output is None:
        return rows
    with refusing(OSError, ValueError):
        done = resume(output, samples, rows, made_with)
    return [row for row in rows if row.id not in done]


def _run_all(
    engine: StarsEngine,
    rows: list[Row],
    config: StarsConfig,
    output: Path | str,
    batch_size: int,
    made_with: dict[str, Any],
    variables: dict[str, Any] | None = None,
    trace: Path | None = None,
) -> int:
    """Write every row as it is finished. Returns how many ended with an error."""
    from stars_fast.loop.stream import progress_bar
    from stars_fast.rows.records import write_settings
    from stars_fast.rows.responses import finished_rows

    again, failed = "", 0
    reading = not isinstance(output, Path) and sys.stdout.isatty()
    if isinstance(output, Path):
        again = f"; {output} keeps what was written: run the same command again to go on"
    with refusing_models(again):
        if isinstance(output, Path):
            write_settings(output, made_with)
        total, method = len(rows) * config.num_return_sequences, config.chosen_method
        with _sink(output) as write, _trace_file(trace) as traced, progress_bar(not reading, total, method) as bar:
            for records in finished_rows(engine, rows, config, batch_size, bar, variables, traced):
                write(records)
                failed += any(record["error"] is not None for record in records)
    return failed


@contextmanager
def _sink(output: Path | str) -> Iterator[Callable[[Records], None]]:
    """A function that writes the records of one row: to a file as JSON Lines, or to stdout in a form: "json", "rows" or
    "text".
    """
    if isinstance(output, Path):
        with output.open("a", encoding="utf-8", newline="\n") as file:
            yield lambda records: _write_lines(file, records)
    elif output == "rows":
        yield _print_rows
    else:
        lines = sys.stdout
        if isinstance(lines, io.TextIOWrapper):  # UTF-8, as JSON Lines are, whatever the terminal speaks
            lines.reconfigure(encoding="utf-8", errors="backslashreplace")
        write = _write_lines if output == "json" else _write_texts
        yield lambda records: write(lines, records)


@contextmanager
def _trace_file(path: Path | None) -> Iterator[Callable[[StarsOutput], None] | None]:
    """A function that writes the trace of a batch behind those before. The file takes its name once all are in it."""
    if path is None:
        yield None
        return
    from stars_fast.report.files import replacing

    file, prompts = None, 0
    with ExitStack() as held:

        def write(output: StarsOutput) -> None:
            nonlocal file, prompts
            assert output.origin is not None
            file = file or held.enter_context(replacing(path))  # a run that answers nothing leaves what was there
            prompts = output.origin.write(output, file, prompts)

        yield write


def _write_texts(file: TextIO, records: Records) -> None:
    """The answers alone, for a pipe; what is to be said of them goes to stderr."""
    for record in records:
        if record["error"] is not None:
            note(f"error: {one_line(record['error'])}")
            continue
        text = _text(record)
        file.write((harmless(text) if file.isatty() else text) + "\n")
        file.flush()
        note(_about(record))


def _write_lines(file: TextIO, records: Records) -> None:
    from stars_fast.report.files import to_line

    file.write("".join(to_line(record) for record in records))
    file.flush()


def _print_rows(records: Records) -> None:
    console = stdout()
    for record in records:
        name = harmless(record["id"])
        if record["error"] is not None:
            console.print(Text.assemble((f"{name}  ", "bold"), (f"error: {harmless(record['error'])}", "red")))
            continue
        prompt = harmless(record["prompt"]) if isinstance(record["prompt"], str) else ""
        console.print(Text.assemble((f"{name}  ", "bold"), (_about(record), "dim")))
        console.print(Padding(Text.assemble((prompt, "bold"), harmless(_text(record))), (0, 0, 1, 2)))


def _about(record: dict[str, Any]) -> str:
    return f"reward {record['reward']}, {record['tokens']} tokens, {record['finish_reason']}"


def _text(record: dict[str, Any]) -> str:
    """The answer; its ids where there is no tokenizer."""
    text = record["completion"]
    return " ".join(map(str, record["completion_ids"])) if text is None else str(text)

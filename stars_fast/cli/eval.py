"""``stars-fast eval``: decoding methods on the same prompts, judged by a reward that guided none of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stars_fast.cli.console import fail, note, progress, refusing, refusing_models
from stars_fast.cli.models import MaxNewTokens
from stars_fast.evaluation.recipe import Recipe, read_recipe
from stars_fast.report.files import sole_run
from stars_fast.rows.engines import quiet_transformers

if TYPE_CHECKING:
    from stars_fast.evaluation.cells import Cell
    from stars_fast.evaluation.records import Records
    from stars_fast.evaluation.runner import Evaluation

TARGET_PROMPTS = 16  # from which one target for all prompts is taken


def run(
    recipe: Annotated[Path | None, typer.Option(help="YAML with these options by name, and settings.")] = None,
    policy: Annotated[str | None, typer.Option(help="Causal LM: folder, hub id or 'demo'.")] = None,
    guide: Annotated[
        str | None,
        typer.Option(help="The reward that methods follow: folder, hub id, 'demo', or FILE.py:NAME, which is run."),
    ] = None,
    judge: Annotated[str | None, typer.Option(help="The reward that decides who wins; trained on other data.")] = None,
    prompts: Annotated[
        str | None, typer.Option(help="JSON Lines, .xz or plain, or a hub id with its split: stanfordnlp/imdb:test.")
    ] = None,
    field_: Annotated[
        str | None,
        typer.Option(
            "--field", help="Of a row, what becomes the prompt: text, or a chat.", show_default="prompt, messages"
        ),
    ] = None,
    words: Annotated[int | None, typer.Option(min=1, help="Only the field's first words.")] = None,
    template: Annotated[str | None, typer.Option(help="The prompt, with {} for the field.")] = None,
    count: Annotated[
        int | None, typer.Option(min=1, help="Prompts, drawn by the seed.", show_default=str(Recipe.count))
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(help="Names, with commas, of methods and of ways to use them: stars+fit. vanilla always runs."),
    ] = None,
    budgets: Annotated[
        str | None, typer.Option(help="Numbers, with commas: about how many unguided responses' work may be spent.")
    ] = None,
    max_new_tokens: MaxNewTokens = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A field of StarsConfig; may be repeated.")
    ] = None,
    fit: Annotated[
        int | None, typer.Option(min=0, help="Further prompts from which a fit is learned, once, for NAME+fit.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Prompts of one call.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of prompts and random numbers.")] = None,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Answers to each prompt, with the seeds SEED, SEED + 1, ...")
    ] = None,
    tie: Annotated[float, typer.Option(min=0.0, help="Largest difference of judged rewards that is a tie.")] = 0.0,
    output: Annotated[Path, typer.Option(help="Folder: generations and batches as JSON Lines, table, plots.")] = Path(
        "evaluation"
    ),
    dtype: Annotated[str, typer.Option(help="Of all models: auto, float32, float16, bfloat16.")] = "auto",
    device: Annotated[str, typer.Option(help="Of all models; auto takes a GPU where there is one.")] = "auto",
) -> None:
    """Compare decoding methods at equal compute.

    Run the same command again to go on where it stopped; with more methods, budgets or repeats to add them.
    """
    given = {
        "policy": policy,
        "guide": guide,
        "judge": judge,
        "prompts": prompts,
        "field": field_,
        "words": words,
        "template": template,
        "count": count,
        "methods": methods,
        "budgets": budgets,
        "fit": fit,
        "batch_size": batch_size,
        "seed": seed,
        "repeats": repeats,
    }
    with refusing(OSError, ValueError, TypeError):
        task = read_recipe(recipe, given)
    for name in ("policy", "guide", "judge", "prompts"):
        if not getattr(task, name):
            fail(f"nothing for {name}: give --{name}, or `{name}:` in --recipe")
    if not task.fit and (learned := [asked.name for asked in task.methods if asked.name.endswith("+fit")]):
        fail(f"--methods {learned[0]}: give --fit, or `fit:` in --recipe: how many prompts to learn it from")
    from stars_fast.cli.words import speaking_of

    with ExitStack() as held:
        held.enter_context(speaking_of(reward="--guide or --judge"))
        with refusing(OSError, ValueError):
            output.mkdir(parents=True, exist_ok=True)
            held.enter_context(sole_run(output))
        with refusing_models():
            assignments = [*(set_ or ()), *([] if max_new_tokens is None else [f"max_new_tokens={max_new_tokens}"])]
            evaluation, made, records = _prepare(task, assignments, output, dtype, device)
        with (
            refusing_models(f"; {output} keeps the finished batches: run the same command again to go on"),
            progress(len(made) * task.count * task.repeats, "methods") as advance,
        ):
            evaluation.run(made, records, advance)
        with refusing(OSError, ValueError):  # a method of which all answers failed
            _report(records, output, task, tie)


def _prepare(
    task: Recipe, assignments: Sequence[str], output: Path, dtype: str, device: str
) -> tuple[Evaluation, list[Cell], Records]:
    """Read settings and prompts, load the models, open the folder."""
    from stars_fast.cli.settings import read_settings
    from stars_fast.evaluation.cells import cells, share_a_target
    from stars_fast.evaluation.learned import Learned
    from stars_fast.evaluation.models import Models
    from stars_fast.evaluation.prompts import read_prompts
    from stars_fast.evaluation.records import Records
    from stars_fast.evaluation.runner import Evaluation

    quiet_transformers()
    assert task.prompts is not None and task.guide is not None and task.judge is not None
    if Path(task.guide).resolve() == Path(task.judge).resolve():
        note(f"warning: {task.judge} is guide and judge: the judge is not independent, and favours what it guided")
    settings = [f"{name}={value}" for name, value in (task.settings or {}).items()]
    # What is drawn side by side and not looked at is speed, not the method's need, and would be counted as its cost.
    config = read_settings(None, ["candidates=1", *settings, *assignments]).config
    prompts = read_prompts(task, TARGET_PROMPTS, share_a_target(task.asked))
    models = Models(task, dtype, device)
    made = cells(task.asked, config, models.parameters(task.names))
    # Methods, budgets and repeats may be added to a run, what they share may not change.
    shared = {name: getattr(task, name) for name in ("policy", "guide", "judge", "fit", "batch_size", "seed")}
    records = Records(output, {**shared, "prompts": prompts, "settings": config.to_dict()})
    for_fit = len(prompts) - task.fit
    learned = Learned(output, models.engine, prompts[task.count : for_fit], prompts[for_fit:], task.seed)
    evaluation = Evaluation(
        prompts=prompts[: task.count],
        learned=learned,
        engine=models.engine,
        guide=models.guide,
        judge=models.judge,
        batch_size=task.batch_size,
        seed=task.seed,
        repeats=task.repeats,
    )
    return evaluation, made, records


def _report(records: Records, output: Path, task: Recipe, tie: float) -> None:
    from stars_fast.evaluation.plots import plot
    from stars_fast.evaluation.summary import Summary

    summary = Summary.of(records.generations, records.batches, output, tie, task.pairs)
    summary.write(output)
    typer.echo(summary.markdown(), nl=False)
    try:
        plot(summary.rows, output)
    except ImportError as error:
        note(f"no plot: {error}")

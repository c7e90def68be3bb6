"""``stars-fast fit``: learns once, for a policy and a reward model, what rewards candidates have."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from stars_fast.cli import models
from stars_fast.cli.console import fail, note, refusing, refusing_models
from stars_fast.rows.engines import Names


def run(
    input_: Annotated[
        Path, typer.Option("--input", help="JSON Lines with prompt, messages or prompt_ids: 24 like those to come.")
    ],
    output: Annotated[Path, typer.Option(help="Folder that stars_fit.json is written to.")],
    policy: models.PolicyName = None,
    reward: models.RewardName = None,
    samples: Annotated[int, typer.Option(min=4, help="Candidates drawn for each segment.")] = 16,
    method: models.MethodName = None,
    max_new_tokens: models.MaxNewTokens = None,
    config: models.SettingsFile = None,
    set_: models.Assignments = None,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = 0,
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
    """Learn what rewards a segment's candidates have, for ``generate --fit FOLDER``.

    Holds for this policy, reward model, segment length and sampling; --method optimal_stopping then spends its budget
    where it gains most, and stars and cards need no pilots.
    """
    from stars_fast.cli.settings import read_settings
    from stars_fast.rows.reading import lines_of, read_rows

    with refusing(OSError, ValueError, TypeError):
        settings = read_settings(config, set_ or (), method=method, max_new_tokens=max_new_tokens)
        with input_.open("rb") as file:
            rows = read_rows(lines_of(file), seed, str(input_))
    names = Names(
        policy or settings.policy, reward or settings.reward, tokenizer, reward_tokenizer, reward_tail, processor
    )
    models.check_models(names, dtype)
    _check_output(output)
    if bad := next((row for row in rows if row.error is not None), None):
        fail(f"--input {input_}: {bad.error}")
    variables = models.template_variables(chat_template_kwargs)
    engine = models.load_engine(names, dtype, device, max_rows, kv_cache_tokens)
    with refusing_models():
        from stars_fast.calibration import fit
        from stars_fast.methods.fit import FIT_NAME

        prompts = [row.asked for row in rows]
        known = fit(
            engine,
            prompts,
            settings.config,
            samples=samples,
            seed=seed,
            progress=True,
            **({} if variables is None else {"chat_template_kwargs": variables}),
        )
        over = ", over the one that was there" if (output / FIT_NAME).exists() else ""
        known.save_pretrained(output)
    typer.echo(known.report())
    note(f"written to {output}{over}: --fit {output}")


def _check_output(output: Path) -> None:
    """Refuse before anything is drawn what could not be written to."""
    there = next((path for path in (output, *output.absolute().parents) if path.exists()), output)
    if not there.is_dir():
        fail(f"--output {output}: {there} is a file, not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        fail(f"--output {output}: no permission to write to {there}")

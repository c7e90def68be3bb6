"""The models that commands are given, as their options name them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stars_fast.cli.console import fail, refusing, refusing_models
from stars_fast.rows.engines import Names, build_engine

if TYPE_CHECKING:
    from stars_fast.engine import StarsEngine

DTYPES = ("auto", "float32", "float16", "bfloat16")

PolicyName = Annotated[str | None, typer.Option(help="Causal LM: folder, hub id or 'demo'.")]
RewardName = Annotated[
    str | None,
    typer.Option(
        help="One-label sequence classifier: folder, hub id or 'demo'. Or FILE.py:NAME, a function (prompts, "
        "completions) -> list of numbers, or a stars_fast.rewards object; the file is run."
    ),
]
SettingsFile = Annotated[
    Path | None, typer.Option(help="YAML with fields of StarsConfig, and maybe policy and reward.")
]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="A field of StarsConfig or of its method; may be repeated."),
]
FitName = Annotated[
    str | None,
    typer.Option("--fit", metavar="DIR", help="What `stars-fast fit` wrote, or 'demo': no pilots then."),
]
MethodName = Annotated[
    str | None, typer.Option("--method", help="Decoding method (docs/methods.md), its parameters by --set.")
]
MaxNewTokens = Annotated[int | None, typer.Option(min=1, help="Most tokens of an answer.", show_default="128")]
Answers = Annotated[int | None, typer.Option("--n", min=1, help="Answers to each prompt.", show_default="1")]
TokenizerName = Annotated[str | None, typer.Option(help="The policy's, where it is not beside it.")]
ProcessorName = Annotated[
    str | None, typer.Option(help="What reads pictures for the policy, where it is not beside it.")
]
RewardTokenizerName = Annotated[
    str | None,
    typer.Option(help="The reward model's, where it is not beside it; 'policy' if it reads the policy's ids."),
]
RewardTail = Annotated[
    str, typer.Option(help="What follows an answer when it is scored: auto, template, none, or ids: 5,6,7.")
]
TemplateVariables = Annotated[
    str | None,
    typer.Option(metavar="JSON", help="Variables for chat templates: '{\"enable_thinking\": false}'."),
]
MaxRows = Annotated[int | None, typer.Option(min=1, help="Most candidates side by side.")]
KvCacheTokens = Annotated[int | None, typer.Option(min=1, help="Slots of each tree of keys and values.")]
Dtype = Annotated[str, typer.Option(help=f"Of both models: {', '.join(DTYPES)}.")]
Device = Annotated[str, typer.Option(help="Of both models; auto takes a GPU where there is one.")]


def check_models(names: Names, dtype: str) -> None:
    """Leave, saying so, where a model or a dtype is missing or unknown."""
    for name, value in (("policy", names.policy), ("reward", names.reward)):
        if not value:
            fail(f"no {name} model: give --{name} (a folder, a hub id or 'demo') or `{name}:` in --config")
    if str(names.reward).endswith(".py"):  # a file without a name in it: said here, before any worker starts
        from stars_fast.inputs.functions import load_function

        with refusing(OSError, ValueError):
            load_function(str(names.reward))
    if dtype not in DTYPES:
        fail(f"--dtype {dtype!r}: must be one of {', '.join(DTYPES)}")


def load_engine(
    names: Names, dtype: str, device: str, max_rows: int | None, kv_cache_tokens: int | None
) -> StarsEngine:
    """The engine of these models; leaves, saying why, where there is none."""
    with refusing_models():
        return build_engine(names, dtype, device, max_rows, kv_cache_tokens)


def template_variables(text: str | None) -> dict[str, Any] | None:
    """The chat templates' variables that were given."""
    from stars_fast.text.prompts import template_kwargs

    try:
        return None if text is None else template_kwargs(json.loads(text))
    except (ValueError, TypeError) as error:
        fail(f"--chat-template-kwargs {text}: give a JSON object of variables: {error}")

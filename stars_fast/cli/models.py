"""The models that ``generate`` and ``fit`` are given, as their options name them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from stars_fast.cli.console import fail, quiet_transformers, refusing_models

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
MethodName = Annotated[
    str | None, typer.Option("--method", help="Decoding method (docs/methods.md), its parameters by --set.")
]
MaxNewTokens = Annotated[int | None, typer.Option(min=1, help="Most tokens of an answer.", show_default="128")]
Answers = Annotated[int | None, typer.Option("--n", min=1, help="Answers to each prompt.", show_default="1")]
TokenizerName = Annotated[str | None, typer.Option(help="The policy's, where it is not beside it.")]
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


class Names(NamedTuple):
    """Models and tokenizers as the user named them."""

    policy: str | None
    reward: str | None
    tokenizer: str | None
    reward_tokenizer: str | None
    reward_tail: str


def check_models(names: Names, dtype: str) -> None:
    """Leave, saying so, where a model or a dtype is missing or unknown."""
    for name, value in (("policy", names.policy), ("reward", names.reward)):
        if not value:
            fail(f"no {name} model: give --{name} (a folder, a hub id or 'demo') or `{name}:` in --config")
    if dtype not in DTYPES:
        fail(f"--dtype {dtype!r}: must be one of {', '.join(DTYPES)}")


def load_engine(
    names: Names, dtype: str, device: str, max_rows: int | None, kv_cache_tokens: int | None
) -> StarsEngine:
    """The engine of these models; leaves, saying why, where there is none."""
    with refusing_models():
        return build_engine(names, dtype, device, max_rows, kv_cache_tokens)


def build_engine(
    names: Names, dtype: str, device: str, max_rows: int | None, kv_cache_tokens: int | None
) -> StarsEngine:
    """The engine of these models. Raises what loading them leads to."""
    from stars_fast.engine import StarsEngine
    from stars_fast.inputs.functions import file_of, load_function
    from stars_fast.inputs.models import load_classifier, load_policy

    quiet_transformers()
    assert names.policy is not None and names.reward is not None
    reward, reward_tokenizer = names.reward, names.reward_tokenizer
    scorer = None if file_of(reward) is None else load_function(reward)  # before what takes minutes
    policy, tokenizer = load_policy(names.policy, names.tokenizer, device, dtype)
    if scorer is None:
        scorer, reward_tokenizer = load_classifier(reward, reward_tokenizer, device, dtype)
    return StarsEngine(
        policy,
        scorer,
        tokenizer=tokenizer,
        reward_tokenizer=reward_tokenizer,
        reward_tail=_tail(names.reward_tail),
        max_rows=max_rows,
        kv_cache_tokens=kv_cache_tokens,
    )


def template_variables(text: str | None) -> dict[str, Any] | None:
    """The chat templates' variables that were given."""
    from stars_fast.text.prompts import template_kwargs

    try:
        return None if text is None else template_kwargs(json.loads(text))
    except (ValueError, TypeError) as error:
        fail(f"--chat-template-kwargs {text}: give a JSON object of variables: {error}")


def _tail(text: str) -> str | list[int]:
    return [int(token) for token in text.split(",")] if re.fullmatch(r"\d+(,\d+)*", text) else text

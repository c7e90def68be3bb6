"""``stars-fast demo``: the models that ship with the package, with and without guidance, offline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stars_fast.cli.console import fail, refusing, refusing_models, stderr, stdout, torch_threads
from stars_fast.rows.engines import quiet_transformers

if TYPE_CHECKING:
    from stars_fast.config import StarsConfig
    from stars_fast.engine import StarsEngine
    from stars_fast.outputs import SegmentTrace, StarsOutput

_PYTHON = """\
from stars_fast import StarsConfig, StarsEngine, demo

policy, reward, tokenizer = demo.load()
engine = StarsEngine(policy, reward, tokenizer=tokenizer)
config = StarsConfig(method="optimal_stopping", fit="demo", top_k=50)
out = engine.generate(
    demo.PROMPTS[:{prompts}], config, max_new_tokens={tokens}, seed={seed}
)
"""

_WIDEST = 110  # columns; longer lines of prose are hard to read

_LEGEND = (
    "reward: the critic's log-odds that the text so far is praise; 0 is undecided, +2 is 88 % sure. "
    "Both sides draw the same random numbers: they part where a segment's first candidate is not the one kept."
)


def run(
    prompts: Annotated[int, typer.Option(min=1, help="How many of the 8 openings to continue.")] = 3,
    seed: Annotated[int, typer.Option(help="Another one gives other texts.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of a continuation.")] = 96,
    candidates: Annotated[
        str, typer.Option(help="Drawn side by side: a number, or auto. Changes the speed, never the text.")
    ] = "auto",
) -> None:
    """Continue film reviews, unguided and guided by a critic who likes praise. Offline, in seconds."""
    from stars_fast.demo import NAME

    console = stdout()
    console.width = min(console.width, _WIDEST)
    with stderr().status("loading the demo models"):
        engine, openings = _load(prompts)
    config = _config(max_new_tokens, candidates)
    with refusing_models(), torch_threads(1):  # more gain little in models this small, and lose much on busy cores
        with stderr().status("writing without guidance"):
            vanilla = engine.generate(openings, config, seed=seed, target_reward=-math.inf, max_attempts=1)
        with stderr().status("writing with guidance"):
            guided = engine.generate(openings, config.replace(method="optimal_stopping", fit=NAME), seed=seed)
    console.print("A small model continues film reviews; a smaller one, its critic, guides it towards praise.")
    _show_texts(console, openings, vanilla, guided)
    _show_segments(console, openings[0], guided.segments[0], engine)
    _show_summary(console, vanilla, guided)
    _show_python(console, prompts, config, seed)


def _load(count: int) -> tuple[StarsEngine, list[str]]:
    from stars_fast import StarsEngine, demo

    if count > len(demo.PROMPTS):
        fail(f"--prompts {count}: there are {len(demo.PROMPTS)}")
    quiet_transformers()
    with refusing_models():
        return StarsEngine(demo.NAME, demo.NAME, device="cpu"), list(demo.PROMPTS[:count])


def _config(max_new_tokens: int, candidates: str) -> StarsConfig:
    from stars_fast.config import StarsConfig

    with refusing(ValueError, TypeError):
        return StarsConfig(
            max_new_tokens=max_new_tokens,
            candidates=int(candidates) if candidates.lstrip("-").isdigit() else candidates,
            top_k=50,
        )


def _show_texts(console: Console, openings: Sequence[str], vanilla: StarsOutput, guided: StarsOutput) -> None:
    assert vanilla.texts is not None and guided.texts is not None
    table = Table(box=box.SIMPLE_HEAD, expand=True, padding=(0, 1), show_lines=True)
    table.add_column("vanilla", ratio=1)
    table.add_column("guided", ratio=1)
    for i, opening in enumerate(openings):
        table.add_row(*(_text(opening, out, i) for out in (vanilla, guided)))
    console.print(table)
    console.print(Text(_LEGEND, style="dim"))


def _text(opening: str, out: StarsOutput, i: int) -> Text:
    assert out.texts is not None
    reward = out.rewards[i]
    return Text.assemble(
        (f"reward {reward:+.2f}\n", "green" if reward > 0 else "red"), (opening, "bold"), one_paragraph(out.texts[i])
    )


def one_paragraph(text: str) -> str:
    """Line breaks as blanks."""
    return text.replace("\n", " ")


def _show_segments(console: Console, opening: str, segments: Sequence[SegmentTrace], engine: StarsEngine) -> None:
    title = Text.assemble("how the first guided text was chosen, segment by segment: ", (f"{opening} ...", "italic"))
    table = Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD, expand=True, padding=(0, 1))
    table.add_column("segment", ratio=1)
    for name in ("reward", "enough", "candidates"):
        table.add_column(name, justify="right")
    for segment in segments:
        table.add_row(
            one_paragraph(engine.tokenizer.decode(segment.tokens, skip_special_tokens=True)).strip(),
            f"{segment.reward:+.2f}",
            f"{segment.threshold:+.2f}",
            str(segment.attempts),
        )
    console.print()
    console.print(table)
    console.print(
        Text("Candidates are drawn until the best has enough: more would cost more than they gain.", style="dim")
    )


def _show_summary(console: Console, vanilla: StarsOutput, guided: StarsOutput) -> None:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("all prompts")
    table.add_column("vanilla", justify="right")
    table.add_column("guided", justify="right")
    figures = _figures(vanilla), _figures(guided)
    for name in figures[0]:
        table.add_row(name, *(own[name] for own in figures))
    console.print(table)


def _figures(out: StarsOutput) -> dict[str, str]:
    attempts = [segment.attempts for row in out.segments for segment in row]
    stats = out.stats
    return {
        "mean reward": f"{fmean(out.rewards):+.2f}",
        "candidates per segment": f"{fmean(attempts):.1f}",
        "tokens returned per second": f"{stats['committed_tokens'] / stats['seconds']:.0f}",
        "policy tokens per token returned": f"{stats['policy_tokens'] / max(stats['committed_tokens'], 1):.1f}",
    }


def _show_python(console: Console, prompts: int, config: StarsConfig, seed: int) -> None:
    code = _PYTHON.format(prompts=prompts, tokens=config.max_new_tokens, seed=seed)
    console.print("\nThe same in Python:\n")
    console.print(Text(code, style="cyan"), soft_wrap=True, end="")

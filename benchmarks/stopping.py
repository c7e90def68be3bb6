"""Optimal stopping beside blockwise best-of-n at equal tokens: on other rewards, with other fits, in other segments.

Everything measured goes into a JSON file as soon as it is there; what is there already is not measured again::

    python -m benchmarks.stopping films --prompts imdb_prompts.jsonl --json stopping.json --fits 24 8 96 normal
    python -m benchmarks.stopping films --prompts imdb_prompts.jsonl --json stopping.json --segment-length 8
    python -m benchmarks.stopping films --prompts imdb_prompts.jsonl --json stopping.json --elsewhere stories.jsonl
    python -m benchmarks.stopping sums --policy sums --json stopping.json --stars --best-of-n
    python -m benchmarks.stopping films --json stopping.json --show

Tasks: "films" is the demo pair; "chance" the same critic's probability of praise, in (0, 1); "words" counts words of
praise less words of blame in the demo policy's reviews; "sums" is `examples/arithmetic.py` with the policy that
`examples/train_arithmetic.py` makes. A fit is made on prompts that nothing else is measured on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import lzma
import math
import random
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import stars_fast
from examples.arithmetic import problem, right_less_wrong, solved
from stars_fast import StarsConfig, StarsEngine, StarsOutput, demo
from stars_fast.methods.fit import Fit
from stars_fast.methods.stopping import NORMAL
from stars_fast.rewards import ClassifierReward

BLOCKWISE, BEST_OF, BUDGETS, ACCEPTANCES = (2, 3, 4, 6, 8, 12, 16), (2, 4, 8, 16), (2, 4, 8, 16), (0.5, 0.3, 0.15)
FITTED, OFFSET = 96, 200  # prompts that fits may be made on; where those that are measured on begin
_PRAISE = re.compile(r"\b(?:great|good|best|love|excellent|wonderful|beautiful|fun|perfect|enjoy)", re.I)
_BLAME = re.compile(r"\b(?:bad|worst|boring|awful|terrible|poor|stupid|waste|dull|annoying)", re.I)


class Chance(ClassifierReward):
    """Log-odds as a probability: bounded, and of little spread near both ends."""

    def score(self, completions: Any) -> Any:
        return torch.as_tensor(super().score(completions)).sigmoid()


def words(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """Words of praise, less words of blame."""
    return [float(len(_PRAISE.findall(text)) - len(_BLAME.findall(text))) for text in completions]


def openings(source: Path, first: int, count: int, column: str = "text") -> list[str]:
    """The first six words of each text."""
    with lzma.open(source, "rt") if source.suffix == ".xz" else source.open() as file:
        lines = list(file)[first : first + count]
    return [" ".join(str(json.loads(line)[column]).split()[:6]) for line in lines]


def engine_for(task: str, policy: Path | None) -> StarsEngine:
    if task == "sums":
        tokenizer = AutoTokenizer.from_pretrained(policy)
        model = AutoModelForCausalLM.from_pretrained(policy).eval()
        return StarsEngine(model, right_less_wrong, tokenizer=tokenizer, max_rows=512)
    model, critic, tokenizer = demo.load()
    reward = {"films": lambda: critic, "chance": lambda: Chance(critic, "policy", tokenizer), "words": lambda: words}
    return StarsEngine(model, reward[task](), tokenizer=tokenizer, max_rows=512)


class Record:
    """Rows by name in a JSON file, which is written after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self.rows:
            self.rows[name] = make()
            self.path.write_text(json.dumps(self.rows))
            print(name, {k: v for k, v in self.rows[name].items() if isinstance(v, float)}, flush=True)
        return self.rows[name]


def measured(engine: StarsEngine, prompts: list[str], config: StarsConfig, task: str, **overrides: Any) -> Any:
    """One way of decoding: rewards by prompt, and what it cost."""
    began = time.monotonic()
    output = engine.generate(prompts, config, seed=0, on_error="raise", trace=True, **overrides)
    row = {
        "tokens": _looked_at(output) / output.stats["committed_tokens"],
        "spent": fmean(s.attempts for segments in output.segments for s in segments),
        "mean": fmean(output.rewards),
        "rewards": [round(reward, 4) for reward in output.rewards],
        "seconds": round(time.monotonic() - began, 1),
    }
    if task == "sums":
        right = [solved(prompt, text) for prompt, text in zip(prompts, output.texts, strict=True)]
        row |= {"solved": fmean(right), "right": right}
    return row


def _looked_at(output: StarsOutput) -> int:
    """Tokens of candidates in index order up to the verdict: what drawing them one at a time would have cost."""
    traces = [segment.candidates or [] for segments in output.segments for segment in segments]
    return sum(len(one.tokens) for candidates in traces for one in candidates if one.verdict != "unseen")


def fit_on(engine: StarsEngine, prompts: list[str], config: StarsConfig) -> Any:
    """A fit as plain values, with the seconds that it took."""
    began = time.monotonic()
    known = stars_fast.fit(engine, prompts, config)
    return known.to_dict() | {"seconds": round(time.monotonic() - began, 1)}


def normal(known: Fit) -> Fit:
    """The same with a normal law in place of the shape that was seen."""
    return dataclasses.replace(known, levels=NORMAL)


def compared(rows: dict[str, Any], name: str, column: str = "rewards") -> tuple[float, float, float, float]:
    """Gain over vanilla, relative to blockwise best-of-n's at equal tokens, and the difference with its 95 % interval.

    Blockwise is interpolated, prompt by prompt, between neighbouring n, linearly in the logarithm of the tokens;
    prompts are drawn anew 4,000 times.
    """
    ladder = sorted((rows[key]["tokens"], key) for key in rows if key == "vanilla" or key.startswith("blockwise"))
    logs, at = [math.log(tokens) for tokens, _ in ladder], math.log(rows[name]["tokens"])
    values = np.array([rows[key][column] for _, key in ladder], float)  # [n, prompts]
    equal = np.array([np.interp(at, logs, of_prompt) for of_prompt in values.T])
    off = np.array(rows[name][column], float) - equal
    draws = np.random.default_rng(0).integers(len(off), size=(4000, len(off)))
    low, high = np.quantile(off[draws].mean(1), (0.025, 0.975))
    gain = equal.mean() - np.mean(rows["vanilla"][column])
    return float(1 + off.mean() / gain) if gain else math.nan, float(off.mean()), float(low), float(high)


def show(record: Record, prefix: str) -> None:
    """Print what was measured of a task as a table."""
    rows = {key.removeprefix(prefix): row for key, row in record.rows.items() if key.startswith(prefix)}
    rows = {key: row for key, row in rows.items() if "rewards" in row}
    print("| way | spent | tokens | reward | solved | gain / blockwise's | difference to blockwise at equal tokens |")
    print("|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        right, against = f"{row['solved']:.3f}" if "solved" in row else "", "| |"
        if name != "vanilla" and not name.startswith("blockwise"):
            against = "| {:.2f} | {:+.3f} ({:+.3f} to {:+.3f}) |".format(*compared(rows, name))
        print(f"| {name} | {row['spent']:.2f} | {row['tokens']:.2f} | {row['mean']:.3f} | {right} {against}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["films", "chance", "words", "sums"])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, help="JSON lines with `text` (all tasks but sums)")
    parser.add_argument("--elsewhere", type=Path, help="JSON lines of another domain, to fit on as well")
    parser.add_argument("--column", default="text", help="of their texts")
    parser.add_argument("--policy", type=Path, help="what examples/train_arithmetic.py wrote (sums)")
    parser.add_argument("--count", type=int, default=100, help="prompts measured on")
    parser.add_argument("--segment-length", type=int, default=16)
    parser.add_argument("--budgets", type=float, nargs="*", default=BUDGETS)
    parser.add_argument("--fits", nargs="*", default=["24", "none"], help="prompts of a fit; normal (of 24); none")
    parser.add_argument("--blockwise", type=int, nargs="*", default=BLOCKWISE, help="n of blockwise best-of-n")
    parser.add_argument("--stars", action="store_true", help="stars on quantiles, with the fit on 24")
    parser.add_argument("--best-of-n", action="store_true")
    parser.add_argument("--show", action="store_true", help="print what is there, measure nothing")
    args = parser.parse_args()
    record, prefix = Record(args.json), f"{args.task}/{args.segment_length}/"
    if not args.show:
        _measure(args, record, prefix)
    show(record, prefix)


def _measure(args: argparse.Namespace, record: Record, prefix: str) -> None:
    torch.set_num_threads(1)
    engine = engine_for(args.task, args.policy)
    config = StarsConfig(max_new_tokens=64, segment_length=args.segment_length, top_k=50)
    if args.task == "sums":
        chance = random.Random(1)
        known, prompts = [problem(chance) for _ in range(FITTED)], [problem(chance) for _ in range(args.count)]
        config = config.replace(max_new_tokens=80, top_k=0)
    else:
        known, prompts = openings(args.prompts, 0, FITTED), openings(args.prompts, OFFSET, args.count)

    def run(name: str, **overrides: Any) -> None:
        record.once(prefix + name, lambda: measured(engine, prompts, config, args.task, **overrides))

    def fit(name: str, of: list[str]) -> Fit:
        return Fit.from_dict(record.once(f"{prefix}fit/{name}", lambda: fit_on(engine, of, config)))

    run("vanilla", method="vanilla")
    fits: dict[str, Any] = {}
    for name in (one for one in args.fits if one != "none"):
        size = 24 if name == "normal" else int(name)
        fits[name] = fit(str(size), known[:size])
    if "normal" in fits:
        fits["normal"] = normal(fits["normal"])
    if "none" in args.fits:
        fits["none"] = None
    if args.elsewhere:
        fits["elsewhere"] = fit("elsewhere", openings(args.elsewhere, 0, 24, args.column))
    for budget in args.budgets:
        for name, one in fits.items():
            run(f"stopping-{name}/{budget:g}", method={"name": "optimal_stopping", "budget": budget}, fit=one)
    for n in args.blockwise:
        run(f"blockwise/{n}", method={"name": "blockwise_best_of_n", "n": n})
    for n in BEST_OF if args.best_of_n else ():
        run(f"best-of-n/{n}", method={"name": "best_of_n", "n": n})
    for acceptance in ACCEPTANCES if args.stars else ():
        run(f"stars/{acceptance}", method="stars", fit=fit("24", known[:24]), acceptance=acceptance)


if __name__ == "__main__":
    main()

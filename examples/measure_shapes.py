"""Does guidance lower the share of wrong colours? A table, by what was drawn and not by a model's opinion.

Needs the three models that ``train_shapes.py`` makes::

    python examples/measure_shapes.py --models shapes --pictures 300
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from shapes import QUESTION, Findings, Scene, check
from train_shapes import MEASURED, scenes, take
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from stars_fast import StarsConfig, StarsEngine, StarsOutput
from stars_fast.methods import BestOfN, BlockwiseBestOfN, Guided, Method, OptimalStopping, Stars, Vanilla
from stars_fast.rewards import GroundingReward, ImplicitReward
from stars_fast.rewards.grounding import noised

SENTENCE = 6  # tokens; a segment is a sentence
BUDGETS = (2, 4, 8)
NOISE = 999  # of 1000 steps: at 500, as published for photographs, colours this plain can still be told
CONFIG = StarsConfig(segment_length=SENTENCE, max_new_tokens=48)


class Row(NamedTuple):
    """What is measured: a policy, what guides it and how."""

    name: str
    policy: Any
    reward: Any
    method: Method
    overrides: Mapping[str, Any] = MappingProxyType({})


class Shapes(NamedTuple):
    """The models, and a prompt for each picture."""

    policy: Any
    reference: Any
    twin: Any
    processor: LlavaProcessor
    scenes: list[Scene]
    prompts: list[Any]


def load(folder: Path, pictures: int, seed: int) -> Shapes:
    """Models from ``folder``, pictures from where training has not been."""
    models = [
        LlavaForConditionalGeneration.from_pretrained(folder / name).eval() for name in ("policy", "reference", "twin")
    ]
    processor: Any = LlavaProcessor.from_pretrained(folder)
    shown = take(scenes(MEASURED, seed), pictures)
    prompts = [processor(text=f"<image> {QUESTION}", images=picture, return_tensors="pt") for _, picture, _ in shown]
    return Shapes(*models, processor, [scene for scene, _, _ in shown], prompts)


def rows(shapes: Shapes) -> Iterator[Row]:
    """Every row of the table."""
    policy, reference, twin, *_ = shapes

    def blurred(prompt: Any) -> Any:
        return noised(prompt, NOISE)

    log_ratio = ImplicitReward(twin, reference, tokenizer="policy")
    grounding = GroundingReward(policy, noise=NOISE)
    yield Row("policy alone", policy, log_ratio, Vanilla())
    yield Row("policy alone, likeliest token", policy, log_ratio, Vanilla(), {"top_k": 1})
    yield Row("reference alone", reference, log_ratio, Vanilla())
    yield Row("twin alone", twin, log_ratio, Vanilla())
    for name, reward in (("twin / reference", log_ratio), ("picture / noise", grounding)):
        for n in BUDGETS:
            yield Row(f"best of {n}, {name}", policy, reward, BestOfN(n))
        for n in BUDGETS:
            yield Row(f"blockwise best of {n}, {name}", policy, reward, BlockwiseBestOfN(n))
        for n in BUDGETS:
            yield Row(f"optimal stopping, {n}, {name}", policy, reward, OptimalStopping(n))
        for acceptance in (0.5, 0.3, 0.15):
            yield Row(f"STARS, {acceptance}, {name}", policy, reward, Stars(), {"acceptance": acceptance})
    for a, b in ((0.7, 0.3), (0.5, 0.5)):
        yield Row(f"{a} policy + {b} twin", policy, log_ratio, Guided([(twin, b)], weight=a))
    for w in (0.5, 1.0, 2.0):
        mix = Guided([(twin, w, None), (reference, -w, None)])
        yield Row(f"policy + {w} (twin - reference)", policy, log_ratio, mix)
    for a in (0.5, 1.0):
        contrast = Guided([(None, -a, blurred)], weight=1 + a)
        yield Row(f"{1 + a} picture - {a} noise", policy, log_ratio, contrast)


def measure(row: Row, shapes: Shapes, seed: int) -> dict[str, Any]:
    """One answer to each prompt, checked."""
    engine = StarsEngine(row.policy, row.reward, tokenizer=shapes.processor.tokenizer)
    out = engine.generate(shapes.prompts, CONFIG, method=row.method, seed=seed, **row.overrides)
    if failed := [error for error in out.errors if error is not None]:
        raise RuntimeError(f"{row.name}: {len(failed)} answers failed, the first with {failed[0]}")
    found = [check(scene, text) for scene, text in zip(shapes.scenes, out.texts or [], strict=True)]
    return {"name": row.name, **counted(found), **costs(out)}


def counted(found: list[Findings]) -> dict[str, float]:
    """Shares and means over captions, with standard errors; the pictures are the units that vary."""
    right, wrong, invented, broken, missed = np.array(found).T
    named = right + wrong
    share = wrong.sum() / named.sum()
    spread = (wrong - share * named).std(ddof=1) / named.mean()  # of a ratio of two means, by its linear part
    return {
        "wrong": share,
        "wrong_se": spread / math.sqrt(len(found)),
        "flawless": float(np.mean((wrong == 0) & (invented + broken + missed == 0))),
        "other": float(np.mean(invented + broken + missed)),
    }


def costs(out: StarsOutput) -> dict[str, float]:
    """Tokens per token of the answers: of the policy, those of pilots apart, and of the guide."""
    kept, stats = out.stats["committed_tokens"], out.stats
    return {
        "drawn": (stats["policy_tokens"] - stats["calibration_tokens"]) / kept,
        "pilots": stats["calibration_tokens"] / kept,
        "scored": stats["reward_tokens"] / kept,
    }


def line(row: dict[str, Any]) -> str:
    """A line of the table."""
    return (
        f"| {row['name']} | {100 * row['wrong']:.1f} ± {100 * row['wrong_se']:.1f} | {100 * row['flawless']:.0f} "
        f"| {row['other']:.2f} | {row['drawn']:.2f} | {row['pilots']:.1f} | {row['scored']:.1f} |"
    )


def main() -> None:
    """Measure what was asked for, and write it down row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("shapes"), help="where train_shapes.py put them")
    parser.add_argument("--pictures", type=int, default=300)
    parser.add_argument("--only", default="", help="rows with this in their names")
    parser.add_argument("--out", type=Path, help="JSON lines to append to")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    shapes = load(args.models, args.pictures, args.seed)
    print(
        "| | wrong colours, % | flawless, % | other faults | drawn | pilots | scored |\n|---|---|---|---|---|---|---|"
    )
    for row in rows(shapes):
        if args.only in row.name:
            measured = measure(row, shapes, args.seed)
            print(line(measured), flush=True)
            if args.out:
                with args.out.open("a") as file:
                    print(json.dumps(measured), file=file)


if __name__ == "__main__":
    main()

"""Does guidance lower the share of wrong colours? A table, by what was drawn and not by a model's opinion.

Needs the three models that ``train_shapes.py`` makes::

    python examples/measure_shapes.py --models shapes --pictures 300
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from shapes import QUESTION, Findings, Scene, check
from train_shapes import HELD, MEASURED, scenes, take
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from stars_fast import Fit, StarsConfig, StarsEngine, StarsOutput, fit
from stars_fast.methods import BestOfN, BlockwiseBestOfN, Guided, Method, OptimalStopping, Stars, Vanilla
from stars_fast.rewards import GroundingReward, ImplicitReward, noised

SENTENCE = 6  # tokens; a segment is a sentence
BUDGETS = (2, 4, 8)
NOISE = 999  # of 1000 steps; before that tints show through the grain when shapes no longer do
CONFIG = StarsConfig(segment_length=SENTENCE, max_new_tokens=48)


class Row(NamedTuple):
    """What is measured: a policy, what guides it and how."""

    name: str
    policy: Any
    reward: Any
    method: Method
    overrides: Mapping[str, Any] = MappingProxyType({})
    fitted: bool = False  # whether the method is told beforehand what rewards to expect


class Shapes(NamedTuple):
    """The models, and a prompt for each picture."""

    policy: Any
    reference: Any
    twin: Any
    tokenizer: Any
    scenes: list[Scene]
    prompts: list[Any]
    others: list[Any]  # to fit with


def load(folder: Path, pictures: int, seed: int) -> Shapes:
    """Models from ``folder``, pictures from where training has not been."""
    models = [
        LlavaForConditionalGeneration.from_pretrained(folder / name).eval() for name in ("policy", "reference", "twin")
    ]
    processor: Any = LlavaProcessor.from_pretrained(folder)

    def read(stream: int, count: int) -> tuple[list[Scene], list[Any]]:
        shown = take(scenes(stream, seed), count)
        inputs = [processor(text=f"<image> {QUESTION}", images=picture, return_tensors="pt") for _, picture, _ in shown]
        return [scene for scene, _, _ in shown], inputs

    return Shapes(*models, processor.tokenizer, *read(MEASURED, pictures), read(HELD, 24)[1])


def nothing(prompts: Any, completions: list[Any], **columns: Any) -> list[float]:
    """The reward where none is asked for."""
    return [0.0] * len(completions)


def as_noise(prompt: Any) -> Any:
    """The prompt with noise over the picture, as in visual contrastive decoding (arXiv 2311.16922)."""
    return noised(prompt, NOISE)


def as_blank(prompt: Any) -> Any:
    """The prompt with a picture of nothing, in middle grey."""
    return {**prompt, "pixel_values": torch.zeros_like(prompt["pixel_values"])}


def rows(shapes: Shapes) -> Iterator[Row]:
    """Every row of the table."""
    policy, reference, twin, *_ = shapes
    log_ratio = ImplicitReward(twin, reference, tokenizer="policy")
    yield Row("policy", policy, nothing, Vanilla())
    yield Row("policy, likeliest tokens", policy, nothing, Vanilla(), {"top_k": 1})
    yield Row("reference", reference, nothing, Vanilla())
    yield Row("twin", twin, nothing, Vanilla())
    for weight in (0.3, 0.5):
        mix = Guided([(twin, weight)], weight=1 - weight)
        yield Row(f"{1 - weight} policy + {weight} twin", policy, nothing, mix)
    for weight in (0.5, 1.0, 2.0, 4.0):
        ratio = Guided([(twin, weight), (reference, -weight)])
        yield Row(f"policy + {weight} (twin - reference)", policy, nothing, ratio)
    for name, distorted in (("noise", as_noise), ("a blank", as_blank)):
        for weight in (0.5, 1.0, 2.0):
            contrast = Guided([(None, -weight, distorted)], weight=1 + weight)
            yield Row(f"{1 + weight} policy - {weight} policy before {name}", policy, nothing, contrast)
    mixed = Guided([(twin, 0.3)], weight=0.7, method=BlockwiseBestOfN(4))
    yield Row("0.7 policy + 0.3 twin, twin: blockwise best of 4", policy, log_ratio, mixed)
    rewards = {
        "twin": log_ratio,
        "noise": GroundingReward(policy, noise=NOISE),
        "blank": GroundingReward(policy, noise=as_blank),
    }
    for name, reward in rewards.items():
        for n in BUDGETS:
            yield Row(f"{name}: best of {n}", policy, reward, BestOfN(n))
        for n in BUDGETS:
            yield Row(f"{name}: blockwise best of {n}", policy, reward, BlockwiseBestOfN(n))
        yield Row(f"{name}: STARS, targets from pilots", policy, reward, Stars())
        for n in BUDGETS:
            yield Row(f"{name}: STARS, fit, 1 / {n}", policy, reward, Stars(), {"acceptance": 1 / n}, fitted=True)
        for n in BUDGETS:
            yield Row(f"{name}: optimal stopping, fit, {n}", policy, reward, OptimalStopping(n), fitted=True)


def measure(row: Row, shapes: Shapes, seed: int, fits: dict[Any, Fit]) -> dict[str, Any]:
    """One answer to each prompt, checked. ``fits`` are those of rewards so far."""
    engine = StarsEngine(row.policy, row.reward, tokenizer=shapes.tokenizer)
    if row.fitted and row.reward not in fits:
        fits[row.reward] = fit(engine, shapes.others, CONFIG)
    config = CONFIG.replace(fit=fits[row.reward] if row.fitted else None, **row.overrides)
    out = engine.generate(shapes.prompts, config, method=row.method, seed=seed)
    if failed := [error for error in out.errors if error is not None]:
        raise RuntimeError(f"{row.name}: {len(failed)} answers failed, the first with {failed[0]}")
    found = [check(scene, text) for scene, text in zip(shapes.scenes, out.texts or [], strict=True)]
    return {"name": row.name, **counted(found), **costs(out), "found": found}


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
    parser.add_argument("--only", default="", help="rows in whose names this regular expression is found")
    parser.add_argument("--out", type=Path, help="JSON lines to append to")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    shapes = load(args.models, args.pictures, args.seed)
    print(
        "| | wrong colours, % | flawless, % | other faults | drawn | pilots | scored |\n|---|---|---|---|---|---|---|"
    )
    fits: dict[Any, Fit] = {}
    for row in rows(shapes):
        if re.search(args.only, row.name):
            measured = measure(row, shapes, args.seed, fits)
            print(line(measured), flush=True)
            if args.out:
                with args.out.open("a") as file:
                    print(json.dumps(measured), file=file)


if __name__ == "__main__":
    main()

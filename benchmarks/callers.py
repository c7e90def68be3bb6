"""Accepted tokens a second where callers come one by one, beside one call with all prompts and one call a prompt.

``python3 benchmarks/callers.py [--prompts 32] [--rounds 3] [--json FILE]``, on the demo models. Every way writes the
same texts, which is checked; ways take turns, so that a busy machine slows all of them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import stars_fast
from stars_fast import AsyncStarsEngine, StarsConfig, StarsEngine

CONFIG = StarsConfig(max_new_tokens=64, target_reward=2.0, base_reward=0.0)
Texts = list[list[int]]


def served(engine: StarsEngine, prompts: list[str], callers: int) -> Texts:
    """By a session, so many callers at a time."""

    async def run() -> Texts:
        session, gate = AsyncStarsEngine(engine, max_waiting=len(prompts)), asyncio.Semaphore(callers)

        async def one(i: int) -> list[int]:
            async with gate:
                events = [event async for event in session.generate(prompts[i], CONFIG, seed=i)]
            return [token for event in events if event.segment for token in event.segment.tokens]

        try:
            return await asyncio.gather(*map(one, range(len(prompts))))
        finally:
            session.close()

    return asyncio.run(run())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    policy, reward, tokenizer = stars_fast.demo.load()
    engine = StarsEngine(policy, reward, tokenizer=tokenizer)
    prompts = [stars_fast.demo.PROMPTS[i % len(stars_fast.demo.PROMPTS)] for i in range(options.prompts)]
    ways: dict[str, Callable[[], Texts]] = {
        "one call": lambda: engine.generate(prompts, CONFIG, seed=list(range(len(prompts)))).completions,
        "one call a prompt": lambda: [
            engine.generate([prompt], CONFIG, seed=[i]).completions[0] for i, prompt in enumerate(prompts)
        ],
    }
    for callers in (1, 4, 16, 32):
        ways[f"{callers} callers"] = lambda callers=callers: served(engine, prompts, callers)
    want, rates = ways["one call"](), {name: list[float]() for name in ways}
    for _ in range(options.rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            texts = way()
            rates[name].append(sum(map(len, texts)) / (time.perf_counter() - started))
            other = sum(a != b for a, b in zip(texts, want, strict=True))
            assert other <= max(1, len(prompts) // 100), f"{name}: {other} texts differ"
    whole = median(rates["one call"])
    rows = [{"way": n, "tokens_per_second": median(r), "of_one_call": median(r) / whole} for n, r in rates.items()]
    for row in rows:
        print(f"{row['way']:18} {row['tokens_per_second']:8.0f} tokens/s  {row['of_one_call']:.2f} of one call")
    if options.json:
        machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.processor()}
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

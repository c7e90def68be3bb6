"""Accepted tokens per second of the engine beside baselines, on the models that ship with the package.

    python benchmarks/compare.py --batch 1 16 --json out.json

All contestants run in one process, alternating, and only ratios are to be trusted. The target reward is set so that
about one candidate in six is accepted, which is what CARDS' published call counts imply.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
import transformers
from baselines import plain

import stars_fast
from stars_fast import StarsConfig, StarsEngine, demo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--acceptance", type=float, default=1 / 6)
    parser.add_argument("--json", help="write the figures here")
    args = parser.parse_args()
    policy, reward, tokenizer = demo.load()
    results = [measure(policy, reward, tokenizer, batch, args) for batch in args.batch]
    for result in results:
        report(result)
    if args.json:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        machine = {"machine": platform.machine(), "threads": torch.get_num_threads(), **versions}
        with open(args.json, "w") as file:
            json.dump({"machine": machine, "results": results}, file, indent=2)


def measure(policy, reward, tokenizer, batch: int, args: argparse.Namespace) -> dict:  # type: ignore[no-untyped-def]
    """Run every contestant ``rounds`` times on the same prompts, alternating."""
    prompts = [tokenizer(demo.PROMPTS[i % len(demo.PROMPTS)])["input_ids"] for i in range(batch)]
    engine = StarsEngine(policy, reward, tokenizer=tokenizer)
    config = StarsConfig(max_new_tokens=args.max_new_tokens, top_k=50, ignore_eos=True)
    config = stars_fast.calibrate(engine, prompts[:1], args.acceptance, config=config, seed=0).config
    # One target for all prompts, and r(x) from the reward model: what every contestant can do.
    config = config.replace(target_reward=config.target_reward[0], base_reward=None)  # type: ignore[index]

    def run_plain(seed: int) -> tuple[int, int, int]:
        torch.manual_seed(seed)
        texts = [plain(policy, reward, prompt, config, set()) for prompt in prompts]
        return sum(len(t.tokens) for t in texts), sum(t.attempts for t in texts), sum(t.segments for t in texts)

    def run_engine(candidates: int | str) -> Callable[[int], tuple[int, int, int]]:
        def run(seed: int) -> tuple[int, int, int]:
            out = engine.generate(prompts, config, candidates=candidates, seed=seed)
            segments = [segment for row in out.segments for segment in row]
            return out.stats["committed_tokens"], sum(s.attempts for s in segments), len(segments)

        return run

    contestants = {"engine": run_engine("auto"), "engine, candidates=1": run_engine(1), "plain": run_plain}
    for run in contestants.values():
        run(0)
    speeds: dict[str, list[float]] = {name: [] for name in contestants}
    attempts: dict[str, list[float]] = {name: [] for name in contestants}
    for seed in range(1, args.rounds + 1):
        for name, run in contestants.items():
            started = time.perf_counter()
            tokens, looked, segments = run(seed)
            speeds[name].append(tokens / (time.perf_counter() - started))
            attempts[name].append(looked / segments)
    return {
        "batch": batch,
        "tokens_per_second": speeds,
        "attempts_per_segment": {name: statistics.fmean(values) for name, values in attempts.items()},
        "ratio": {
            name: statistics.median(a / b for a, b in zip(speeds["engine"], speeds[name], strict=True))
            for name in contestants
        },
    }


def report(result: dict) -> None:  # type: ignore[type-arg]
    """Print one batch size, ratios first."""
    print(f"batch {result['batch']}")
    for name, ratio in result["ratio"].items():
        speed = statistics.median(result["tokens_per_second"][name])
        attempts = result["attempts_per_segment"][name]
        print(f"  engine is {ratio:5.1f}x {name:22} ({speed:7.1f} accepted tokens/s, {attempts:.1f} attempts/segment)")


if __name__ == "__main__":
    main()

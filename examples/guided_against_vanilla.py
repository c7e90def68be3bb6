"""How much guidance changes: the demo models on the first words of real reviews, with and without their critic.

    python examples/guided_against_vanilla.py --prompts reviews.jsonl --count 100

The file has one JSON object per line with a ``text`` (`.xz` is read as it is).
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import statistics
from pathlib import Path

from stars_fast import StarsConfig, StarsEngine, StarsOutput, demo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--words", type=int, default=6, help="words of each review that make the prompt")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    policy, reward, tokenizer = demo.load()
    engine = StarsEngine(policy, reward, tokenizer=tokenizer)
    config = StarsConfig(max_new_tokens=96, top_k=50)
    prompts = read_prompts(args.prompts, args.count, args.words)
    vanilla = engine.generate(prompts, config, target_reward=-math.inf, max_attempts=1, seed=args.seed, progress=True)
    guided = engine.generate(prompts, config, seed=args.seed, progress=True)
    report(vanilla, guided)


def read_prompts(path: Path, count: int, words: int) -> list[str]:
    """The first words of the first reviews."""
    with lzma.open(path, "rt") if path.suffix == ".xz" else path.open() as file:
        texts = [json.loads(line)["text"] for _, line in zip(range(count), file, strict=False)]
    return [" ".join(text.split()[:words]) for text in texts]


def report(vanilla: StarsOutput, guided: StarsOutput) -> None:
    """Print rewards, wins, acceptance and cost."""
    pairs = list(zip(guided.rewards, vanilla.rewards, strict=True))
    wins = statistics.fmean((g > v) + 0.5 * (g == v) for g, v in pairs)
    gain = [g - v for g, v in pairs]
    error = statistics.stdev(gain) / math.sqrt(len(gain))
    segments = [segment for row in guided.segments for segment in row]
    accepted = sum(segment.accepted for segment in segments)
    attempts = sum(segment.attempts for segment in segments)
    stats = guided.stats
    print(f"responses                 {len(pairs)}")
    print(f"mean reward, vanilla      {statistics.fmean(vanilla.rewards):+.3f}")
    print(f"mean reward, guided       {statistics.fmean(guided.rewards):+.3f}")
    print(f"gain                      {statistics.fmean(gain):+.3f} +- {error:.3f} (standard error)")
    print(f"guided beats vanilla      {wins:.0%}")
    print(f"positive (reward > 0)     {share(vanilla):.0%} -> {share(guided):.0%}")
    print(f"acceptance                {accepted / attempts:.3f} of candidates looked at")
    print(f"fallbacks                 {1 - accepted / len(segments):.3f} of segments")
    drawn = stats["policy_tokens"] - stats["calibration_tokens"]
    print(
        f"tokens drawn per returned {drawn / stats['committed_tokens']:.2f}, and in calibration "
        f"{stats['calibration_tokens'] / stats['committed_tokens']:.2f}"
    )


def share(out: StarsOutput) -> float:
    """Share of responses that the critic finds positive."""
    return statistics.fmean(reward > 0 for reward in out.rewards)


if __name__ == "__main__":
    main()

"""Accepted tokens per second of the engine beside baselines, on a CPU.

    python benchmarks/compare.py --batch 1 16 --json out.json

Policy and reward model are Llamas of 27M parameters with random weights (speed does not depend on the weights). The
target reward is set so that about one candidate in six is accepted, which is what CARDS' published call counts imply.
All contestants run in one process, alternating, and only ratios are to be trusted.
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
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from stars_fast import StarsConfig, StarsEngine
from stars_fast.call import Arguments
from stars_fast.methods.calibration import expected_acceptance, set_target, spread

SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 7,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
}
PROMPT_LENGTH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--acceptance", type=float, default=1 / 6)
    parser.add_argument("--json", help="write the figures here")
    args = parser.parse_args()
    torch.manual_seed(0)
    policy = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    reward = LlamaForSequenceClassification(LlamaConfig(**SHAPE, num_labels=1)).eval()
    results = [measure(policy, reward, batch, args) for batch in args.batch]
    for result in results:
        report(result)
    if args.json:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        machine = {"machine": platform.machine(), "threads": torch.get_num_threads(), **versions}
        with open(args.json, "w") as file:
            json.dump({"machine": machine, "results": results}, file, indent=2)


def measure(policy, reward, batch: int, args: argparse.Namespace) -> dict:  # type: ignore[no-untyped-def]
    """Run every contestant ``rounds`` times on the same prompts, alternating."""
    prompts = torch.randint(1, SHAPE["vocab_size"], (batch, PROMPT_LENGTH)).tolist()
    engine = StarsEngine(policy, reward)
    # With alpha = 1 the threshold is the target at every length, so one number sets the acceptance.
    config = StarsConfig(max_new_tokens=args.max_new_tokens, alpha=1.0, top_k=50, ignore_eos=True)
    config = with_acceptance(engine, prompts, config, args.acceptance)

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
        # Of all rounds together: with few prompts the attempts of one round vary too much to stand alone.
        "ratio": {name: total(speeds["engine"]) / total(speeds[name]) for name in contestants},
    }


def with_acceptance(engine: StarsEngine, prompts: list[list[int]], config: StarsConfig, wanted: float) -> StarsConfig:
    """Target and beta with which unguided segments would be accepted with probability ``wanted``."""
    _, (pilot, *_) = engine.run_pilots(Arguments(prompts[:1], config, seed=0), 32)
    pilot.beta = config.beta * spread(pilot)
    low, high = min(pilot.finals) - 40 * pilot.beta, max(pilot.finals) + 40 * pilot.beta
    for _ in range(60):
        set_target(pilot, config, (low + high) / 2)
        low, high = (pilot.target, high) if expected_acceptance(pilot, config) > wanted else (low, pilot.target)
    return config.replace(target_reward=pilot.target, beta=pilot.beta)


def total(speeds: list[float]) -> float:
    """Tokens per second over rounds of equally many tokens."""
    return statistics.harmonic_mean(speeds)


def report(result: dict) -> None:  # type: ignore[type-arg]
    """Print one batch size, ratios first."""
    print(f"batch {result['batch']}")
    for name, ratio in result["ratio"].items():
        speed = total(result["tokens_per_second"][name])
        attempts = result["attempts_per_segment"][name]
        print(f"  engine is {ratio:5.1f}x {name:22} ({speed:7.1f} accepted tokens/s, {attempts:.1f} attempts/segment)")


if __name__ == "__main__":
    main()

"""``python -m benchmarks.in_order``: what scoring in index order saves, on a small pair of random models.

Each setting runs with and without, in turn, in one engine. Texts, attempts and verdicts must be the same.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple

import torch
import typer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from stars_fast import StarsConfig, StarsEngine
from stars_fast.cli.console import stdout
from stars_fast.outputs import StarsOutput

_VOCAB, _PROMPT, _SLOTS, _ROWS = 512, 48, 60_000, 320


class Row(NamedTuple):
    """One setting."""

    candidates: int
    attempts: float  # a segment
    tokens: tuple[int, int]  # that the reward model encoded, at once and in order
    seconds: tuple[float, float]  # of this thread, median
    ratio: float  # median of the pairs' ratios


def engine(hidden: int, layers: int) -> StarsEngine:
    """A policy and a reward model of one shape."""
    shape: dict[str, Any] = {
        "vocab_size": _VOCAB,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": max(hidden // 64, 2),
        "num_key_value_heads": max(hidden // 128, 1),
        "max_position_embeddings": 2048,
        "initializer_range": 0.2 if hidden < 128 else 0.02,
    }
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_config(LlamaConfig(**shape)).eval()
    reward = AutoModelForSequenceClassification.from_config(LlamaConfig(num_labels=1, pad_token_id=0, **shape)).eval()
    return StarsEngine(policy, reward, reward_tokenizer="policy", kv_cache_tokens=_SLOTS, max_rows=_ROWS)


def measured(one: StarsEngine, batch: int, candidates: int, rounds: int, length: int) -> Iterator[Row]:
    """Targets at three quantiles of unguided rewards: more attempts a segment from one to the next."""
    prompts = torch.randint(10, _VOCAB, (batch, _PROMPT), generator=torch.Generator().manual_seed(1)).tolist()
    common = StarsConfig(segment_length=16, max_new_tokens=length, alpha=1.0, ignore_eos=True, candidates=candidates)
    unguided = one.generate(prompts, common, target_reward=-1e9, max_attempts=1, max_new_tokens=32, seed=0)
    rewards = sorted(segment.reward for row in unguided.segments for segment in row)
    for share in (0.5, 0.7, 0.85):
        target, beta = rewards[int(share * len(rewards))], 0.5 * statistics.pstdev(rewards)
        config = common.replace(target_reward=target, beta=beta)
        outputs: dict[bool, StarsOutput] = {}
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for turn in range(rounds):
            for in_order in (False, True) if turn % 2 else (True, False):
                one.core.in_order = in_order
                before = time.thread_time()
                outputs[in_order] = one.generate(prompts, config, seed=3)
                seconds[in_order].append(time.thread_time() - before)
        at_once, ordered = outputs[False], outputs[True]
        assert at_once.completions == ordered.completions
        looks = [[(s.attempts, s.accepted) for row in out.segments for s in row] for out in outputs.values()]
        assert looks[0] == looks[1]
        yield Row(
            candidates,
            statistics.fmean(attempts for attempts, _ in looks[0]),
            (at_once.stats["reward_tokens"], ordered.stats["reward_tokens"]),
            (statistics.median(seconds[False]), statistics.median(seconds[True])),
            statistics.median(b / a for a, b in zip(seconds[False], seconds[True], strict=True)),
        )


def run(
    hidden: Annotated[int, typer.Option(help="Width of both models.")] = 64,
    layers: Annotated[int, typer.Option(help="Layers of both.")] = 3,
    batch: Annotated[int, typer.Option(help="Prompts.")] = 64,
    rounds: Annotated[int, typer.Option(help="Runs of each.")] = 3,
    length: Annotated[int, typer.Option(help="Tokens of an answer.")] = 128,
    candidates: Annotated[str, typer.Option(help="Numbers of candidates, by commas.")] = "2,3,4",
) -> None:
    """Reward tokens and CPU seconds of one thread, scored at once and in order."""
    torch.set_num_threads(1)
    one = engine(hidden, layers)
    console, widths = stdout(), (3, 9, 15, 10, 6, 11, 9, 6)
    heads = ("M", "attempts", "tokens at once", "in order", "ratio", "s at once", "in order", "ratio")
    console.print(f"{layers} layers of {hidden}, {batch} prompts, answers of {length} tokens")
    console.print(" ".join(f"{head:>{width}}" for head, width in zip(heads, widths, strict=True)))
    for number in map(int, candidates.split(",")):
        for row in measured(one, batch, number, rounds, length):
            (whole, part), (slow, fast) = row.tokens, row.seconds
            counted = (f"{whole:,}", f"{part:,}", f"{part / whole:.2f}")
            cells = (number, f"{row.attempts:.1f}", *counted, f"{slow:.2f}", f"{fast:.2f}", f"{row.ratio:.2f}")
            console.print(" ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))


if __name__ == "__main__":
    typer.run(run)

"""What tells the mean reward of a prefix's candidates beforehand: its reward, or the policy's hidden state as well?

``python -m benchmarks.prefixes --prompts imdb_prompts.jsonl [--count 96] [--json FILE]``, on the demo models. Histories
are those that `stars_fast.fit` learns from. Ridge regression on either, by segment; a tenth of the prompts is left out
at a time, and the penalty is chosen in the same way among the others. "left" is the standard deviation of means between
prefixes that a forecast leaves (their sampling noise subtracted), in spreads of the candidates within a prefix: what a
fit calls ``between``.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.stopping import engine_for, openings
from stars_fast import StarsConfig, StarsEngine
from stars_fast.calibration.fitting import _AMONG, _History
from stars_fast.inputs.arguments import Arguments

PENALTIES = 10.0 ** np.arange(-1, 7)


@torch.no_grad()
def prefixes(engine: StarsEngine, prompts: list[str], config: StarsConfig, samples: int) -> list[dict[str, Any]]:
    """By prefix: prompt, segment, reward before, hidden state at its last token, rewards of its candidates."""
    rows, model = [], engine.policy.model
    for among in _AMONG:
        method = _History(config.chosen_method, samples, among or samples)
        output = engine.run(Arguments(prompts, config.replace(method=method), seed=0, on_error="raise", trace=True))
        for place, segments in enumerate(output.segments):
            ids = engine.tokenizer(prompts[place])["input_ids"]
            whole = torch.tensor([ids + [token for segment in segments for token in segment.tokens]])
            states = model(whole, output_hidden_states=True).hidden_states[-1][0]
            before, at = 0.0, len(ids)
            for index, segment in enumerate(segments):
                rewards = [candidate.reward for candidate in segment.candidates or ()]
                rows.append({"prompt": place, "segment": index, "before": before, "rewards": rewards})
                rows[-1]["state"] = states[at - 1].numpy()
                before, at = segment.reward, at + len(segment.tokens)
    return rows


def ridge(x: np.ndarray, y: np.ndarray, groups: np.ndarray, folds: int = 10) -> np.ndarray:
    """Forecasts of y ``[n]`` from x ``[n, d]``, of each group by the others."""
    told = np.zeros(len(y))
    for fold in range(folds):
        out = groups % folds == fold
        inner, best = groups[~out], (math.inf, 0.0)
        for penalty in PENALTIES:
            errors = [
                (_line(x[~out][inner % 5 != part], y[~out][inner % 5 != part], penalty, x[~out][inner % 5 == part])
                 - y[~out][inner % 5 == part]) ** 2
                for part in range(5)
            ]  # fmt: skip
            best = min(best, (float(np.concatenate(errors).mean()), penalty))
        told[out] = _line(x[~out], y[~out], best[1], x[out])
    return told


def _line(x: np.ndarray, y: np.ndarray, penalty: float, at: np.ndarray) -> np.ndarray:
    """Ridge on standardised columns; the first one, the reward before, is not penalised."""
    mean, scale = x.mean(0), x.std(0) + 1e-9
    z = (x - mean) / scale
    weights = np.full(x.shape[1], penalty)
    weights[0] = 1e-6
    slope = np.linalg.solve(z.T @ z + np.diag(weights), z.T @ (y - y.mean()))
    return y.mean() + (at - mean) / scale @ slope


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines with `text`")
    parser.add_argument("--count", type=int, default=96)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = StarsConfig(max_new_tokens=64, segment_length=16, top_k=50, max_attempts=args.samples)
    rows = prefixes(engine_for("films", None), openings(args.prompts, 0, args.count), config, args.samples)
    found = []
    print("| segment | prefixes | R2, reward | R2, reward and state | left, reward | left, reward and state |")
    print("|---|---|---|---|---|---|")
    for segment in range(1 + max(row["segment"] for row in rows)):
        here = [row for row in rows if row["segment"] == segment]
        rewards, groups = np.array([row["rewards"] for row in here]), np.array([row["prompt"] for row in here])
        before, states = np.array([[row["before"]] for row in here]), np.array([row["state"] for row in here])
        means, within = rewards.mean(1), float(rewards.var(1, ddof=1).mean())
        noise = within / rewards.shape[1]
        explained, left = [], []
        for x in (before, np.hstack([before, states])):
            error = float(((ridge(x, means, groups) - means) ** 2).mean())
            explained.append(1 - error / float(means.var()))
            left.append(math.sqrt(max(error - noise, 0.0) / within))
        found.append({"segment": segment, "prefixes": len(here), "explained": explained, "left": left})
        print(f"| {segment} | {len(here)} |", " | ".join(f"{v:.2f}" for v in explained + left), "|", flush=True)
    if args.json:
        args.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()

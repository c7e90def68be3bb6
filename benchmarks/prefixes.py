"""What a fit needs, found by replay: candidates drawn once are looked at in order under one fit after another.

    python -m benchmarks.prefixes films --prompts imdb_prompts.jsonl --histories films.pkl
    python -m benchmarks.prefixes films --prompts imdb_prompts.jsonl --histories films.pkl --elsewhere stories.pkl

Histories are those that `stars_fast.fit` learns from: 16 candidates behind each prefix, of three answers a prompt. A
quarter of the prompts at a time is replayed under fits made on others. What a segment gains over its prefix is compared
with what the best of the first n gains on the same candidates, at equal numbers of candidates, with 95 % intervals over
prompts.

Then, what tells the mean reward of a prefix's candidates beforehand: its reward, or the policy's hidden state as well?
Ridge regression; a tenth of the prompts is left out at a time, and the penalty is chosen in the same way among the
others. "left" is the standard deviation of means between prefixes that a forecast leaves (their sampling noise
subtracted), in spreads of the candidates within a prefix.
"""

from __future__ import annotations

import argparse
import json
import math
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.stopping import engine_for, normal, openings
from stars_fast import StarsConfig, StarsEngine
from stars_fast.calibration.fitting import _AMONG, _groups, _History
from stars_fast.inputs.arguments import Arguments
from stars_fast.methods import OptimalStopping
from stars_fast.methods.fit import Fit, Group, learn

SAMPLES, FOLDS, LADDER, BUDGETS, PENALTIES = (
    16,
    4,
    (1, 2, 3, 4, 6, 8, 12, 16),
    (2.0, 4.0, 8.0),
    10.0 ** np.arange(-1, 7),
)
Answer = tuple[int, list[Group], np.ndarray]  # prompt, prefixes, hidden states of the prefixes' last tokens [n, H]


@torch.no_grad()
def histories(engine: StarsEngine, prompts: list[str], config: StarsConfig) -> list[Answer]:
    answers, model = [], engine.policy.model
    for among in _AMONG:
        method = _History(config.chosen_method, SAMPLES, among or SAMPLES)
        output = engine.run(Arguments(prompts, config.replace(method=method), seed=0, on_error="raise", trace=True))
        for place, segments in enumerate(output.segments):
            ids = engine.tokenizer(prompts[place])["input_ids"]
            whole = torch.tensor([ids + [token for segment in segments for token in segment.tokens]])
            ends = len(ids) - 1 + np.cumsum([0] + [len(segment.tokens) for segment in segments[:-1]])
            states = model(whole, output_hidden_states=True).hidden_states[-1][0, ends]
            answers.append((place, list(_groups(segments, among or SAMPLES)), states.numpy()))
    return answers


def replayed(answers: Sequence[Answer], known: Fit | None, budget: float) -> list[tuple[int, int, float]]:
    """By prefix: its prompt, how many of its candidates are looked at, and what the best of these gains."""
    seen, method, segments = [], OptimalStopping(budget), max(len(groups) for _, groups, _ in answers)
    for prompt, groups, _ in answers:
        asked = method.search(known, 20, segments)
        for group in groups:
            asked.begin(group.segment, group.before if group.segment else None)
            for count, reward in enumerate(group.rewards, 1):
                asked.see(reward)
                if max(group.rewards[:count]) >= asked.threshold:
                    break
            seen.append((prompt, count, max(group.rewards[:count]) - group.before))
    return seen


def compared(answers: Sequence[Answer], fit_without: Callable[[set[int]], Fit | None], budget: float) -> dict[str, Any]:
    """Candidates a segment, and the gain over the first candidate relative to that of best-of-n, with its interval."""
    seen, prompts = [], 1 + max(prompt for prompt, _, _ in answers)
    for fold in range(FOLDS):
        held = {prompt for prompt in range(prompts) if prompt % FOLDS == fold}
        seen += replayed([one for one in answers if one[0] in held], fit_without(held), budget)
    sums = np.zeros((prompts, 3 + len(LADDER)))  # by prompt: prefixes, candidates, gain, gain of best-of-n
    for prompt, count, gain in seen:
        sums[prompt, :3] += 1, count, gain
    for prompt, groups, _ in answers:
        for group in groups:
            sums[prompt, 3:] += [max(group.rewards[:n]) - group.before for n in LADDER]

    def relative(chosen: np.ndarray) -> float:
        of, count, gain, *ladder = sums[chosen].sum(0)
        equal = np.interp(math.log(count / of), np.log(LADDER), ladder)
        return float((gain - ladder[0]) / (equal - ladder[0]))

    draws = np.random.default_rng(0).integers(prompts, size=(1000, prompts))
    low, high = np.quantile([relative(draw) for draw in draws], (0.025, 0.975))
    spent = float(sums[:, 1].sum() / sums[:, 0].sum())
    return {"budget": budget, "spent": spent, "relative": relative(np.arange(prompts)), "low": low, "high": high}


def told(x: np.ndarray, y: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """Forecasts of y ``[n]`` from x ``[n, d]``, those of a prompt by the others."""
    values = np.zeros(len(y))
    for fold in range(10):
        out = prompts % 10 == fold
        xs, ys, parts = x[~out], y[~out], prompts[~out] // 10 % 5
        errors = [
            sum(
                ((_ridge(xs[parts != p], ys[parts != p], w, xs[parts == p]) - ys[parts == p]) ** 2).sum()
                for p in range(5)
            )
            for w in PENALTIES
        ]
        values[out] = _ridge(xs, ys, float(PENALTIES[int(np.argmin(errors))]), x[out])
    return values


def _ridge(x: np.ndarray, y: np.ndarray, penalty: float, at: np.ndarray) -> np.ndarray:
    """On standardised columns; the first one, the reward before, is not penalised."""
    mean, scale = x.mean(0), x.std(0) + 1e-9
    z, weights = (x - mean) / scale, np.full(x.shape[1], penalty)
    weights[0] = 1e-6
    return np.asarray(
        y.mean() + (at - mean) / scale @ np.linalg.solve(z.T @ z + np.diag(weights), z.T @ (y - y.mean()))
    )


def forecasts(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """By segment, what the reward tells alone and with the state: shares explained, and what is left."""
    found = []
    for segment in range(1 + max(group.segment for _, groups, _ in answers for group in groups)):
        here = [
            (p, g, s)
            for p, groups, states in answers
            for g, s in zip(groups, states, strict=True)
            if g.segment == segment
        ]
        prompts, before = np.array([p for p, _, _ in here]), np.array([[g.before] for _, g, _ in here])
        rewards, states = np.array([g.rewards for _, g, _ in here]), np.array([s for _, _, s in here])
        means, within = rewards.mean(1), float(rewards.var(1, ddof=1).mean())
        errors = [float(((told(x, means, prompts) - means) ** 2).mean()) for x in (before, np.hstack([before, states]))]
        found.append(
            {
                "segment": segment,
                "explained": [1 - error / float(means.var()) for error in errors],
                "left": [math.sqrt(max(error - within / SAMPLES, 0.0) / within) for error in errors],
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["films", "chance", "words"])
    parser.add_argument(
        "--histories", type=Path, required=True, help="where they are kept; drawn if they are not there"
    )
    parser.add_argument("--prompts", type=Path, help="JSON lines with `text`")
    parser.add_argument("--elsewhere", type=Path, help="histories of another domain, to fit on as well")
    parser.add_argument("--column", default="text", help="of the texts")
    parser.add_argument("--count", type=int, default=96, help="prompts")
    parser.add_argument("--sizes", type=int, nargs="*", default=[8, 24, 72], help="prompts that fits are made on")
    parser.add_argument("--segment-length", type=int, default=16)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.histories.exists():
        config = StarsConfig(max_new_tokens=64, segment_length=args.segment_length, top_k=50)
        prompts = openings(args.prompts, 0, args.count, args.column)
        args.histories.write_bytes(pickle.dumps(histories(engine_for(args.task, None), prompts, config)))
    answers: list[Answer] = pickle.loads(args.histories.read_bytes())

    def fitted(size: int) -> Callable[[set[int]], Fit]:
        def fit(held: set[int]) -> Fit:
            prompts = sorted({prompt for prompt, _, _ in answers} - held)[:size]
            return learn([group for prompt, groups, _ in answers if prompt in prompts for group in groups], {}, {})

        return fit

    prompts = len({prompt for prompt, _, _ in answers}) * (FOLDS - 1) // FOLDS
    sizes = [size for size in args.sizes if size <= prompts]
    ways: dict[str, Callable[[set[int]], Fit | None]] = {f"fit on {size}": fitted(size) for size in sizes}
    ways[f"fit on {min(24, prompts)}, normal shape"] = lambda held: normal(fitted(24)(held))
    ways["no fit"] = lambda held: None
    if args.elsewhere:
        elsewhere = learn([g for _, groups, _ in pickle.loads(args.elsewhere.read_bytes()) for g in groups], {}, {})
        ways["fit elsewhere"] = lambda held: elsewhere
    print("| | budget | spent | gain / best-of-n's at equal candidates |\n|---|---|---|---|")
    found = [{"way": name} | compared(answers, way, budget) for name, way in ways.items() for budget in BUDGETS]
    for row in found:
        print("| {way} | {budget:g} | {spent:.2f} | {relative:.3f} ({low:.3f} to {high:.3f}) |".format(**row))
    print("\n| segment | R2: reward | reward and state | left: reward | reward and state |\n|---|---|---|---|---|")
    beforehand = forecasts(answers)
    for row in beforehand:
        print(f"| {row['segment']} |", " | ".join(f"{v:.2f}" for v in row["explained"] + row["left"]), "|")
    if args.json:
        args.json.write_text(json.dumps({"replays": found, "forecasts": beforehand}))


if __name__ == "__main__":
    main()

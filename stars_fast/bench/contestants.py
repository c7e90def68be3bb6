"""Who competes at one workload, each as a function of a seed that does all of it once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, pvariance
from typing import Any, NamedTuple

from stars_fast.bench import baselines
from stars_fast.bench.equal_reward import EqualReward, smallest_n
from stars_fast.bench.models import Pair
from stars_fast.bench.workload import Workload
from stars_fast.config import StarsConfig
from stars_fast.engine import StarsEngine
from stars_fast.outputs import StarsOutput

ENGINE, ONE, PLAIN, STRONG, BEST = "engine", "one candidate", "plain", "strong", "best of N"
ACCEPTING, GENERATE = "accepting engine", "generate"
# Whose speed that of each is compared with.
BESIDE = dict.fromkeys((ENGINE, ONE, PLAIN, STRONG, BEST), ENGINE) | dict.fromkeys((ACCEPTING, GENERATE), ACCEPTING)
GRAPHED = (ENGINE, ONE, ACCEPTING)  # on CUDA devices: a graph's replay runs no module, so its passes are not counted
PLAIN_PROMPTS = 2  # in a round: its speed does not depend on how many there are, and all of them would take minutes
_REWARDS = 256  # texts of the engine from which its mean reward is taken


class Outcome(NamedTuple):
    """What one run returned."""

    tokens: int
    texts: int
    segments: int  # 0 where the texts were not chosen segment by segment
    attempts: int  # candidates looked at
    reward: float  # mean over the texts; NaN where none was asked


Contestant = Callable[[int], Outcome]


@dataclass
class Point:
    """A workload with its models, its target, and the contestants that run there."""

    workload: Workload
    config: StarsConfig
    contestants: dict[str, Contestant]
    equal_reward: EqualReward | None = None


def point(pair: Pair, engine: StarsEngine, workload: Workload, config: StarsConfig, names: Iterable[str]) -> Point:
    """Prepare what runs; for ``best of N`` this draws the texts that say how large N must be."""
    prompts, names = pair.prompts(workload.batch, workload.prompt_length), list(names)
    models, goals = (pair.policy, pair.reward), baselines.targets(config, len(prompts))
    equal = _equal_reward(pair, engine, prompts, config) if BEST in names else None

    def run_plain(seed: int) -> Outcome:
        count = min(len(prompts), PLAIN_PROMPTS)
        chosen = [(seed * count + i) % len(prompts) for i in range(count)]
        own = {i: config.replace(target_reward=goals[i]) for i in chosen}
        return _of_texts([baselines.plain(*models, prompts[i], own[i], set()) for i in chosen])

    def run_best(seed: int) -> Outcome:
        assert equal is not None
        texts = baselines.best_of_n(*models, prompts, config, set(), equal.n, engine.max_rows)
        return _of_texts(texts)._replace(segments=0, attempts=0)

    def run_generate(seed: int) -> Outcome:
        rows = baselines.generate_batch(pair.policy, prompts, config.max_new_tokens, config, set())
        return Outcome(sum(map(len, rows)), len(rows), 0, 0, math.nan)

    accepting = StarsEngine(pair.policy, accept_everything, max_rows=engine.max_rows) if ACCEPTING in names else engine
    lenient = config.replace(target_reward=0.0)
    every: dict[str, Contestant] = {
        ENGINE: lambda seed: _of_output(engine.generate(prompts, config, seed=seed, on_error="raise")),
        ONE: lambda seed: _of_output(engine.generate(prompts, config, candidates=1, seed=seed, on_error="raise")),
        PLAIN: run_plain,
        STRONG: lambda seed: _of_texts(baselines.strong(*models, prompts, config, set())),
        BEST: run_best,
        ACCEPTING: lambda seed: _of_output(accepting.generate(prompts, lenient, seed=seed, on_error="raise")),
        GENERATE: run_generate,
    }
    return Point(workload, config, {name: every[name] for name in names}, equal)


def accept_everything(completions: Sequence[Any]) -> list[float]:
    """A callable reward that rejects nothing where the target is 0."""
    return [0.0] * len(completions)


def _of_output(out: StarsOutput) -> Outcome:
    segments = [segment for row in out.segments for segment in row]
    attempts = sum(segment.attempts for segment in segments)
    return Outcome(out.stats["committed_tokens"], len(out.rewards), len(segments), attempts, fmean(out.rewards))


def _of_texts(texts: Sequence[baselines.Text]) -> Outcome:
    return Outcome(
        sum(len(text.tokens) for text in texts),
        len(texts),
        sum(text.segments for text in texts),
        sum(text.attempts for text in texts),
        fmean(text.reward for text in texts),
    )


def _equal_reward(pair: Pair, engine: StarsEngine, prompts: Sequence[list[int]], config: StarsConfig) -> EqualReward:
    """N for these prompts, from the engine's mean reward over at least ``_REWARDS`` texts of them."""
    samples = max(-(-_REWARDS // len(prompts)), 2)
    out = engine.generate(list(prompts), config, num_return_sequences=samples, seed=0, on_error="raise")

    def draw(count: int) -> list[list[float]]:
        contexts = [prompt for prompt in prompts for _ in range(count)]
        texts = baselines.scored_texts(pair.policy, pair.reward, contexts, config, set(), engine.max_rows)
        rewards = [reward for _, reward in texts]
        return [rewards[i : i + count] for i in range(0, len(rewards), count)]

    own = [out.rewards[i : i + samples] for i in range(0, len(out.rewards), samples)]
    error = math.sqrt(fmean(map(pvariance, own)) / max(len(out.rewards) - len(own), 1))  # the prompts are given
    return smallest_n(fmean(out.rewards), error, draw)

"""Heartbeats and whole generations, and what must stay faster than what. Limits catch losses, not noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from stars_fast import StarsEngine
from stars_fast.bench.contestants import ACCEPTING, ENGINE, GENERATE, ONE, STRONG, Point, point
from stars_fast.bench.models import Pair, random_pair
from stars_fast.bench.workload import Pilots, Workload

from .conftest import Report
from .limits import alternating, clocked

SIZES = ("1m", "27m")


@pytest.fixture(scope="module", params=SIZES)
def pair(request: pytest.FixtureRequest) -> Pair:
    return random_pair(request.param, torch.float32, torch.device("cpu"))


def _heartbeat(pair: Pair, requests: int, candidates: int) -> Callable[[], Any]:
    """A call whose texts are one segment long and accepted at once: one heartbeat, and the prefill of short prompts."""
    engine = StarsEngine(pair.policy, pair.reward, reward_tokenizer="policy")
    prompts = pair.prompts(requests, 16)
    fields = {"target_reward": -math.inf, "max_new_tokens": 16, "segment_length": 16, "ignore_eos": True}
    return lambda: engine.generate(prompts, seed=0, candidates=candidates, max_attempts=candidates, **fields)


def _point(pair: Pair, batch: int) -> Point:
    engine, load = (
        StarsEngine(pair.policy, pair.reward, reward_tokenizer="policy"),
        Workload(batch=batch, max_new_tokens=32),
    )
    return point(pair, engine, load, Pilots(pair, engine).config(load), (ENGINE, ONE, STRONG, ACCEPTING, GENERATE))


@pytest.mark.parametrize(("requests", "candidates"), [(1, 1), (1, 8), (8, 4)])
def test_heartbeat(benchmark: BenchmarkFixture, pair: Pair, requests: int, candidates: int) -> None:
    benchmark.group = f"heartbeat, {pair.name}"
    benchmark.pedantic(_heartbeat(pair, requests, candidates), rounds=5, warmup_rounds=1)


def test_eight_candidates_cost_less_than_eight_heartbeats(pair: Pair, report: Report) -> None:
    eight, one = (clocked(_heartbeat(pair, 1, candidates)) for candidates in (8, 1))
    about = f"{pair.name}: a heartbeat of 8 candidates"
    report.require(alternating((about, eight), ("8 of one", lambda: 8 * one()), 1.2, rounds=5))


@pytest.mark.parametrize("batch", [1, 16])
def test_generation(benchmark: BenchmarkFixture, pair: Pair, batch: int) -> None:
    run, seeds = _point(pair, batch).contestants[ENGINE], iter(range(1, 100))
    benchmark.group = f"generation of 32 tokens, {pair.name}"
    benchmark.pedantic(lambda: run(next(seeds)), rounds=3, warmup_rounds=1)


# How many times as fast as another in accepted tokens per second; the goals are higher, and `stars-fast bench` tells.
@pytest.mark.parametrize(
    ("faster", "slower", "at_least"), [(ENGINE, ONE, 1.2), (ENGINE, STRONG, 1.0), (ACCEPTING, GENERATE, 0.7)]
)
def test_the_engine_stays_ahead_at_batch_16(
    pair: Pair, faster: str, slower: str, at_least: float, report: Report
) -> None:
    found = _point(pair, 16)

    def per_token(name: str) -> tuple[str, Callable[[], float]]:
        seeds = iter(range(100))

        def seconds() -> float:
            tokens = 0

            def run() -> None:
                nonlocal tokens
                tokens = found.contestants[name](next(seeds)).tokens

            return clocked(run)() / tokens

        return f"{pair.name}, batch 16, a token of {name}", seconds

    report.require(alternating(per_token(faster), per_token(slower), at_least, rounds=3))

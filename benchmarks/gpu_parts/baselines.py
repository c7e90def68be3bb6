"""What the engine is compared with in the same run: transformers' ``generate``, and scripts built on it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from benchmarks.gpu_parts.heartbeats import PROMPT, REPEATS, RESPONSE, workload
from benchmarks.gpu_parts.models import pair, pilots
from benchmarks.gpu_parts.runner import Runner
from benchmarks.roofline import renewal
from stars_fast import StarsEngine
from stars_fast.bench.baselines import generate_batch, plain, strong
from stars_fast.bench.contestants import accept_everything
from stars_fast.bench.workload import Workload
from stars_fast.bench.yardsticks import synchronize

_ACCEPTANCES = (0.3, 0.15, 0.5)


def compare_unguided(runner: Runner) -> None:
    """An engine whose reward accepts everything beside ``generate``: both keep every token. In turns, three times."""
    models = pair(runner)
    load = workload(runner, 4 if runner.tiny else 64, 0.3, response=64)
    prompts, config = models.prompts(load.batch, load.prompt_length), load.config().replace(target_reward=0.0)
    engine = StarsEngine(models.policy, accept_everything)
    contestants: dict[str, Callable[[], Any]] = {
        "engine": lambda: engine.generate(prompts, config, seed=0, on_error="raise"),
        "generate": lambda: generate_batch(models.policy, prompts, load.max_new_tokens, config, set()),
    }
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(REPEATS + 1):
        for name, spent in taken.items():
            if not runner.time_for(4):
                return
            _, seconds = _timed(runner, contestants[name])
            spent += [seconds] if turn else []  # the first compiles and captures
    runner.add(
        "unguided",
        pair=models.name,
        batch=load.batch,
        tokens=load.max_new_tokens,
        engine_seconds=taken["engine"],
        generate_seconds=taken["generate"],
        over_generate=[theirs / ours for ours, theirs in zip(*taken.values(), strict=True)],
    )


def compare_scripts(runner: Runner) -> None:
    """``plain`` (one prompt and one attempt at a time) and ``strong`` (batched): one segment at the mean context."""
    _compare_plain(runner, _one_segment(runner, 1, _ACCEPTANCES[0]))
    for acceptance in _ACCEPTANCES[:1] if runner.tiny else _ACCEPTANCES:
        _compare_strong(runner, _one_segment(runner, 4 if runner.tiny else 64, acceptance))


def _compare_plain(runner: Runner, load: Workload) -> None:
    """What an attempt takes does not depend on how many are accepted, so that one measurement gives the rate at each
    acceptance; and the rate does not depend on the batch.
    """
    if not runner.time_for(6):
        return
    models, driven = pair(runner), pilots(runner)
    (prompt,), config = models.prompts(1, load.prompt_length), driven.config(load)
    with runner.guarded("plain"):
        plain(models.policy, models.reward, prompt, config.replace(max_attempts=1, max_new_tokens=2), set())
        per_attempt, ends = list[float](), time.time() + 5
        while len(per_attempt) < REPEATS and time.time() < ends:
            text, seconds = _timed(runner, lambda: plain(models.policy, models.reward, prompt, config, set()))
            per_attempt.append(seconds / text.attempts)
        for acceptance in _ACCEPTANCES:
            attempts = renewal(acceptance, 1, config.max_attempts).heartbeats
            rates = [load.segment_length / (attempts * seconds) for seconds in per_attempt]
            _add(runner, "plain", replace(load, acceptance=acceptance), rates)


def _compare_strong(runner: Runner, load: Workload) -> None:
    """Batched ``generate``, and whole texts scored. One run: the spread of the ratio is the engine's."""
    if not runner.time_for(15):
        return
    models, driven = pair(runner), pilots(runner)
    prompts, config = models.prompts(load.batch, load.prompt_length), driven.config(load)
    with runner.guarded(f"strong, {load.acceptance:.0%} wanted"):
        strong(models.policy, models.reward, prompts, config.replace(max_attempts=1, max_new_tokens=2), set())
        texts, seconds = _timed(runner, lambda: strong(models.policy, models.reward, prompts, config, set()))
        rounds = max(text.attempts for text in texts)
        _add(runner, "strong", load, [sum(len(text.tokens) for text in texts) / seconds], rounds=rounds)


def _add(runner: Runner, kind: str, load: Workload, rates: list[float], **fields: Any) -> None:
    """A baseline's accepted tokens per second, and how many times that the engine makes at batch 64."""
    rate = sum(rates) / len(rates)
    wanted = {"batch": 4 if runner.tiny else 64, "wanted": load.acceptance, "candidates": "auto"}
    engine = next((row for row in runner.rows("engine") if wanted.items() <= row.items()), {})
    ours = engine.get("repeats_milliseconds", [])
    mean = engine.get("milliseconds", 0.0)
    runner.add(
        kind,
        pair=runner.pair,
        batch=load.batch,
        segment=load.segment_length,
        wanted=load.acceptance,
        tokens_per_second=rate,
        repeats_tokens_per_second=rates,
        engine_over=[engine["tokens_per_second"] * mean / one / rate for one in ours],
        **fields,
    )


def _one_segment(runner: Runner, batch: int, acceptance: float) -> Workload:
    """What is left of a workload for programs that take as long for each segment: one, in the middle of the answer."""
    load = workload(runner, batch, acceptance)
    context = 8 if runner.tiny else PROMPT + (RESPONSE - load.segment_length) // 2
    return replace(load, prompt_length=context, max_new_tokens=load.segment_length)


def _timed(runner: Runner, call: Any) -> tuple[Any, float]:
    synchronize(runner.device)
    started = time.perf_counter()
    result = call()
    synchronize(runner.device)
    return result, time.perf_counter() - started

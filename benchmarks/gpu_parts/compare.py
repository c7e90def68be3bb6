"""The engine beside itself at one candidate, the baselines and ``generate``: accepted tokens per second."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import Any

import torch
from baselines import plain, strong
from micro.timing import in_table
from transformers import GenerationConfig

from gpu_parts.heartbeats import PROMPT, RESPONSE, engine, figures, guided, pilot, run_engine, synchronize
from gpu_parts.models import Pair, pair
from gpu_parts.runner import Runner
from stars_fast.bench.yardsticks import rates
from stars_fast.roofline import GPUS, Achievable, Gpu, Workload, best_candidates, heartbeat, renewal

# Of a copy's bandwidth and a large product's rate, as measured here. On an H200 these are the 0.85 of its data sheet's
# bandwidth and the 600 TFLOP/s that the roofline takes for achievable.
REACHABLE = Achievable(bandwidth=0.95, matrix=0.77)
BEATS = {64: 8, 16: 16, 1: 40}  # steady heartbeats to see, by batch size


def machine(runner: Runner) -> Gpu:
    """This device with the rates that it has shown; measured when first asked for."""
    if "machine" not in runner.shared:
        known = runner.rows("rates")
        if not known:
            found = rates(runner.device)
            sheet = in_table(runner.device)
            known = [
                runner.add(
                    "rates",
                    copy=found.copy,
                    matrix=found.matrix,
                    of_data_sheet=found.copy / sheet.bandwidth if sheet else None,
                )
            ]
        table = in_table(runner.device) or GPUS["h200"]
        runner.shared["machine"] = replace(table, bandwidth=known[0]["copy"], matrix_rate=known[0]["matrix"])
    return runner.shared["machine"]


def expectation(
    runner: Runner, models: Pair, batch: int, segment: int, acceptance: float, context: float, candidates: int | None
) -> dict[str, Any]:
    """What the roofline expects of heartbeats without a prefill; with the best number of candidates where None."""
    context = max(context, 2.0)
    workload = Workload(batch, segment, min(max(acceptance, 0.01), 1.0), context, response=int(context))
    costs, gpu = (models.policy_cost, models.reward_cost), machine(runner)
    if candidates is None:
        candidates = best_candidates(*costs, workload, gpu, REACHABLE).candidates
    found = heartbeat(*costs, workload, candidates, gpu, REACHABLE)
    stages = {stage.name: stage.achievable_s for stage in found.stages if stage.name != "refill"}
    seconds = sum(stages.values())
    return {
        "candidates": candidates,
        "tokens_per_second": found.committed_tokens / seconds,
        "milliseconds": seconds * 1e3,
        "stages_milliseconds": {name: value * 1e3 for name, value in stages.items()},
    }


def compare_engine(
    runner: Runner,
    models: Pair,
    rewards: list[float],
    batch: int,
    segment: int,
    acceptance: float,
    seconds: float,
    remark: str = "",
) -> None:
    """The engine as it chooses, with the roofline's candidates, and with one."""
    length, response = (8, 4 * segment) if runner.tiny else (PROMPT, max(RESPONSE, 4 * segment))
    prompts, config = models.prompts(batch, length), guided(rewards, acceptance, segment, response)
    best = expectation(runner, models, batch, segment, acceptance, length + response / 2, None)["candidates"]
    for contestant in ("auto", best, 1) if best > 1 else ("auto", 1):
        if not runner.time_for(0.5 * seconds):
            return
        wanted = 2 if runner.tiny else BEATS[batch]
        with runner.guarded(f"engine, batch {batch}, candidates {contestant}"):
            watch = run_engine(runner, engine(runner, models), prompts, config, contestant, wanted, seconds)
            found = figures(watch, batch, segment)
            chosen = None if contestant == "auto" else contestant
            expected = {}
            if found["beats"]:
                expected = expectation(runner, models, batch, segment, found["acceptance"], found["context"], chosen)
            runner.add(
                "engine",
                pair=models.name + remark,
                batch=batch,
                segment=segment,
                wanted=acceptance,
                candidates=contestant,
                **found,
                expected=expected,
            )


def compare_strong(
    runner: Runner, models: Pair, rewards: list[float], batch: int, segment: int, acceptance: float
) -> None:
    """The batched baseline, for one segment of every prompt, at the engine's mean context."""
    if not runner.time_for(0 if runner.tiny else 12 if batch > 1 else 4):
        return
    prompts, config = models.prompts(batch, _context(runner, segment)), guided(rewards, acceptance, segment, segment)
    with runner.guarded(f"strong, batch {batch}"):
        strong(models.policy, models.reward, prompts, config.replace(max_attempts=1, max_new_tokens=2), set())
        texts, seconds = _timed(runner, lambda: strong(models.policy, models.reward, prompts, config, set()))
        runner.add(
            "strong",
            pair=models.name,
            batch=batch,
            segment=segment,
            wanted=acceptance,
            **_cost(texts, seconds),
            rounds=max(text.attempts for text in texts),
        )


def compare_plain(
    runner: Runner, models: Pair, rewards: list[float], segment: int, acceptances: tuple[float, ...]
) -> None:
    """A few attempts of the baseline that takes one prompt and one attempt at a time.

    What an attempt takes does not depend on how many are accepted, so that one measurement gives the rate at each
    acceptance; and the rate does not depend on the batch.
    """
    if not runner.time_for(0 if runner.tiny else 6):
        return
    prompt, config = models.prompts(1, _context(runner, segment))[0], guided(rewards, acceptances[0], segment, segment)
    texts: list[Any] = []
    with runner.guarded("plain"):
        plain(models.policy, models.reward, prompt, config.replace(max_attempts=1, max_new_tokens=2), set())
        ends, seconds = time.time() + 4, 0.0
        while sum(text.attempts for text in texts) < 6 and time.time() < ends:
            text, taken = _timed(runner, lambda: plain(models.policy, models.reward, prompt, config, set()))
            texts.append(text)
            seconds += taken
        cost = _cost(texts, seconds)
        for acceptance in acceptances:
            attempts = renewal(acceptance, 1, config.max_attempts).heartbeats
            rate = segment / (attempts * seconds / cost["attempts"])
            fields = {"pair": models.name, "batch": 1, "segment": segment, "wanted": acceptance}
            runner.add("plain", **fields, **{**cost, "tokens_per_second": rate})


def _context(runner: Runner, segment: int) -> int:
    return 8 if runner.tiny else PROMPT + (RESPONSE - segment) // 2


def compare_generate(runner: Runner, models: Pair, batch: int) -> None:
    """transformers' ``generate``, unguided: every token is kept."""
    if not runner.time_for(0 if runner.tiny else 4):
        return
    tokens = 4 if runner.tiny else 32
    ids = torch.tensor(models.prompts(batch, 8 if runner.tiny else PROMPT), device=runner.device)

    def run(count: int) -> float:
        settings = GenerationConfig(
            do_sample=True, top_k=0, max_new_tokens=count, eos_token_id=[models.vocab], pad_token_id=0
        )
        mask = torch.ones_like(ids)
        return _timed(runner, lambda: models.policy.generate(ids, attention_mask=mask, generation_config=settings))[1]

    with runner.guarded(f"generate, batch {batch}"):
        run(2)
        first, whole = run(1), run(tokens + 1)
        step = (whole - first) / tokens
        rate = batch / step
        runner.add("generate", pair=models.name, batch=batch, tokens_per_second=rate, milliseconds_per_step=step * 1e3)


def compare_segments(runner: Runner, name: str, segments: tuple[int, ...], batch: int, acceptance: float) -> None:
    """Other segment lengths."""
    models = pair(runner, name)
    for segment in segments:
        if runner.time_for(0 if runner.tiny else 6):
            rewards = pilot(engine(runner, models), models, segment, runner.tiny)
            compare_engine(runner, models, rewards, batch, segment, acceptance, 5.0)


def compare_pair(
    runner: Runner,
    name: str,
    segment: int,
    batches: tuple[int, ...],
    acceptances: tuple[float, ...],
) -> None:
    """Everything about one pair of models; the first batch and acceptance with all contestants come first."""
    started = time.time()
    models = pair(runner, name)
    rewards = pilot(engine(runner, models), models, segment, runner.tiny)
    runner.add(
        "pair",
        pair=name,
        seconds_to_start=time.time() - started,
        rewards=len(rewards),
        rewards_deviation=statistics.pstdev(rewards),
    )
    first, acceptance = batches[0], acceptances[0]
    compare_engine(runner, models, rewards, first, segment, acceptance, 10.0)
    compare_strong(runner, models, rewards, first, segment, acceptance)
    compare_plain(runner, models, rewards, segment, acceptances)
    compare_generate(runner, models, first)
    for batch in batches:
        if not runner.time_for(0 if runner.tiny else 4):
            return
        law = rewards
        if batch == 1:  # the rewards of one prompt have a law of their own
            law = pilot(engine(runner, models), models, segment, runner.tiny, prompts=1)
        for one in acceptances:
            if (batch, one) != (first, acceptance):
                compare_engine(runner, models, law, batch, segment, one, 5.0)
        if batch != first:
            compare_generate(runner, models, batch)
            compare_strong(runner, models, law, batch, segment, acceptance)
    for one in reversed(acceptances[1:]):
        compare_strong(runner, models, rewards, first, segment, one)


def _timed(runner: Runner, call: Any) -> tuple[Any, float]:
    synchronize(runner)
    started = time.perf_counter()
    result = call()
    synchronize(runner)
    return result, time.perf_counter() - started


def _cost(texts: list[Any], seconds: float) -> dict[str, Any]:
    tokens, attempts = (sum(count) for count in zip(*((len(t.tokens), t.attempts) for t in texts), strict=True))
    accepted = sum(segment.accepted for text in texts for segment in text.history)
    return {
        "tokens_per_second": tokens / seconds,
        "seconds": seconds,
        "attempts": attempts,
        "acceptance": accepted / attempts,
    }

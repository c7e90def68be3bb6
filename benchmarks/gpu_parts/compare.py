"""The engine beside itself at one candidate, the baselines and ``generate``: accepted tokens per second."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from benchmarks.gpu_parts.heartbeats import PROMPT, RESPONSE, figures, pilots, run_engine, workload
from benchmarks.gpu_parts.models import costs, pair
from benchmarks.gpu_parts.runner import Runner
from benchmarks.micro.timing import in_table
from benchmarks.roofline import GPUS, Achievable, Gpu, best_candidates, heartbeat, renewal
from benchmarks.roofline import Workload as WorkOnPaper
from stars_fast import StarsConfig
from stars_fast.bench.baselines import generate_batch, plain, strong
from stars_fast.bench.models import Pair
from stars_fast.bench.workload import Workload
from stars_fast.bench.yardsticks import rates, synchronize

# Of a copy's bandwidth and a large product's rate, as measured here. On an H200 these are the 0.85 of its data sheet's
# bandwidth and the 600 TFLOP/s that the roofline takes for achievable.
REACHABLE = Achievable(bandwidth=0.95, matrix=0.77)
BEATS = {64: 8, 16: 16, 1: 40}  # steady heartbeats to see, by batch size


def machine(runner: Runner) -> Gpu:
    """This device with the rates that it has shown; measured when first asked for."""
    if "machine" not in runner.shared:
        sheet = in_table(runner.device)
        known = runner.rows("rates")
        if not known:
            found = rates(runner.device)
            share = found.copy / sheet.bandwidth if sheet else None
            known = [runner.add("rates", copy=found.copy, matrix=found.matrix, of_data_sheet=share)]
        table = sheet or GPUS["h200"]
        runner.shared["machine"] = replace(
            table, bandwidth=known[0]["copy"], matrix_rate=known[0]["matrix"], achievable=REACHABLE
        )
    return runner.shared["machine"]


def expectation(
    runner: Runner, models: Pair, load: Workload, acceptance: float, context: float, candidates: int | None
) -> dict[str, Any]:
    """What the roofline expects of heartbeats without a prefill; with the best number of candidates where None."""
    context = max(context, 2.0)
    acceptance = min(max(acceptance, 0.01), 1.0)
    work = WorkOnPaper(load.batch, load.segment_length, acceptance, context, response=int(context), in_order=True)
    both, gpu = costs(models), machine(runner)
    if candidates is None:
        candidates = best_candidates(*both, work, gpu).candidates
    found = heartbeat(*both, work, candidates, gpu)
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
    load: Workload,
    seconds: float,
    remark: str = "",
) -> None:
    """The engine as it chooses, with the roofline's candidates, and with one."""
    driven, prompts = pilots(runner, models), models.prompts(load.batch, load.prompt_length)
    config, context = driven.config(load), load.prompt_length + load.max_new_tokens / 2
    best = expectation(runner, models, load, load.acceptance, context, None)["candidates"]
    for chosen in (None, best, 1) if best > 1 else (None, 1):
        if not runner.time_for(0.5 * seconds):
            return
        contestant, wanted = chosen or "auto", 2 if runner.tiny else BEATS[load.batch]
        with runner.guarded(f"engine, batch {load.batch}, candidates {contestant}"):
            watch = run_engine(runner, driven.engine, prompts, config, contestant, wanted, seconds)
            found = figures(watch, load.segment_length)
            expected = {}
            if found["beats"]:
                expected = expectation(runner, models, load, found["acceptance"], found["context"], chosen)
            fields = {**_fields(models, load), "pair": models.name + remark}
            runner.add("engine", **fields, candidates=contestant, **found, expected=expected)


def compare_strong(runner: Runner, models: Pair, load: Workload) -> None:
    """The batched baseline, for one segment of every prompt, at the engine's mean context."""
    if not runner.time_for(12 if load.batch > 1 else 4):
        return
    load = _one_segment(runner, load)
    prompts, config = models.prompts(load.batch, load.prompt_length), pilots(runner, models).config(load)
    with runner.guarded(f"strong, batch {load.batch}"):
        strong(models.policy, models.reward, prompts, config.replace(max_attempts=1, max_new_tokens=2), set())
        texts, seconds = _timed(runner, lambda: strong(models.policy, models.reward, prompts, config, set()))
        rounds = max(text.attempts for text in texts)
        runner.add("strong", **_fields(models, load), **_cost(texts, seconds), rounds=rounds)


def compare_plain(runner: Runner, models: Pair, load: Workload, acceptances: tuple[float, ...]) -> None:
    """A few attempts of the baseline that takes one prompt and one attempt at a time.

    What an attempt takes does not depend on how many are accepted, so that one measurement gives the rate at each
    acceptance; and the rate does not depend on the batch.
    """
    if not runner.time_for(6):
        return
    load = replace(_one_segment(runner, load), batch=1)
    (prompt,), config = models.prompts(1, load.prompt_length), pilots(runner, models).config(load)
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
            rate = load.segment_length / (attempts * seconds / cost["attempts"])
            fields = _fields(models, replace(load, acceptance=acceptance))
            runner.add("plain", **fields, **{**cost, "tokens_per_second": rate})


def _one_segment(runner: Runner, load: Workload) -> Workload:
    """What is left of it for programs that take as long for each segment: one, in the middle of the response."""
    segment = load.segment_length
    context = 8 if runner.tiny else PROMPT + (RESPONSE - segment) // 2
    return replace(load, prompt_length=context, max_new_tokens=segment)


def compare_generate(runner: Runner, models: Pair, batch: int) -> None:
    """transformers' ``generate``, unguided: every token is kept."""
    if not runner.time_for(4):
        return
    tokens = 4 if runner.tiny else 32
    prompts = models.prompts(batch, 8 if runner.tiny else PROMPT)

    def run(count: int) -> float:
        return _timed(runner, lambda: generate_batch(models.policy, prompts, count, StarsConfig(), set()))[1]

    with runner.guarded(f"generate, batch {batch}"):
        run(2)
        first, whole = run(1), run(tokens + 1)
        step = (whole - first) / tokens
        rate = batch / step
        runner.add("generate", pair=models.name, batch=batch, tokens_per_second=rate, milliseconds_per_step=step * 1e3)


def compare_segments(runner: Runner) -> None:
    """Other segment lengths."""
    models = pair(runner, "llama-2-7b")
    for segment in (3,) if runner.tiny else (32, 15, 30):
        if runner.time_for(6):
            compare_engine(runner, models, workload(runner, 4 if runner.tiny else 64, segment, 0.3), 5.0)


def compare_pair(runner: Runner, name: str, batches: tuple[int, ...], acceptances: tuple[float, ...]) -> None:
    """Everything about one pair of models; the first batch and acceptance with all contestants come first."""
    started, segment = time.time(), 16
    if runner.tiny:
        segment, batches, acceptances = 4, (4, 1), (0.3,)
    models = pair(runner, name)
    first = workload(runner, batches[0], segment, acceptances[0])
    beta = pilots(runner, models).config(first).beta
    runner.add("pair", pair=name, seconds_to_start=time.time() - started, beta=beta)
    compare_engine(runner, models, first, 10.0)
    compare_strong(runner, models, first)
    compare_plain(runner, models, first, acceptances)
    compare_generate(runner, models, first.batch)
    for batch in batches:
        if not runner.time_for(4):
            return
        loads = [workload(runner, batch, segment, one) for one in acceptances]
        for load in loads:
            if load != first:
                compare_engine(runner, models, load, 5.0)
        if batch != first.batch:
            compare_generate(runner, models, batch)
            compare_strong(runner, models, loads[0])
    for one in reversed(acceptances[1:]):
        compare_strong(runner, models, replace(first, acceptance=one))


def _fields(models: Pair, load: Workload) -> dict[str, Any]:
    return {"pair": models.name, "batch": load.batch, "segment": load.segment_length, "wanted": load.acceptance}


def _timed(runner: Runner, call: Any) -> tuple[Any, float]:
    synchronize(runner.device)
    started = time.perf_counter()
    result = call()
    synchronize(runner.device)
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

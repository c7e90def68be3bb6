"""Steady heartbeats with 8-bit weights, as torchao quantises both models: another law than that of 16 bits."""

from __future__ import annotations

import importlib
from typing import Any

from benchmarks.gpu_parts.heartbeats import measure_engine, workload
from benchmarks.gpu_parts.models import free, pair, pilots
from benchmarks.gpu_parts.runner import Runner
from stars_fast.bench.models import Pair

FP8, INT8 = "fp8 weights and activations", "int8 weights"


def measure_quantised(runner: Runner) -> None:
    """Steady heartbeats of batch 64, 30 % accepted, with the layers of both models in 8 bits."""
    try:
        torchao = importlib.import_module("torchao.quantization")
    except ImportError as error:
        runner.add("absent", what=f"torchao: {error}")
        return
    # A scale for each row: one for all rows of a pass would let requests change each other's texts.
    per_row = torchao.Float8DynamicActivationFloat8WeightConfig(granularity=torchao.PerRow())
    schemes = {FP8: per_row, INT8: torchao.Int8WeightOnlyConfig()}
    usual = _heartbeats(runner, scheme="16 bits")
    for name, scheme in schemes.items():
        if not runner.time_for(12):
            return
        if name == FP8 and not runner.on_gpu:  # torchao asks for a GPU
            continue
        free(runner)
        with runner.guarded(name):
            models = pair(runner)
            for model in (models.policy, models.reward):
                torchao.quantize_(model.base_model, scheme)
            quantised = runner.shared["pair"] = Pair(models.name, models.policy, models.reward, models.openings, True)
            about: dict[str, Any] = {"scheme": name}
            about |= {f"{role}_gigabytes": one.bytes / 1e9 for role, one in quantised.weights.items()}
            row = _heartbeats(runner, **about)
            if row and row["beats"] and usual and usual["beats"]:
                over = row["tokens_per_second"] / usual["tokens_per_second"]
                repeats = [over * row["milliseconds"] / one for one in row["repeats_milliseconds"]]
                runner.add("quantised_gain", scheme=name, over_16_bits=repeats)
    free(runner)


def _heartbeats(runner: Runner, **about: Any) -> dict[str, Any] | None:
    """Steady ones of the models that there are, once what they come to is captured."""
    driven, load = pilots(runner), workload(runner, 4 if runner.tiny else 64, 0.3)
    longest = load.prompt_length + load.max_new_tokens
    driven.engine.warm_up(driven.config(load), requests=load.batch, max_model_len=longest)
    return measure_engine(runner, load, "auto", 9.0, kind="quantised", **about)

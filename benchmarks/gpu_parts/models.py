"""Models of real shapes with random weights, made where they run: speed does not depend on the weights."""

from __future__ import annotations

import gc
from dataclasses import replace

import torch
from transformers import PreTrainedConfig

from benchmarks.gpu_parts.expected import device
from benchmarks.gpu_parts.runner import Runner
from benchmarks.micro.timing import in_table
from benchmarks.roofline import Gpu, ModelCost, config_named
from stars_fast import StarsEngine
from stars_fast.bench.models import Pair, made_pair, random_pair
from stars_fast.bench.workload import Pilots
from stars_fast.bench.yardsticks import rates

# Short names of policy and reward model.
PAIRS = {
    "llama-2-7b": ("llama-2-7b", "llama-2-7b-reward"),
    "qwen2.5-7b": ("qwen2.5-7b", "llama-2-7b-reward"),
    "llama-3.2-1b": ("llama-3.2-1b", "llama-3.2-1b-reward"),
}
_SLOTS = 30_000  # of each tree: 64 requests of 384 tokens, with candidates


def pair(runner: Runner) -> Pair:
    """The models that the run is about; made when first asked for."""

    def make() -> Pair:
        if runner.tiny:
            return replace(random_pair("1m", torch.float32, runner.device), name=runner.pair)
        return made_pair(runner.pair, *configs(runner.pair), torch.bfloat16, runner.device)

    return runner.once("pair", make)


def pilots(runner: Runner) -> Pilots:
    """An engine on them whose trees keep their size, so that graphs serve all calls, and its targets."""
    models = pair(runner)

    def make() -> Pilots:
        slots = 4_000 if runner.tiny else _SLOTS
        engine = StarsEngine(models.policy, models.reward, reward_tokenizer="policy", kv_cache_tokens=slots)
        return Pilots(models, engine)

    return runner.once("pilots", make)


def costs(runner: Runner) -> tuple[ModelCost, ModelCost]:
    """What the roofline has to know of policy and reward model."""
    models = pair(runner)
    return ModelCost.of(models.policy), ModelCost.of(models.reward)


def machine(runner: Runner) -> Gpu:
    """Copy bandwidth and matrix rate of this device, measured when first asked for."""
    known = runner.rows("rates")
    if not known:
        sheet, found = in_table(runner.device), rates(runner.device)
        share = found.copy / sheet.bandwidth if sheet else None
        known = [runner.add("rates", copy=found.copy, matrix=found.matrix, of_data_sheet=share)]
    name = torch.cuda.get_device_name(runner.device) if runner.on_gpu else ""
    return device(name, known[0]["copy"], known[0]["matrix"])


def free(runner: Runner) -> None:
    """Give back the memory of models and engines."""
    for key in ("pair", "pilots"):
        runner.shared.pop(key, None)
    gc.collect()
    if runner.on_gpu:
        torch.cuda.empty_cache()


def configs(name: str) -> tuple[PreTrainedConfig, PreTrainedConfig]:
    """Configs of policy and reward model. The reward model's vocabulary is the policy's, as it reads its ids."""
    policy, reward = (config_named(one) for one in PAIRS[name])
    reward.vocab_size = policy.vocab_size
    return policy, reward

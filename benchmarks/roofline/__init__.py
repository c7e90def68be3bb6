"""What a heartbeat must read and compute on a GPU, and how fast it can be: a model on paper, no GPU needed."""

from benchmarks.roofline.cost import AttentionLayer, ModelCost, config_named, short_names
from benchmarks.roofline.gpus import GPUS, Achievable, Gpu, gpu_called, gpu_named
from benchmarks.roofline.heartbeat import (
    Heartbeat,
    Renewal,
    Workload,
    best_candidates,
    heartbeat,
    renewal,
)
from benchmarks.roofline.stages import Stage, decode_step, prefill, proposal, score_pass

__all__ = [
    "GPUS",
    "Achievable",
    "AttentionLayer",
    "Gpu",
    "Heartbeat",
    "ModelCost",
    "Renewal",
    "Stage",
    "Workload",
    "best_candidates",
    "config_named",
    "decode_step",
    "gpu_called",
    "gpu_named",
    "heartbeat",
    "prefill",
    "proposal",
    "renewal",
    "score_pass",
    "short_names",
]

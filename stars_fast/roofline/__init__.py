"""What a heartbeat must read and compute on a GPU, and how fast it can be: a model on paper, no GPU needed."""

from stars_fast.roofline.cost import AttentionLayer, ModelCost, config_named, short_names
from stars_fast.roofline.gpus import GPUS, Achievable, Gpu, gpu_named
from stars_fast.roofline.heartbeat import (
    Heartbeat,
    Renewal,
    Workload,
    accepted_tokens_per_second,
    best_candidates,
    heartbeat,
    heartbeats,
    renewal,
)
from stars_fast.roofline.stages import Stage, decode_step, prefill, score_pass

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
    "accepted_tokens_per_second",
    "best_candidates",
    "config_named",
    "decode_step",
    "gpu_named",
    "heartbeat",
    "heartbeats",
    "prefill",
    "renewal",
    "score_pass",
    "short_names",
]

"""What the engine is compared with.

It lives in the package, since ``stars-fast bench`` runs from the wheel, which has no ``benchmarks/``; the programs of
this folder find it here.
"""

from stars_fast.bench.baselines import (
    Segment,
    Text,
    best_of_n,
    crop,
    draw_segment,
    generate_batch,
    plain,
    sample,
    score,
    score_batch,
    strong,
    targets,
)

__all__ = [
    "Segment",
    "Text",
    "best_of_n",
    "crop",
    "draw_segment",
    "generate_batch",
    "plain",
    "sample",
    "score",
    "score_batch",
    "strong",
    "targets",
]

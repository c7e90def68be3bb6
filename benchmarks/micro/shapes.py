"""Which shapes the decode steps and small passes of a call have, counted on a CPU: each would be a CUDA graph on a GPU.

python -m benchmarks.micro.shapes
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Annotated, Any, NamedTuple
from unittest.mock import PropertyMock, patch

import torch
import typer

from benchmarks.micro.host import engine_for
from stars_fast import StarsConfig, StarsEngine
from stars_fast.loop.in_order import PASS_OF_GPUS
from stars_fast.loop.row_cost import PRIOR_RATIO_OF_GPUS, HeartbeatCost
from stars_fast.tree.graphs import Captured, Graphs
from stars_fast.tree.model import TreeModel


class Run(NamedTuple):
    """A decode step or small pass."""

    role: str  # of its model
    shape: Any
    launched: bool  # for want of a graph


class Counted:
    """What ran, and the graphs that were made for it."""

    def __init__(self) -> None:
        self.runs: Counter[Run] = Counter()
        self.graphs = 0
        self.large = 0  # passes of too many tokens to be captured

    @property
    def launched(self) -> int:
        return sum(count for run, count in self.runs.items() if run.launched)

    @property
    def shapes(self) -> set[tuple[str, Any]]:
        """With their models' roles."""
        return {(run.role, run.shape) for run in self.runs}


@contextmanager
def counting() -> Iterator[Counted]:
    """Count what runs inside, on a GPU or with :func:`stand_ins`."""
    counted, run, make, small_pass = Counted(), Captured.run, Graphs._capture, TreeModel._small_pass

    def running(work: Any) -> None:
        counted.runs[Run(work.model.role, work.shape, work.graph is None)] += 1
        run(work)

    def capturing(graphs: Graphs, shape: Any, work: Captured) -> bool:
        made = make(graphs, shape, work)
        counted.graphs += made
        return made

    def asked(model: TreeModel, *arguments: Any) -> Any:
        small = small_pass(model, *arguments)
        counted.large += small is None
        return small

    passes = patch.object(TreeModel, "_small_pass", asked)
    with patch.object(Captured, "run", running), patch.object(Graphs, "_capture", capturing), passes:
        yield counted


@contextmanager
def stand_ins() -> Iterator[None]:
    """Where there is no GPU: what would be captured inside is marked, and its replay does the work."""

    def capture(work: Captured, pool: Any, stream: Any) -> None:
        work.graph = SimpleNamespace(replay=work.work)  # type: ignore[assignment]

    captures = patch.object(Graphs, "captures", new_callable=PropertyMock, return_value=True)
    handle, stream = patch("torch.cuda.graph_pool_handle", tuple), patch("torch.cuda.Stream", object)
    with patch.object(Captured, "capture", capture), captures, handle, stream:
        yield


def as_on_a_gpu(engine: StarsEngine) -> StarsEngine:
    """An engine whose passes are padded, and whose scheduler believes of rows what it believes of a GPU's."""
    for tree in (engine.policy, *engine.reward.tree_models):
        tree.graphs.enabled = True
    engine.core._ratio = PRIOR_RATIO_OF_GPUS
    engine.core.cost = HeartbeatCost(PRIOR_RATIO_OF_GPUS)
    return engine


def run(
    requests: Annotated[int, typer.Option(help="Requests.")] = 64,
    candidates: Annotated[int, typer.Option(help="Candidates of each; 0 for auto.")] = 3,
    tokens: Annotated[int, typer.Option(help="Of each answer.")] = 256,
    warm: Annotated[bool, typer.Option(help="Begin with warm_up().")] = False,
) -> None:
    """Print what three calls come to, one after another on one engine."""
    torch.set_num_threads(1)
    chosen: Any = candidates or "auto"
    engine, call = engine_for(requests, chosen, tokens)
    with stand_ins(), patch("stars_fast.loop.core.PASS", PASS_OF_GPUS):
        as_on_a_gpu(engine)
        if warm:
            config = StarsConfig(candidates=chosen, segment_length=16, ignore_eos=True)
            print(engine.warm_up(config, requests=requests, max_model_len=64 + tokens))
        for seed in range(3):
            with counting() as counted:
                call(seed)
            print(
                f"call {seed}: {sum(counted.runs.values())} decode steps and small passes of {len(counted.shapes)} "
                f"shapes, {counted.launched} launched, {counted.graphs} graphs made; {counted.large} larger passes"
            )


if __name__ == "__main__":
    typer.run(run)

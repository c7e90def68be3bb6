"""How long calls take, beside the yardsticks of the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from benchmarks.roofline import Gpu, gpu_called
from stars_fast.bench.yardsticks import Rates, synchronize

from .refcheck import Case, Prepared

_ROUND = 2e-3  # seconds that a round lasts at least, so that the clock, the launch and the wait do not count
_ROTATION = 40e-3  # and at most, for the sake of visiting all sets
_TOTAL = 0.15  # of all rounds of a contender
_ROUNDS = (5, 50)
_MOST_CALLS = 1024  # of a round


class Round(NamedTuple):
    """Calls that are timed together."""

    reset: Callable[[], None]  # before each round: restores what was written, and waits
    run: Callable[[], None]  # and waits
    calls: int
    rounds: int  # worth measuring
    graph: bool  # whether a CUDA graph holds the calls


def round_of(case: Case, prepared: Prepared) -> Round:
    """As many calls as make a round worth timing, over as many sets of inputs as time allows; captured on a GPU.

    The contender must have run once before: a kernel may be compiled then.
    """

    def reset() -> None:
        case.restore()
        synchronize(case.device)

    def timed(run: Callable[[], None]) -> float:
        times = []
        for _ in range(2):  # the first replay of a graph also moves it to the device
            reset()
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return max(times[1], 1e-7)

    run, graph = _run(case, prepared, 1)
    taken, calls = timed(run), 1
    for _ in range(2):  # with more calls in it, a round tells more exactly what one takes
        once = taken / calls
        wanted = 1 + int(max(_ROUND / once, min(prepared.sets, _ROTATION / once)))
        if taken >= _ROUND and calls >= min(prepared.sets, _ROTATION / once):
            break
        calls = min(wanted, _MOST_CALLS)
        run, graph = _run(case, prepared, calls)
        taken = timed(run)
    rounds = min(max(int(_TOTAL / taken), _ROUNDS[0]), _ROUNDS[1])
    return Round(reset, run, calls, rounds, graph)


def _run(case: Case, prepared: Prepared, calls: int) -> tuple[Callable[[], None], bool]:
    """What makes that many calls and waits for them, and whether a CUDA graph holds them."""

    def work() -> None:
        for i in range(calls):
            prepared.call(i)

    again, captured = work, False
    if case.device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                work()
            again, captured = graph.replay, True
        except RuntimeError:  # what waits for the device cannot be captured, and pays for its launches
            synchronize(case.device)

    def run() -> None:
        again()
        synchronize(case.device)

    return run, captured


def median_seconds(case: Case, prepared: Prepared) -> float:
    """Seconds of one call, for programs without pytest."""
    one, taken = round_of(case, prepared), []
    for _ in range(one.rounds):
        one.reset()
        start = time.perf_counter()
        one.run()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken) / one.calls


def floor_seconds(case: Case, reached: Rates) -> float:
    """No kernel is faster that reaches what a copy and a large product reach: the larger of the two times."""
    return max(case.bytes / reached.copy, case.operations / reached.matrix)


def in_table(device: torch.device) -> Gpu | None:
    """The data sheet of this GPU, if the roofline knows it."""
    return gpu_called(torch.cuda.get_device_name(device)) if device.type == "cuda" else None

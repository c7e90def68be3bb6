"""The project's tests on a GPU, and each operator against its floor."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_parts.compare import machine
from benchmarks.gpu_parts.models import free
from benchmarks.gpu_parts.runner import Runner
from benchmarks.micro.attention import PER_ROW, Tree
from benchmarks.micro.cases import OPERATORS, refcheck
from benchmarks.micro.refcheck import OURS
from benchmarks.micro.sampling import Draw, Gather
from benchmarks.micro.tables import Append, Select
from benchmarks.micro.timing import Rates, floor_seconds, median_seconds

ROOT = Path(__file__).resolve().parents[2]
_PROCESSES = 6  # of pytest-xdist: most of the time goes into compiling kernels
_OUTPUT = 30_000  # characters kept

# The most telling ones first. Of attention: decode and scoring at each batch size, then the other models.
CASES: list[tuple[str, Any]] = [
    ("tree_attention", Tree("llama-2-7b", 64, 4, 256, 8, 1)),
    ("tree_attention", Tree("llama-2-7b", 64, 4, 256, 16, 16)),
    ("tree_attention", Tree("qwen2.5-7b", 64, 4, 256, 8, 1)),
    ("sample_step", Draw(128, 128_256, "unfiltered")),
    ("sample_step", Draw(128, 128_256, "all")),
    ("tree_attention", Tree("llama-2-7b", 1, 8, 256, 8, 1)),
    ("tree_attention", Tree("llama-2-7b", 16, 8, 1024, 8, 1)),
    ("kv_append", Append(128, 32, 128)),
    ("select_and_commit", Select(64, 8)),
    ("tree_attention", Tree("qwen2.5-7b", 64, 4, 256, 16, 16)),
    ("tree_attention", Tree("llama-3.2-1b", 16, 8, 1024, 8, 1)),
    ("tree_attention", Tree("qwen2.5-7b", 1, 1, 4096, 8, 1)),
    ("sample_step", Draw(64, 32_000, "unfiltered")),
    ("sample_step", Draw(256, 152_064, "top_p0.9")),
    ("sample_step", Draw(256, 152_064, "top_k50")),
    ("gather_logprobs", Gather(256, 128_256)),
    ("kv_append", Append(4096, 32, 128)),
    ("tree_attention", Tree("llama-2-7b", 64, 1, 256, 8, 1)),
]
# Tiles of attention (queries, keys, warps, stages) that were near the best where they were last measured, by case.
TILES: list[tuple[Tree, list[tuple[int, int, int, int]]]] = [
    (CASES[0][1], [(16, 64, 4, 3), (16, 64, 2, 3), (16, 128, 4, 3), (16, 32, 4, 4)]),
    (CASES[2][1], [(32, 64, 4, 3), (32, 32, 4, 3), (32, 64, 4, 2), (32, 128, 4, 2)]),
    (CASES[1][1], [(64, 32, 4, 3), (64, 64, 4, 3), (64, 64, 8, 3), (128, 64, 8, 3)]),
    (Tree("qwen2.5-7b", 64, 4, 256, 16, 16), [(64, 32, 4, 3), (64, 64, 4, 3), (64, 64, 8, 3), (128, 64, 8, 3)]),
]
TINY = [
    ("tree_attention", Tree("llama-3.2-1b", 2, 2, 16, 4, 1, torch.float32)),
    ("sample_step", Draw(2, 3000, "unfiltered", torch.float32)),
]


def run_tests(runner: Runner, *selection: str) -> None:
    """pytest on a selection of the tests."""
    if importlib.util.find_spec("pytest") is None:
        runner.add("tests", selection=" ".join(selection), status="not run: pytest is not installed", output="")
        return
    absent = [name for name in ("hypothesis", "scipy") if importlib.util.find_spec(name) is None]
    command = [sys.executable, "-m", "pytest", *selection, "-p", "no:cacheprovider", "--tb=short", "-rfE"]
    command += ["--continue-on-collection-errors", "--durations=5", "--color=no"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(_PROCESSES)]
    free(runner)  # the tests have processes of their own on this GPU
    status, output = _run(command, max(runner.left(), 5.0))
    found = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped|error)", output[-400:])}
    runner.add(
        "tests",
        selection=" ".join(selection),
        status=status,
        **found,
        absent=absent,
        output=output[-_OUTPUT:],
    )
    runner.say(output[-3000:])


def kernel_tests(runner: Runner) -> None:
    """pytest on the files about Triton kernels, but for what is marked for GPUs."""
    files = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").glob("test_triton_*.py"))
    run_tests(runner, "-m", "not gpu", *files)


def _run(command: list[str], seconds: float) -> tuple[str, str]:
    """The program's status and what it printed, also where it is stopped because the time is up."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )
    try:
        output, _ = process.communicate(timeout=seconds)
        return {0: "passed", 5: "no test collected"}.get(process.returncode, f"exit {process.returncode}"), output
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its workers too: they would go on using the GPU
        output, _ = process.communicate()
        return f"stopped after {seconds:.0f} s", output


def measure_operators(runner: Runner) -> None:
    """Each operator, checked against its reference and timed against its floor; attention also per row."""
    gpu = machine(runner)
    reached = Rates(gpu.bandwidth, gpu.matrix_rate)
    free(runner)
    ours = OURS[runner.device.type]
    for operator, shape in TINY if runner.tiny else CASES:
        if not runner.time_for(3):
            return
        case = OPERATORS[operator].build(shape, runner.device)
        floor = floor_seconds(case, reached)
        for contender in (ours, PER_ROW) if operator == "tree_attention" else (ours,):
            if not runner.time_for(1):
                return
            fields = {"operator": operator, "case": case.name, "contender": contender}
            try:
                prepared = case.prepared(contender)
                refcheck(case, contender, prepared)
                seconds = median_seconds(case, prepared)
            except Exception as error:  # a kernel that does not compile, a result that is wrong: the others go on
                runner.add("operator", **fields, error=repr(error)[:2000])
                continue
            runner.add(
                "operator",
                **fields,
                microseconds=seconds * 1e6,
                floor_microseconds=floor * 1e6,
                over_floor=seconds / floor if floor else None,
                gigabytes_per_second=case.bytes / seconds / 1e9,
            )
        del case


def measure_tiles(runner: Runner) -> None:
    """Attention with other tiles than the ones it chooses."""
    kernels = importlib.import_module("stars_fast.kernels.tree_attention")
    chosen, fitted = kernels.choose_tile, kernels.fit_warps
    free(runner)
    try:
        kernels.fit_warps = lambda tile, *_: tile
        for shape, tiles in TILES:
            case = OPERATORS["tree_attention"].build(shape, runner.device)
            for tile in tiles:
                if not runner.time_for(2):
                    return
                kernels.choose_tile = lambda *_, tile=tile, **__: kernels.Tile(*tile)
                with runner.guarded(f"{case.name}, {tile}"):
                    prepared = case.prepared(OURS[runner.device.type])
                    refcheck(case, "tile", prepared)
                    runner.add("tile", case=case.name, tile=tile, microseconds=median_seconds(case, prepared) * 1e6)
            del case
    finally:
        kernels.choose_tile, kernels.fit_warps = chosen, fitted

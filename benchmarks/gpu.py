"""Everything about speed that only a GPU can show, in one command of less than nine minutes.

    python benchmarks/gpu.py --out gpu.json                # --list; --only llama-2-7b --only operators; --seconds 300
    python benchmarks/gpu.py --tiny --out tiny.json        # toy models, on a CPU too: shows that the program works

Models have real shapes and random weights; nothing is downloaded. The extension is built in place if it is missing.
The parts run in a process of their own, started again where one of them has broken it; each figure is in the JSON file
as soon as it is measured, and the table at the end is made from that file and written beside it.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_parts.report import lines  # noqa: E402
from benchmarks.gpu_parts.runner import DEVICE_BROKEN, Part, Record, Runner  # noqa: E402

_GRACE = 15.0  # seconds that a part may run past the limit before its process is ended


def measuring(about: str, function: str, *arguments: Any) -> Callable[[Runner], None]:
    """Runs a function of ``gpu_parts``, imported only then: the extension may yet have to be built."""
    module, name = function.split(".")

    def run(runner: Runner) -> None:
        getattr(import_module(f"benchmarks.gpu_parts.{module}"), name)(runner, *arguments)

    run.__doc__ = about
    return run


COMPARE = partial(measuring, "Heartbeats against one candidate, plain, strong and generate.", "compare.compare_pair")
STEPS = partial(
    measuring, "Decode steps against their floor: compiled and captured, captured, launched.", "steps.time_modes"
)
DEVICE = measuring("Copy bandwidth and matrix rate of this device.", "compare.machine")
SPLIT = measuring("Where the time of a heartbeat goes (a profiling pass).", "steps.split_batches")
TESTS = measuring("pytest -m gpu: what only a GPU can show.", "operators.run_tests", "tests", "-m", "gpu")
OPERATORS = measuring("Each operator against its floor.", "operators.measure_operators")
UNCOMPILED = measuring("Heartbeats without compiled layers.", "steps.time_uncompiled")
OVERLAP = measuring("What scoring on a second stream would gain.", "overlap.overlapped_scoring")
SEGMENTS = measuring("Segments of 32, 15 and 30 tokens.", "compare.compare_segments")
KERNEL_TESTS = measuring("The tests of the Triton kernels, compiled where there is a GPU.", "operators.kernel_tests")
TILES = measuring("Attention with other tiles than the ones it chooses.", "operators.measure_tiles")

# The most valuable first. Seconds are estimates for an H100 or H200.
PARTS = [
    Part("device", 5, DEVICE),
    Part("llama-2-7b", 85, COMPARE("llama-2-7b", (64, 1), (0.3, 0.15, 0.5))),
    Part("split", 30, SPLIT),
    Part("tests", 60, TESTS, needs_gpu=True),
    Part("steps", 35, STEPS("llama-2-7b")),
    Part("operators", 35, OPERATORS),
    Part("uncompiled", 25, UNCOMPILED),
    Part("overlap", 10, OVERLAP),
    Part("qwen2.5-7b", 70, COMPARE("qwen2.5-7b", (64, 1), (0.3, 0.15, 0.5))),
    Part("steps-qwen", 20, STEPS("qwen2.5-7b"), needs_gpu=True),
    Part("batch-16", 25, COMPARE("llama-2-7b", (16,), (0.3,))),
    Part("segments", 25, SEGMENTS),
    Part("llama-3.2-1b", 35, COMPARE("llama-3.2-1b", (64, 1, 16), (0.3,))),
    Part("kernel-tests", 30, KERNEL_TESTS, needs_gpu=True),
    Part("tiles", 20, TILES, needs_gpu=True),
]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="the record (default: %(default)s)")
    names = [part.name for part in PARTS]
    parser.add_argument("--only", action="append", choices=names, metavar="NAME", help="run this part; may be repeated")
    parser.add_argument("--list", action="store_true", help="name the parts")
    parser.add_argument("--seconds", type=float, default=520, help="start nothing new after these (default: 520)")
    parser.add_argument("--tiny", action="store_true", help="toy models, few figures")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    parts = [part for part in PARTS if not args.only or part.name in args.only]
    if args.list:
        print("\n".join(f"{part.name:14}{part.seconds:5.0f} s  {part.about}" for part in parts))
        return 0
    return work(args, parts) if args.worker else supervise(args, parts)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def supervise(args: argparse.Namespace, parts: list[Part]) -> int:
    """Build what is missing, run the parts in another process, start it again where it died, print the table."""
    started = time.time()
    if not args.tiny and not _has_gpu():
        print("there is no GPU: --tiny shows on a CPU that the program works", file=sys.stderr)
        return 2
    record = Record(args.out, {"started": started, "seconds": args.seconds, "tiny": args.tiny, "parts": {}})
    record.content["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    record.content["build"] = build()
    record.content["commit"] = _told("git", "-c", f"safe.directory={ROOT}", "rev-parse", "HEAD")
    record.save()
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", "--out", str(args.out)]
    command += ["--tiny"] * args.tiny + [word for name in args.only or () for word in ("--only", name)]
    while True:
        before = len(record.content["parts"])
        cause = _one_worker(command, started + args.seconds + _GRACE, args.out)
        record = Record.of(args.out)
        record.bury(cause)
        if not cause or not before < len(record.content["parts"]) < len(parts):
            break
        print(f"the process has ended ({cause}): starting it again for the parts behind", flush=True)
    record.content["ended"] = cause
    record.content["total_seconds"] = time.time() - started
    record.save()
    table = "\n".join(lines(record.content))
    args.out.with_suffix(".txt").write_text(table + "\n")
    print(table)
    failed = any(entry["status"] == "failed" for entry in record.content["parts"].values())
    return 1 if failed or cause else 0


def _one_worker(command: list[str], ends: float, out: Path) -> str:
    """Run it to its end; why it ended, or nothing where it has done its work."""
    process = subprocess.Popen(command)
    while True:
        try:
            code = process.wait(timeout=1.0)
            break
        except subprocess.TimeoutExpired:
            part = Record.of(out).overdue()
            if part or time.time() > ends:
                process.kill()
                process.wait()
                return f"{part} hangs" if part else "the time is up"
    if code == DEVICE_BROKEN:
        return "the device no longer answers after an error"
    return f"exit status {code}" if code else ""


def work(args: argparse.Namespace, parts: list[Part]) -> int:
    """Run the parts that the record does not hold yet."""
    import torch

    record = Record.of(args.out)
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record.content["machine"] = about(where)
    runner = Runner(record, record.content["started"] + record.content["seconds"], where, args.tiny)
    if runner.run(parts):
        return 0
    sys.stdout.flush()
    os._exit(DEVICE_BROKEN)  # what would be cleaned up here waits for the device


def build() -> dict[str, Any]:
    """Build the extension in place unless it is there."""
    if list((ROOT / "stars_fast").glob(f"_C.cpython-{sys.version_info.major}{sys.version_info.minor}-*")):
        return {"built": False, "seconds": 0.0}
    print("building the extension", flush=True)
    started = time.time()
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, capture_output=True, text=True
    )
    if result.returncode:
        print(result.stdout[-2000:] + result.stderr[-4000:], flush=True)
    return {"built": True, "seconds": time.time() - started, "exit": result.returncode, "errors": result.stderr[-4000:]}


def about(where: Any) -> dict[str, Any]:
    """Versions and hardware."""
    import torch
    import transformers

    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
    }
    if where.type == "cuda":
        import triton

        found |= {"gpu": torch.cuda.get_device_name(), "triton": triton.__version__, "cuda": torch.version.cuda}
        found["memory"] = torch.cuda.get_device_properties(where).total_memory
        found["driver"] = _told("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found


def _told(*command: str) -> str | None:
    """What a program prints in the checkout; None where it is missing or says nothing."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


if __name__ == "__main__":
    sys.exit(main())

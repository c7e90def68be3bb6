"""What only a GPU can show of speed, in one command of eight minutes, beside what was predicted.

    python benchmarks/gpu.py --out gpu.json            # --list; --only tiles --only products; --minutes 4
    python benchmarks/gpu.py --out more.json --only graph-shapes --only overlap    # and what else --list names last
    python benchmarks/gpu.py --tiny --out tiny.json    # toy models, on a CPU too: shows that the program works

Each part ends with a line for each of its hypotheses (``gpu_parts/hypotheses.yaml``): predicted, measured, and whether
that is confirmed, refuted or unclear. Models have real shapes and random weights; nothing is downloaded. The extension
is built in place if it is missing. The parts run in a process of their own, started again where one of them has broken
it; each figure is in the JSON file as soon as it is measured. ``pages.py`` makes the tables of docs of it.
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
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_parts.hypotheses import HYPOTHESES, judged, line  # noqa: E402
from benchmarks.gpu_parts.runner import DEVICE_BROKEN, Part, Record, Runner  # noqa: E402

_GRACE = 15.0  # seconds that a part may run past the limit before its process is ended
START = 45.0  # seconds until models and engine are there, for the first part that asks, and once more behind "tests"


def measuring(about: str, function: str) -> Callable[[Runner], None]:
    """Runs a function of ``gpu_parts``, imported only then: the extension may yet have to be built."""
    module, name = function.split(".")

    def run(runner: Runner) -> None:
        getattr(import_module(f"benchmarks.gpu_parts.{module}"), name)(runner)

    run.__doc__ = about
    return run


# The most valuable first; the first call must come before everything. Seconds are estimates for an H100 or H200, where
# models and engine are there.
PARTS = [
    Part(name, seconds, measuring(about, function), needs_gpu=name == "tests")
    for name, seconds, function, about in (
        ("throughput", 50, "throughput.measure_throughput", "192 requests, first call and later ones."),
        ("step-profile", 30, "profiles.profile_steps", "Decode steps by kernel."),
        ("pass-profile", 15, "profiles.profile_passes", "Scoring and prefill by kernel."),
        ("idle", 20, "idle.measure_idle", "Where the device waits for the host."),
        ("score-order", 35, "order.compare_orders", "Scoring in order against all at once."),
        ("products", 35, "products.measure_products", "Products by torch's libraries and others."),
        ("tiles", 30, "tiles.measure_tiles", "Attention with 5 and 7 stages."),
        ("heartbeats", 40, "heartbeats.measure_acceptances", "Steady heartbeats of batch 64."),
        ("small-batches", 20, "heartbeats.measure_small_batches", "Steady heartbeats of batch 1 and 16."),
        ("unguided", 25, "baselines.compare_unguided", "Accepting everything beside generate."),
        ("baselines", 35, "baselines.compare_scripts", "plain and strong."),
        ("tests", 90, "project_tests.run_tests", "pytest -m gpu."),
        # Where time is left, or by name.
        ("graph-shapes", 40, "shapes.measure_shapes", "Graphs after warm_up; what padding costs."),
        ("prefill", 15, "prefill.measure_prefill", "Attention of fresh prompts, by library."),
        ("dependent", 10, "dependent.compare_dependent_launches", "Decode steps with dependent launches."),
        ("overlap", 40, "overlap.measure_overlap", "Prompts or scoring beside decode steps."),
        ("ahead", 25, "order.compare_extensions", "The next extension launched ahead."),
        ("quantised", 120, "quantised.measure_quantised", "Steady heartbeats with 8-bit weights."),
    )
]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="the record (default: %(default)s)")
    names = [part.name for part in PARTS]
    parser.add_argument("--only", action="append", choices=names, metavar="NAME", help="run this part; may be repeated")
    parser.add_argument("--list", action="store_true", help="name the parts")
    parser.add_argument("--minutes", type=float, default=8, help="start nothing new after these (default: 8)")
    parser.add_argument("--pair", choices=("llama-2-7b", "qwen2.5-7b", "llama-3.2-1b"), default="llama-2-7b")
    parser.add_argument("--tiny", action="store_true", help="toy models, few figures")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    parts = [part for part in PARTS if not args.only or part.name in args.only]
    if args.list:
        for part in parts:
            decides = ", ".join(one["id"] for one in HYPOTHESES if one["part"] == part.name)
            print(f"{part.name:14}{part.seconds:5.0f} s  {part.about:42} {decides}".rstrip())
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
    if args.out.exists():  # it may have cost minutes of somebody's GPU
        written = datetime.fromtimestamp(args.out.stat().st_mtime, timezone.utc)
        earlier = args.out.rename(args.out.with_stem(f"{args.out.stem}-{written:%Y%m%d-%H%M%S}"))
        print(f"the earlier {args.out} is {earlier} now", flush=True)
    about_run = {"started": started, "seconds": 60 * args.minutes, "tiny": args.tiny, "pair": args.pair}
    record = Record(args.out, {**about_run, "parts": {}, "verdicts": {}})
    record.content["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    record.content["build"] = build()
    record.content["commit"] = _told("git", "-c", f"safe.directory={ROOT}", "rev-parse", "HEAD")
    record.save()
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", "--out", str(args.out)]
    command += (
        ["--pair", args.pair] + ["--tiny"] * args.tiny + [word for name in args.only or () for word in ("--only", name)]
    )
    while True:
        before = len(record.content["parts"])
        cause = _one_worker(command, started + 60 * args.minutes + _GRACE, args.out)
        record = Record.of(args.out)
        record.bury(cause)
        if not cause or not before < len(record.content["parts"]) < len(parts):
            break
        print(f"the process has ended ({cause}): starting it again for the parts behind", flush=True)
    for name in record.content["parts"]:  # the one that was killed too
        record.content["verdicts"] |= judged(record.content, name)
    record.content["ended"] = cause
    record.content["total_seconds"] = time.time() - started
    record.save()
    from benchmarks import pages  # what it imports may have had to be built

    for table in (pages.calls, pages.kernels, pages.products, pages.heartbeats):
        if (told := table([record.content])) != pages.NOTHING:
            print(f"\n{told}")
    print("\n".join(["", *summary(record.content)]))
    failed = any(entry["status"] == "failed" for entry in record.content["parts"].values())
    return 1 if failed or cause else 0


def summary(content: dict[str, Any]) -> list[str]:
    """All verdicts, and how each part ended."""
    told = [line(one) for one in content["verdicts"].values()]
    for name, entry in content["parts"].items():
        cause = f": {entry['error'].strip().splitlines()[-1][:150]}" if entry.get("error") else ""
        cut = ", cut short" if any(row["kind"] == "left_out" and "seconds" in row for row in entry["rows"]) else ""
        told.append(f"part {name}: {entry['status']}{cut}, {entry['seconds']:.0f} s{cause}")
    return told + ([f"the last process ended early: {content['ended']}"] if content["ended"] else [])


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
    ends = record.content["started"] + record.content["seconds"]
    runner = Runner(record, ends, where, args.tiny, args.pair)
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

"""Compiles the kernels ahead of time, for GPUs that need not be there, and reads what the compiler made of them.

Triton decides when it is imported whether kernels are compiled or interpreted, so the compiling is done by child
processes, which have the Triton that the parent would import. A kernel that brings the compiler down takes one child
with it and is named.
"""

import importlib
import json
import os
import pkgutil
import queue
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .variant import Variant

MOST_SPILL_BYTES = 32  # of a thread
_MATRIX_INSTRUCTIONS = {  # the best one first; looked for in PTX and AMD's assembly
    "tcgen05.mma": r"\btcgen05\.mma\b",
    "wgmma": r"\bwgmma\.mma_async\b",
    "mma.sync": r"\bmma\.sync\b",
    "mfma": r"\bv_mfma_",
}
_NOT_FOR_CHILDREN = ("TRITON_INTERPRET", "STARS_FAST_KERNELS", "TRITON_ALWAYS_COMPILE")
_LAST_LINES = 5  # of a compiler that crashed


class Target(NamedTuple):
    """A kind of GPU."""

    gpu: GPUTarget
    shared_limit: int  # bytes that one program may have


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * 1024),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * 1024),
}


class Job(NamedTuple):
    """A variant to compile for a target."""

    target: str
    kernel: str


class Record(NamedTuple):
    """What became of a :class:`Job`."""

    kernel: str
    target: str
    registers: int  # of a thread; AMD's include its accumulation registers
    shared_bytes: int
    spill_bytes: int  # of a thread: its stack (NVIDIA) or scratch memory (AMD)
    matrix_instruction: str | None
    buffers: list[int]  # of each loop over blocks of matrices: how many blocks lie in shared memory at a time
    waits: list[int | None]  # of the same: how many copies may be under way where it waits; None if it never does
    seconds: float  # to compile, or to find it in the cache


def kernel_modules() -> list[str]:
    """Names of the modules of this folder that have variants to compile."""
    package = importlib.import_module(__package__)
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__) if module.name != "aot")
    return [name for name in names if hasattr(importlib.import_module(f"{__package__}.{name}"), "variants")]


def variants_for(target: str) -> dict[str, Variant]:
    """All variants for one of :data:`TARGETS`, by name."""
    found: dict[str, Variant] = {}
    for module in kernel_modules():
        for variant in importlib.import_module(f"{__package__}.{module}").variants(TARGETS[target].gpu):
            if variant.name in found:
                raise ValueError(f"two variants for {target} are named {variant.name!r}")
            found[variant.name] = variant
    return found


def jobs_for(targets: Collection[str] = (), kernels: Collection[str] = ()) -> list[Job]:
    """What there is to compile, narrowed to targets and kernels where any are given.

    Parameters
    ----------
    targets
        Keys of :data:`TARGETS`.
    kernels
        Names of variants, with or without what stands in brackets, or of operators.

    Raises
    ------
    ValueError
        Naming what does not exist, and what does.
    """
    for target in targets:
        if target not in TARGETS:
            raise ValueError(f"no target {target!r}; there are {', '.join(TARGETS)}")
    every = [Job(target, name) for target in targets or TARGETS for name in variants_for(target)]
    families = {job.kernel.partition("[")[0] for job in every}
    for kernel in set(kernels).difference(*(_names(job.kernel) for job in every)):
        raise ValueError(f"no kernel {kernel!r}; there are {', '.join(sorted(families))}, and their variants in full")
    return [job for job in every if not kernels or _names(job.kernel) & set(kernels)]


def _names(kernel: str) -> set[str]:
    """``sample_step.draw[bf16]`` is also a ``sample_step.draw`` and a ``sample_step``."""
    family = kernel.partition("[")[0]
    return {kernel, family, family.partition(".")[0]}


def compile_all(
    jobs: Sequence[Job],
    *,
    processes: int | None = None,
    done: Callable[[Record], Any] | None = None,
    cache: Path | None = None,
) -> list[Record]:
    """Compile in child processes; the records are in the order of the jobs.

    Parameters
    ----------
    jobs
        From :func:`jobs_for`.
    processes
        At a time; as many as there are processors if None.
    done
        Called with each record when it is there, in any order and thread.
    cache
        A folder that keeps what is compiled, from which it is taken where neither kernel nor compiler has changed.

    Raises
    ------
    RuntimeError
        Naming all that does not compile, after the rest has.
    """
    waiting = queue.SimpleQueue[int]()
    for index in range(len(jobs)):
        waiting.put(index)
    answers: dict[int, Record | str] = {}  # or what went wrong

    def work() -> None:
        while not waiting.empty():
            with Child(cache) as child:
                while child.alive and (index := _next(waiting)) is not None:
                    answers[index] = answer = child.compile(jobs[index])
                    if done is not None and isinstance(answer, Record):
                        done(answer)

    processes = min(processes or os.cpu_count() or 1, len(jobs))
    with ThreadPoolExecutor(max(processes, 1)) as pool:
        try:
            for future in [pool.submit(work) for _ in range(processes)]:
                future.result()
        finally:  # after an interrupt nobody waits for the rest
            while _next(waiting) is not None:
                pass
    ordered = [answers[index] for index in range(len(jobs))]
    errors = [
        f"{job.kernel} does not compile for {job.target}: {answer}"
        for job, answer in zip(jobs, ordered, strict=True)
        if not isinstance(answer, Record)
    ]
    if errors:
        raise RuntimeError("\n".join(errors))
    return [answer for answer in ordered if isinstance(answer, Record)]


def _next(waiting: queue.SimpleQueue[int]) -> int | None:
    try:
        return waiting.get_nowait()
    except queue.Empty:
        return None


class Child:
    """A process that compiles for real, whatever this one is set to, and finds the modules that this one finds."""

    def __init__(self, cache: Path | None = None) -> None:
        self._cache = cache

    def __enter__(self) -> "Child":
        self._folder = tempfile.TemporaryDirectory()
        environment = {name: value for name, value in os.environ.items() if name not in _NOT_FOR_CHILDREN}
        environment["TRITON_CACHE_DIR"] = str(self._cache or Path(self._folder.name, "cache"))
        environment["PYTHONPATH"] = os.pathsep.join(path or os.curdir for path in sys.path)
        self._log = Path(self._folder.name, "log").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            text=True,
        )
        self.alive = True
        return self

    def compile(self, job: Job) -> Record | str:
        """The record, or what went wrong; after a crash nothing is ``alive`` any more."""
        try:
            print(json.dumps(job), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if answer:
            fields = json.loads(answer)
            return Record(**fields) if isinstance(fields, dict) else fields
        self.alive = False
        self._log.seek(0)
        words = self._log.read().strip().splitlines()[-_LAST_LINES:]
        return f"the compiler ended with code {self._process.wait()}: " + "\n".join(words)

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # closes its input, which ends it
        self._log.close()
        self._folder.cleanup()


def compile_one(job: Job) -> Record:
    """Compile in this process, which must not interpret kernels."""
    variant, gpu = variants_for(job.target)[job.kernel], TARGETS[job.target].gpu
    options = {"num_warps": variant.num_warps, "enable_fp_fusion": variant.fp_fusion}
    options |= {name: value for name in ("num_stages", "maxnreg") if (value := getattr(variant, name)) is not None}
    start = time.perf_counter()
    compiled = triton.compile(_source(variant), target=gpu, options=options)
    seconds = time.perf_counter() - start
    if gpu.backend == "hip":
        text = compiled.asm["amdgcn"]
        registers, spill_bytes = _amd_usage(text)
    else:
        text = compiled.asm["ptx"]
        registers, spill_bytes = _nvidia_usage(compiled.asm["cubin"])
    instruction = next((name for name, pattern in _MATRIX_INSTRUCTIONS.items() if re.search(pattern, text)), None)
    shared = compiled.metadata.shared
    buffers, waits = _pipelines(compiled.asm["ttgir"])
    return Record(
        job.kernel, job.target, registers, shared, spill_bytes, instruction, buffers, waits, round(seconds, 3)
    )


def _source(variant: Variant) -> ASTSource:
    """The kernel specialised as a call would: pointers, and the integers that say so, are multiples of 16."""
    signature: dict[str, str] = {}
    attributes = {}
    for place, name in enumerate(variant.kernel.arg_names):
        kind, _, multiple = variant.types.get(name, "constexpr").partition(":")
        signature[name] = kind
        if multiple or kind.startswith("*"):
            attributes[(place,)] = [["tt.divisibility", int(multiple or 16)]]
    return ASTSource(variant.kernel, signature, dict(variant.constexprs), attributes)


def _nvidia_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes; spilled registers lie on the stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return _number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage)


def _amd_usage(assembly: str) -> tuple[int, int]:
    """Registers and scratch bytes; registers that are spilled to other registers cost none."""
    return _number(r"\.vgpr_count:\s*(\d+)", assembly), _number(r"\.private_segment_fixed_size:\s*(\d+)", assembly)


def _pipelines(ttgir: str) -> tuple[list[int], list[int | None]]:
    """Buffers and waits of the loops in Triton's last own form, in which a loop's body is what is indented further.

    A matrix has as many buffers as its allocation, just before its loop, has first elements; of several matrices and
    waits in a loop the fewest count, since that is where it stands still.
    """
    buffers: list[int] = []
    waits: list[int | None] = []
    allocated: list[int] = []
    inside: int | None = None  # indentation of the loop that these lines are in
    for line in ttgir.splitlines():
        indentation = len(line) - len(line.lstrip())
        if allocation := re.search(r"local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+xb?f\d+,", line):
            allocated.append(int(allocation[1]))
        elif allocated and "scf.for" in line:
            buffers.append(min(allocated))
            waits.append(None)
            allocated, inside = [], indentation
        elif inside is not None and indentation <= inside:
            inside = None
        elif inside is not None and (wait := re.search(r"async_wait.* \{num = (\d+)", line)):
            waits[-1] = min(int(wait[1]), waits[-1] if waits[-1] is not None else int(wait[1]))
    return buffers, waits


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"the compiler's output has no {pattern}: {text[:500]}")
    return int(match[1])


def failures(records: Sequence[Record]) -> list[str]:
    """What is wrong with what was compiled, a line each: spills, no matrix instruction or pipeline, too much memory."""
    return [f"{record.kernel} on {record.target} {wrong}" for record in records for wrong in _wrong(record)]


def _wrong(record: Record) -> Iterator[str]:
    if record.spill_bytes > MOST_SPILL_BYTES:
        yield f"spills {record.spill_bytes} bytes a thread, at most {MOST_SPILL_BYTES} are allowed"
    variant = variants_for(record.target)[record.kernel]
    if variant.needs_matrix and record.matrix_instruction is None:
        yield "uses no matrix instruction"
    if variant.pipelined and not (record.buffers and record.buffers[0] > 1 and record.waits[0]):
        yield f"claims to pipeline, but its loops have {record.buffers} buffers and wait until {record.waits} are left"
    limit = TARGETS[record.target].shared_limit
    if record.shared_bytes > limit:
        yield f"needs {record.shared_bytes} bytes of shared memory, a program has at most {limit}"


def serve() -> None:
    """The child's side: a job a line on standard input, a record or an error a line on standard output."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what compilers print is no answer
    for line in sys.stdin:
        try:
            answer: Any = compile_one(Job(*json.loads(line)))._asdict()
        except Exception as error:  # whatever it is, the parent names the kernel
            answer = f"{type(error).__name__}: {error}"
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()

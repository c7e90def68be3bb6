"""Every kernel compiles for every target, without spills and with matrix instructions where it needs them.

All variants take minutes: ``stars-fast kernels`` compiles them. Here are those that would fail first.
"""

import json
import re

import pytest
from typer.testing import CliRunner

from stars_fast.cli import app

aot = pytest.importorskip("stars_fast.kernels.aot", exc_type=ImportError)
GOOD = aot.Record("select_and_commit", "sm_90", 40, 0, 0, None, [], [], 0.5)
DECODE = "tree_attention[d128,m16,bf16,split]"  # few requests: its tile pipelines


# Of each kernel what has the most registers, odd sizes, or every option.
NEAREST_TO_THE_GATE = [
    "gather_logprobs[fp32]",
    "kv_append[16x192,bf16]",
    "rotary_append[128/128,fp32]",
    "sample_step.draw[fp32,v151936,seen]",
    "sample_step.tile_sums[bf16,v151936,seen]",
    "select_and_commit",
    "skinny_product.sum",
    "skinny_product[m256,bf16,split]",
    "skinny_product[m32,bf16,odd]",
    "tree_attention.merge",
    "tree_attention.work",
    "tree_attention[d128,m16,bf16,split,options]",
    "tree_attention[d192/128,m16,fp32,split]",
    "tree_attention[d256,m64,bf16,options]",
]
# What is made for one target, and what differs by so little that one must do.
BESIDES = [
    aot.Job("sm_80", "sample_step.draw[bf16,v524288,seen]"),
    aot.Job("sm_80", "tree_attention[d96,m64,bf16]"),
    aot.Job("sm_90", "rotary_append[128/128,bf16,dependent]"),
    aot.Job("sm_90", "sample_step.draw[fp32,v1]"),
    aot.Job("sm_90", "tree_attention[d128,m64,bf16,32x4x5]"),
    aot.Job("sm_100", "tree_attention[d64,m64,bf16]"),
    aot.Job("sm_100", "tree_attention[d128,m16,fp16,split]"),
]


@pytest.fixture(scope="module")
def jobs():
    return aot.jobs_for(kernels=NEAREST_TO_THE_GATE) + BESIDES


def test_every_kernel_compiles_for_every_target_and_passes_the_gate(jobs, pytestconfig):
    kept = getattr(pytestconfig, "cache", None)  # from run to run: Triton compiles what has changed
    records = aot.compile_all(jobs, cache=kept and kept.mkdir("triton"))
    assert [(record.target, record.kernel) for record in records] == jobs
    assert aot.failures(records) == []


def test_no_kernel_is_left_out_for_any_target(jobs):
    every = aot.jobs_for()
    assert set(jobs) <= set(every) and {job.target for job in every} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    compiled, there_are = ({(job.target, job.kernel.partition("[")[0]) for job in some} for some in (jobs, every))
    assert compiled == there_are


def test_every_operator_with_a_triton_kernel_is_compiled():
    families = {re.split(r"\W", job.kernel)[0] for job in aot.jobs_for(["sm_90"])}
    assert families == {
        "gather_logprobs",
        "kv_append",
        "rotary_append",
        "sample_step",
        "select_and_commit",
        "skinny_product",
        "tree_attention",
    }
    parts = {job.kernel.partition("[")[0] for job in aot.jobs_for(["sm_90"], ["sample_step"])}
    assert parts == {"sample_step.draw", "sample_step.tile_sums"}


@pytest.mark.parametrize(
    ("record", "wrong"),
    [
        (GOOD._replace(spill_bytes=33), "select_and_commit on sm_90 spills 33 bytes a thread, at most 32 are allowed"),
        (GOOD._replace(shared_bytes=300000), "select_and_commit on sm_90 needs 300000 bytes of shared memory"),
    ],
)
def test_the_gate_names_what_spills_or_does_not_fit(record, wrong):
    assert aot.failures([GOOD, GOOD._replace(spill_bytes=32)]) == []
    (failure,) = aot.failures([GOOD, record])
    assert failure.startswith(wrong)


def test_the_gate_names_a_kernel_without_its_matrix_instruction(monkeypatch):
    variant = aot.variants_for("sm_90")["select_and_commit"]._replace(needs_matrix=True)
    monkeypatch.setattr(aot, "variants_for", lambda target: {"select_and_commit": variant})
    assert aot.failures([GOOD]) == ["select_and_commit on sm_90 uses no matrix instruction"]
    assert aot.failures([GOOD._replace(matrix_instruction="wgmma")]) == []


@pytest.mark.parametrize(("buffers", "waits"), [([1, 2], [0, 4]), ([1, 1], [None, None]), ([2, 2], [0, 0]), ([], [])])
def test_the_gate_names_a_tile_that_claims_to_pipeline_and_does_not(buffers, waits):
    record = GOOD._replace(kernel=DECODE, matrix_instruction="mma.sync", buffers=[2, 2], waits=[3, 1])
    assert aot.failures([record]) == []
    (failure,) = aot.failures([record._replace(buffers=buffers, waits=waits)])
    assert failure.startswith(f"{DECODE} on sm_90 claims to pipeline, but its loops have {buffers} buffers")


@pytest.mark.parametrize(
    ("kernel", "target", "matrix", "loops"),
    [(DECODE, "sm_90", "mma.sync", 2), ("select_and_commit", "gfx942", None, 0)],
)
def test_the_command_prints_a_record_of_a_compiled_kernel(kernel, target, matrix, loops, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # what this process is set to does not reach the compiler
    result = CliRunner().invoke(app, ["kernels", "--json", "--kernel", kernel, "--target", target])
    assert result.exit_code == 0, result.output
    (record,) = json.loads(result.stdout)
    assert tuple(record) == aot.Record._fields
    assert (record["kernel"], record["target"], record["matrix_instruction"]) == (kernel, target, matrix)
    assert 8 < record["registers"] < 256 and record["spill_bytes"] == 0 and record["seconds"] > 0
    assert len(record["buffers"]) == len(record["waits"]) == loops
    assert all(buffers > 1 for buffers in record["buffers"]) and all(wait > 0 for wait in record["waits"])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--target", "sm_20"], "no target 'sm_20'; there are sm_80, sm_90, sm_100, gfx942"),
        (["--kernel", "matmul"], "no kernel 'matmul'; there are"),
    ],
)
def test_what_does_not_exist_is_refused_with_what_does(option, message):
    result = CliRunner().invoke(app, ["kernels", *option])
    assert result.exit_code == 2
    assert message in result.stderr


def test_the_command_fails_and_names_the_offender(monkeypatch):
    monkeypatch.setattr(aot, "compile_all", lambda jobs, done: [GOOD._replace(spill_bytes=344)])
    result = CliRunner().invoke(app, ["kernels", "--kernel", "select_and_commit", "--target", "sm_90"])
    assert result.exit_code == 1
    assert "344" in result.stdout
    assert "error: select_and_commit on sm_90 spills 344 bytes" in result.stderr


def test_without_triton_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "triton", None)
    result = CliRunner().invoke(app, ["kernels"])
    assert result.exit_code == 1
    assert "pip install triton" in result.stderr


def test_a_kernel_that_does_not_compile_is_named_and_the_rest_is_compiled():
    done = []
    jobs = [aot.Job("sm_90", "no_such_kernel"), aot.Job("sm_90", "select_and_commit")]
    with pytest.raises(RuntimeError, match=r"^no_such_kernel does not compile for sm_90: KeyError"):
        aot.compile_all(jobs, processes=1, done=done.append)
    assert [record.kernel for record in done] == ["select_and_commit"]


def test_a_compiler_that_crashes_is_named_with_its_last_words(monkeypatch):
    monkeypatch.setattr(aot.sys, "executable", "/bin/false")
    with pytest.raises(
        RuntimeError, match="select_and_commit does not compile for sm_90: the compiler ended with code 1"
    ):
        aot.compile_all([aot.Job("sm_90", "select_and_commit")])

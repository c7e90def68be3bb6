"""Random numbers inside kernels: the published integers, and the reference's noise."""

import importlib

import pytest
import torch
from conftest import KERNEL_DEVICE
from test_philox import KNOWN_ANSWERS, signed, words

from stars_fast.ops.philox import Stream, gumbel_noise, philox4x32, philox_key, uniform

triton = pytest.importorskip("triton")
tl = triton.language
philox = importlib.import_module("stars_fast.kernels.philox")


@triton.jit
def philox_kernel(keys, counters, out, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    counter = counters + 4 * i
    w0, w1, w2, w3 = philox.philox4x32(
        tl.load(keys + i), tl.load(counter), tl.load(counter + 1), tl.load(counter + 2), tl.load(counter + 3)
    )
    tl.store(out + 4 * i, w0.to(tl.int64))
    tl.store(out + 4 * i + 1, w1.to(tl.int64))
    tl.store(out + 4 * i + 2, w2.to(tl.int64))
    tl.store(out + 4 * i + 3, w3.to(tl.int64))


@triton.jit
def noise_kernel(keys, segment, attempt, position, first, out, STREAM: tl.constexpr, COUNT: tl.constexpr):
    row = tl.program_id(0)
    noise = philox.gumbel_noise(
        tl.load(keys + row),
        tl.load(segment + row),
        tl.load(attempt + row),
        tl.load(position + row),
        STREAM,
        tl.load(first + row),
        COUNT,
    )
    tl.store(out + row * COUNT + tl.arange(0, COUNT), noise)


@triton.jit
def uniform_kernel(keys, segment, attempt, out, ACCEPT: tl.constexpr):
    row = tl.program_id(0)
    uniform = philox.acceptance_uniform(tl.load(keys + row), tl.load(segment + row), tl.load(attempt + row), ACCEPT)
    tl.store(out + row, uniform)


def integers(keys, counters):
    out = torch.full((len(keys), 4), -1, device=KERNEL_DEVICE)
    philox_kernel[(1,)](keys.to(KERNEL_DEVICE), counters.to(KERNEL_DEVICE), out, COUNT=len(keys))
    return out.cpu()


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter, key, answer):
    low, high = words(key)
    ours = integers(torch.tensor([signed(low | high << 32)]), torch.tensor([words(counter)]))
    assert tuple(ours[0].tolist()) == words(answer)


def test_integers_are_the_references_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(-(2**63), 2**63 - 1, (256, 5), generator=generator)
    keys, counters = draws[:, 0].contiguous(), draws[:, 1:].contiguous()
    assert torch.equal(integers(keys, counters), philox4x32(keys, tuple(counters.unbind(1))))


@pytest.mark.parametrize("stream", [int(stream) for stream in Stream])
def test_noise_is_the_references(stream):
    rows, count = 6, 256
    generator = torch.Generator().manual_seed(stream)
    keys = torch.tensor([philox_key(stream, row, 2) for row in range(rows)])
    words = torch.randint(-(2**31), 2**31 - 1, (3, rows), generator=generator, dtype=torch.int32)
    first = torch.tensor([0, 4, 1024, 151_552, 2**19 - 256, 2**28 - 256])
    out = torch.full((rows, count), torch.nan, device=KERNEL_DEVICE)
    arguments = (tensor.to(KERNEL_DEVICE) for tensor in (keys, *words, first))
    noise_kernel[(rows,)](*arguments, out, STREAM=stream, COUNT=count)
    torch.testing.assert_close(out.cpu(), gumbel_noise(keys, *words, stream, first, count), rtol=1e-6, atol=2.5e-7)


def test_acceptance_uniforms_are_the_references_bit_for_bit():
    keys = torch.tensor([philox_key(7, row, 0) for row in range(32)])
    segment, attempt = torch.arange(32, dtype=torch.int32), torch.arange(32, dtype=torch.int32) * 3 - 5
    out = torch.full((32,), torch.nan, dtype=torch.float64, device=KERNEL_DEVICE)
    uniform_kernel[(32,)](*(t.to(KERNEL_DEVICE) for t in (keys, segment, attempt)), out, ACCEPT=int(Stream.ACCEPT))
    assert torch.equal(out.cpu(), uniform(keys, segment, attempt))

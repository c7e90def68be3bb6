"""Random numbers: the published integers, the law of the noise, and keys that differ."""

import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from scipy import stats

from stars_fast.ops._library import native
from stars_fast.ops.philox import (
    Domain,
    Stream,
    choice_noise,
    gumbel,
    gumbel_noise,
    philox4x32,
    philox_key,
    uniform,
    uniform_number,
)

HEADER = Path(__file__).resolve().parents[1] / "csrc/philox.h"
# Random123 (D. E. Shaw Research), tests/kat_vectors, philox4x32 with 10 rounds: counter, key, answer.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return tuple(int(word, 16) for word in text.split())


def signed(value):
    return value - (1 << 64) if value >> 63 else value


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter, key, answer):
    low, high = words(key)
    value = low | high << 32
    assert tuple(philox4x32(torch.tensor(signed(value)), words(counter)).tolist()) == words(answer)
    if compiled := native("philox4x32"):
        assert tuple(compiled(value, words(counter))) == words(answer)


def test_compiled_numbers_are_the_reference_numbers():
    compiled, compiled_gumbel = native("philox4x32"), native("gumbel")
    if not compiled:
        pytest.skip("stars_fast._C is not built")
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(-(2**63), 2**63 - 1, (100, 5), generator=generator)
    bits = philox4x32(draws[:, 0], tuple(draws[:, 1:].unbind(1)))
    for row, expected in zip(draws.tolist(), bits.tolist(), strict=True):
        key, *counter = row
        assert compiled(key % 2**64, [word % 2**32 for word in counter]) == expected
    edges = [0, 1, 2, 255, 2**31, 2**32 - 256, 2**32 - 1]
    sample = torch.tensor([*edges, *bits.flatten().tolist()])
    ours = torch.tensor([compiled_gumbel(value) for value in sample.tolist()])
    torch.testing.assert_close(ours, gumbel(sample), rtol=1e-6, atol=2e-7)


def test_keys_differ_in_every_argument():
    keys = [philox_key(*arguments) for arguments in itertools.product(range(-3, 3), range(6), range(6), range(3))]
    assert len(set(keys)) == len(keys)
    assert all(-(2**63) <= key < 2**63 for key in keys)
    assert philox_key(2**64 + 5, 0, 0) == philox_key(5, 0, 0) == philox_key(5, 0, 0, 0)


def test_streams_and_domains_never_share_a_number():
    keys = torch.tensor([philox_key(0, 0, 0, domain) for domain in Domain.__members__.values()])
    places = torch.tensor([0, 1, 2**28 - 1])  # within a stream: blocks of tiles, of ids, or none
    streams = torch.tensor(list(Stream.__members__.values()))
    blocks = philox4x32(keys[:, None, None], (3, 4, 5, streams[:, None] << 28 | places)).flatten(0, -2)
    assert len(blocks.unique(dim=0)) == len(blocks) == 3 * len(Stream) * 3


def test_cpp_names_its_streams_alike():
    spelled = dict(re.findall(r"\bk(\w+) = (\d+)", HEADER.read_text()))
    assert {name.upper(): int(number) for name, number in spelled.items()} == {
        stream.name: stream for stream in (Stream.TILE, Stream.TOKEN, Stream.ACCEPT)
    }


def test_a_single_number_is_that_of_the_tensors():
    for key, segment, attempt in itertools.product((philox_key(3, 1, 0), philox_key(4, 1, 0)), (0, 7), (0, 2**31 - 1)):
        numbers = uniform(torch.tensor(key), torch.tensor(segment), torch.tensor(attempt), stream=Stream.CUT)
        assert uniform_number(key, segment, attempt, Stream.CUT) == numbers.item()


def noise(rows, count, *, stream=Stream.TOKEN, first=0):
    zeros = torch.zeros(rows, dtype=torch.int32)
    keys = torch.tensor([philox_key(0, row, 0) for row in range(rows)])
    return gumbel_noise(keys, zeros, zeros, zeros, stream, torch.full((rows,), first), count)


def test_noise_is_gumbel():
    assert stats.kstest(noise(64, 4096).flatten().double().numpy(), "gumbel_r").pvalue > 1e-3


def test_an_index_has_the_same_noise_wherever_the_tile_begins():
    assert torch.equal(noise(3, 4096)[:, 1024:2048], noise(3, 1024, first=1024))
    assert not torch.equal(noise(3, 1024), noise(3, 1024, stream=Stream.TILE))


def test_the_winning_tail_has_full_resolution():
    # A 24-bit uniform would end at 24 log(2) = 16.6; 32 bits and a half reach 33 log(2) = 22.9, every step its own.
    compiled = native("gumbel")
    for values in (gumbel(torch.arange(1000)).tolist(), [compiled(bits) for bits in range(1000)] if compiled else None):
        if values is not None:
            assert values == sorted(set(values), reverse=True)
            assert math.isclose(values[0], 33 * math.log(2), rel_tol=1e-6)
    smallest = gumbel(torch.tensor([2**32 - 1])).item()
    assert math.isclose(smallest, -math.log(24 * math.log(2)), rel_tol=1e-5)


def test_uniforms_are_uniform_and_never_0_or_1():
    attempts = torch.arange(20_000, dtype=torch.int32)
    keys = torch.full((20_000,), philox_key(7, 0, 0))
    uniforms = uniform(keys, torch.zeros_like(attempts), attempts)
    assert stats.kstest(uniforms.numpy(), "uniform").pvalue > 1e-3
    assert uniforms.min() > 0 and uniforms.max() < 1


def test_noise_for_a_choice_is_gumbel_and_has_nothing_to_do_with_acceptance():
    attempts = torch.arange(20_000, dtype=torch.int32)
    names = torch.full((20_000,), philox_key(7, 0, 0)), torch.zeros_like(attempts), attempts
    noise = choice_noise(*names).numpy()
    assert stats.kstest(noise, "gumbel_r").pvalue > 1e-3
    assert stats.spearmanr(noise, uniform(*names).numpy()).pvalue > 1e-3

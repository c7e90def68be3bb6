"""Philox4x32-10 and Gumbel noise inside kernels: the numbers of :mod:`stars_fast.ops.philox`."""

import triton
import triton.language as tl

from .row_math import log_positive


@triton.jit
def philox4x32(key, c0, c1, c2, c3):
    """Four uint32 words; ``key`` int64 and the counter words (any integers, low 32 bits count) broadcast together."""
    key0, key1 = (key & 0xFFFFFFFF).to(tl.uint32), ((key >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c0, c1, c2, c3 = c0.to(tl.uint32), c1.to(tl.uint32), c2.to(tl.uint32), c3.to(tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, tl.full((), 0xD2511F53, tl.uint32)), c0 * tl.full((), 0xD2511F53, tl.uint32)
        high1, low1 = tl.umulhi(c2, tl.full((), 0xCD9E8D57, tl.uint32)), c2 * tl.full((), 0xCD9E8D57, tl.uint32)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = key0 + tl.full((), 0x9E3779B9, tl.uint32), key1 + tl.full((), 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def gumbel(bits):
    """Standard Gumbel noise float32 from 32 random bits each: ``-log(-log1p(-v))``."""
    v = tl.minimum(bits.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10, 0.999999940395355225)
    u = 1.0 - v
    # The second term is what rounding took from u: v near 0 decides the winners.
    return -log_positive(tl.div_rn((u - 1.0) + v, u) - log_positive(u))


@triton.jit
def gumbel_noise(key, segment, attempt, position, STREAM: tl.constexpr, first, COUNT: tl.constexpr):
    """Noise float32 ``[COUNT]`` of indices ``first`` to ``first + COUNT - 1``, multiples of 4 both.

    Index i takes word ``i % 4`` of block ``i // 4``.
    """
    block = first // 4 + tl.arange(0, COUNT // 4)
    zero = tl.zeros((COUNT // 4,), tl.int32)
    w0, w1, w2, w3 = philox4x32(key, segment + zero, attempt + zero, position + zero, block | (STREAM << 28))
    # Interleaved back to the order of the indices: the words of a block lie side by side.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [blocks, 2, 2], last axis first bit of the word's number
    return gumbel(tl.reshape(words, (COUNT,)))


@triton.jit
def acceptance_uniform(key, segment, attempt, ACCEPT: tl.constexpr):
    """The uniform that decides whether a candidate is accepted, float64 inside (0, 1), shape of ``attempt``."""
    zero = attempt * 0
    bits, _, _, _ = philox4x32(key, segment + zero, attempt, zero, zero | (ACCEPT << 28))
    return (bits.to(tl.float64) + 0.5) * 2.3283064365386963e-10

"""Sums over rows of logits, and arithmetic that the hardware has only approximately. As in ``csrc/row_math.h``."""

import triton
import triton.language as tl


@triton.jit
def log_positive(x):
    """log of normal positive float32, error about 1 ulp: ``lg2.approx`` has none left near 1. (Cephes' polynomial.)"""
    bits = x.to(tl.int32, bitcast=True)
    above = ((bits & 0x007FFFFF) + (0x00800000 - 0x003504F3)) >> 23  # 1 for a mantissa at or above sqrt(2)
    exponent = ((bits >> 23) - 127 + above).to(tl.float32)
    m = ((bits & 0x007FFFFF) | ((127 - above) << 23)).to(tl.float32, bitcast=True) - 1.0
    z = m * m
    p = m * 7.0376836292e-2 - 1.1514610310e-1
    p = p * m + 1.1676998740e-1
    p = p * m - 1.2420140846e-1
    p = p * m + 1.4249322787e-1
    p = p * m - 1.6668057665e-1
    p = p * m + 2.0000714765e-1
    p = p * m - 2.4999993993e-1
    p = p * m + 3.3333331174e-1
    p = p * m * z - exponent * 2.12194440e-4 - 0.5 * z
    return (m + p) + exponent * 0.693359375


@triton.jit
def row_sum(maxima, totals):
    """Maximum of a row, and float64 sum of exp(x - max), from those of its tiles.

    A tile with nothing in it has -inf for a maximum, and anything for a sum.
    """
    maximum = tl.max(maxima, 0)
    finite = maxima > float("-inf")
    shift = tl.where(finite, maxima.to(tl.float64) - maximum.to(tl.float64), 0.0)
    return maximum, tl.sum(tl.where(finite, tl.exp(shift) * totals.to(tl.float64), 0.0), 0)


@triton.jit
def row_weighted_sum(maxima, totals, weighted):
    """float64 sum of (x - max) exp(x - max) over a row from those of its tiles."""
    finite = maxima > float("-inf")
    shift = tl.where(finite, maxima.to(tl.float64) - tl.max(maxima, 0).to(tl.float64), 0.0)
    shifted = tl.exp(shift) * (weighted.to(tl.float64) + shift * totals.to(tl.float64))
    return tl.sum(tl.where(finite, shifted, 0.0), 0)


@triton.jit
def ordered_bits(x):
    """int32 in the order of the float32, and its own inverse but for the types."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_ordered_bits(order):
    """float32 of :func:`ordered_bits`."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def pivots_between(smallest, largest, PIVOTS: tl.constexpr):
    """float32 ``[PIVOTS]`` in [smallest, largest): at equal distances, the last one in the middle of the bit patterns.

    Whatever the arithmetic does to the ends of the float32 range, and to zeros of both signs, is put back inside.
    """
    j = tl.arange(0, PIVOTS)
    pivots = smallest + (largest - smallest) * ((j + 1).to(tl.float32) / PIVOTS)
    middle = (ordered_bits(smallest).to(tl.int64) + ordered_bits(largest).to(tl.int64)) >> 1
    pivots = tl.where(j == PIVOTS - 1, from_ordered_bits(middle.to(tl.int32)), pivots)
    return tl.where((pivots > smallest) & (pivots < largest), pivots, smallest)


@triton.jit
def min_p_threshold(top, min_p):
    """The smallest float32 x with x - top >= log(min_p) in float64: one of three neighbours."""
    bound = tl.log(min_p.to(tl.float64))
    order = ordered_bits((top.to(tl.float64) + bound).to(tl.float32))
    threshold = from_ordered_bits(order + 1)
    for step in tl.static_range(2):
        lower = from_ordered_bits(order - step)
        threshold = tl.where(lower.to(tl.float64) - top.to(tl.float64) >= bound, lower, threshold)
    return threshold

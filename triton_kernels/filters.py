"""What the filters of a sampling step keep of one row, without a sort: all of them keep what reaches a threshold.

The candidates for it are gathered into a list in one pass over the row; pivots then close in on it there.
"""

import triton
import triton.language as tl

from .row_math import pivots_between


@triton.jit
def processed_logits(logits, seen, index, count, penalty, temperature):
    """Raw and processed float32 at ``index`` of the row that the pointers begin with; -inf from ``count`` on."""
    exists = index < count
    raw = tl.load(logits + index, exists, other=float("-inf")).to(tl.float32)
    processed = raw
    if seen is not None:
        if penalty != 1:
            penalised = tl.where(raw < 0, raw * penalty, tl.div_rn(raw, penalty))
            processed = tl.where(tl.load(seen + index, exists, other=0) != 0, penalised, raw)
    if temperature != 1:
        processed = tl.div_rn(processed, temperature)  # `/` is approximate on GPUs
    return raw, processed


@triton.jit
def _block(start, kept, listed, count, logits, seen, penalty, temperature, BLOCK: tl.constexpr):
    """Processed logits from ``start`` on: of a list or, where it was too long to keep, of the row."""
    index = start + tl.arange(0, BLOCK)
    if listed:
        x = tl.load(kept + index, index < count, other=float("-inf"))
    else:
        x = processed_logits(logits, seen, index, count, penalty, temperature)[1]
    return x


@triton.jit
def _gather(
    target,
    kept,
    listed,
    count,
    logits,
    seen,
    penalty,
    temperature,
    top,
    domain,
    least,
    above,
    upto,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy what is at least ``least`` and in (above, upto] to ``target``, as far as CAPACITY reaches.

    Returns how many there are, the smallest, the largest, and the mass of all that is at least ``domain``, relative to
    ``top``. In place, stores never overtake loads: a block's places are known when all of it has been read.
    """
    found = tl.full((), 0, tl.int32)
    smallest = tl.full((BLOCK,), float("inf"), tl.float32)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK,), tl.float64)
    for start in tl.range(0, count, BLOCK, num_stages=3):
        x = _block(start, kept, listed, count, logits, seen, penalty, temperature, BLOCK)
        inside = (x >= least) & (x > above) & (x <= upto)
        place = found + tl.cumsum(inside.to(tl.int32), 0) - 1
        tl.store(target + place, x, inside & (place < CAPACITY))
        found += tl.sum(inside.to(tl.int32), 0)
        smallest = tl.minimum(smallest, tl.where(inside, x, float("inf")))
        largest = tl.maximum(largest, tl.where(inside, x, float("-inf")))
        mass += tl.where(x >= domain, tl.exp(x - top), 0.0).to(tl.float64)
    tl.debug_barrier()  # other threads load what this one has stored
    return found, tl.min(smallest, 0), tl.max(largest, 0), tl.sum(mass, 0)


@triton.jit
def _smallest_kept(
    work,
    kept,
    listed,
    count,
    logits,
    seen,
    penalty,
    temperature,
    vocab,
    top,
    least,
    budget,
    total,
    WEIGHTED: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
    PIVOTS: tl.constexpr,
):
    """The smallest of the logits from ``least`` on whose strictly greater ones stay below a budget; else the largest.

    They number less than ``budget`` or, if WEIGHTED, weigh less than ``budget`` times ``total``, a negative one
    standing for the mass of all these logits. Weights are float32, as a row is too long for one program to compute
    float64 exponentials of; their sums are float64.

    Invariant: the answer is one of the logits in [smallest, largest], and ``greater`` measures those above. A pivot in
    [smallest, largest) makes one of the ends move inwards. The last pivot lies in the middle of the ordered bit
    patterns between them: each round halves their number, so that 33 rounds suffice for any row. Those at equal
    distances need about four.
    """
    above, upto = tl.full((), float("-inf"), tl.float32), tl.full((), float("inf"), tl.float32)
    found, smallest, largest, mass = _gather(
        work, kept, listed, count, logits, seen, penalty, temperature, top, least, least, above, upto, CAPACITY, BLOCK
    )
    wanted = budget
    if WEIGHTED:
        wanted = budget * tl.where(total < 0, mass, total)
    greater = tl.zeros((), tl.float64)
    while smallest < largest:
        in_work = found <= CAPACITY
        length = tl.where(in_work, found, vocab)
        pivots = pivots_between(smallest, largest, PIVOTS)
        measure = greater + tl.zeros((PIVOTS,), tl.float64)
        for start in range(0, length, BLOCK):
            x = _block(start, work, in_work, length, logits, seen, penalty, temperature, BLOCK)
            inside = (x >= least) & (x > above) & (x <= upto)
            weight = inside.to(tl.float64)
            if WEIGHTED:
                weight = tl.where(inside, tl.exp(x - top), 0.0).to(tl.float64)
            measure += tl.sum(tl.where(x[:, None] > pivots[None, :], weight[:, None], 0.0), 0)
        over = measure >= wanted  # the answer is above this pivot
        above = tl.maximum(above, tl.max(tl.where(over, pivots, float("-inf")), 0))
        upto = tl.minimum(upto, tl.min(tl.where(over, float("inf"), pivots), 0))
        greater = tl.max(tl.where(over, greater, measure), 0)
        found, smallest, largest, mass = _gather(
            work, work, in_work, length, logits, seen, penalty, temperature, top, least, least, above, upto, CAPACITY,
            BLOCK,
        )  # fmt: skip
    return largest


@triton.jit
def _floor(maxima, top, total, vocab, top_k, top_p):
    """A value that the thresholds of top-k and top-p do not fall below, to gather candidates from.

    The k-th largest logit is at least the k-th largest maximum of a tile. What is below ``top + log(m / vocab)`` weighs
    less than m; with half the mass that top-p removes for m, rounding does no harm.
    """
    depth = 0.25 * tl.exp2(tl.arange(0, 64).to(tl.float32) / 6)  # to 362 nats
    bars = top - depth
    reaching = tl.sum((maxima[:, None] >= bars[None, :]).to(tl.int32), 0)
    by_rank = tl.max(tl.where(reaching >= top_k, bars, float("-inf")), 0)
    removed = 0.5 * (1.0 - tl.maximum(top_p, 0.0)) * total.to(tl.float32) / vocab
    by_mass = top + tl.log(removed)
    return tl.where(top_k > 0, by_rank, by_mass)


@triton.jit
def rank_threshold(
    lists,
    maxima,
    logits,
    seen,
    penalty,
    temperature,
    vocab,
    top,
    total,
    top_k,
    top_p,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
    PIVOTS: tl.constexpr,
):
    """The smallest logit that top-k, and then top-p among what that leaves, keep."""
    work, infinite = lists + CAPACITY, tl.full((), float("inf"), tl.float32)
    least = _floor(maxima, top, total, vocab, top_k, top_p)
    found, _, _, total = _gather(
        lists, lists, False, vocab, logits, seen, penalty, temperature, top, -infinite, least, -infinite, infinite,
        CAPACITY, BLOCK,
    )  # fmt: skip
    listed = found <= CAPACITY
    count = tl.where(listed, found, vocab)
    threshold = least
    if top_k > 0:
        threshold = _smallest_kept(
            work, lists, listed, count, logits, seen, penalty, temperature, vocab, top, least, top_k.to(tl.float64),
            total, False, CAPACITY, BLOCK, PIVOTS,
        )  # fmt: skip
        total = tl.full((), -1.0, tl.float64)
    if top_p < 1:
        threshold = _smallest_kept(
            work, lists, listed, count, logits, seen, penalty, temperature, vocab, top, threshold,
            top_p.to(tl.float64), total, True, CAPACITY, BLOCK, PIVOTS,
        )  # fmt: skip
    return threshold

"""What the filters of a sampling step keep of one row, without a sort: all of them keep what reaches a threshold.

Pivots close in on it, first in the row and then in lists of what lies between the two nearest, which are short.

A row's program has LANES lanes, a thread each. A lane sums and lists what it reads itself, in a part of the list of
its own, so that no pass over a row or a list has a step that threads wait for each other in.
"""

import triton
import triton.language as tl

from .row_math import pivots_between

LANES = tl.constexpr(256)
EACH = tl.constexpr(4)  # elements that a lane reads with one instruction
TILE_LANES = tl.constexpr(64)  # that read a tile together, with four instructions each


@triton.jit
def _penalised(raw, seen, penalty):
    return tl.where(seen != 0, tl.where(raw < 0, raw * penalty, tl.div_rn(raw, penalty)), raw)


@triton.jit
def processed_logits(logits, seen, index, count, penalty, temperature):
    """Raw and processed float32 at ``index`` of the row that the pointers begin with; -inf from ``count`` on."""
    exists = index < count
    raw = tl.load(logits + index, exists, other=float("-inf")).to(tl.float32)
    processed = raw
    if seen is not None:
        if penalty != 1:
            processed = _penalised(raw, tl.load(seen + index, exists, other=0), penalty)
    if temperature != 1:
        processed = tl.div_rn(processed, temperature)  # `/` is approximate on GPUs
    return raw, processed


@triton.jit
def reaching_tiles(ids, maxima, bar, TILES: tl.constexpr):
    """Write the numbers of the tiles whose maxima reach ``bar`` to ``ids``, as float32; returns how many there are."""
    reaching = maxima >= bar
    tl.debug_barrier()  # what is overwritten has been read
    place = tl.cumsum(reaching.to(tl.int32), 0) - 1
    tl.store(ids + place, tl.arange(0, TILES).to(tl.float32), reaching)
    tl.debug_barrier()  # other threads load what this one has stored
    return tl.sum(reaching.to(tl.int32), 0)


@triton.jit
def tiles_of_row(ids, start, reaching, logits, seen, vocab, penalty, temperature, TILE_SIZE: tl.constexpr):
    """Processed logits ``[LANES, 4 * EACH]`` of the four tiles in ``ids`` from ``start`` on; -inf where none is."""
    lane = tl.arange(0, LANES)
    nth = start + lane // TILE_LANES
    tile = tl.load(ids + nth, nth < reaching, other=0.0).to(tl.int32)
    tile = tl.where(nth < reaching, tile, tl.cdiv(vocab, TILE_SIZE))  # which there is not: nothing is read
    index = (tile * TILE_SIZE + lane % TILE_LANES * EACH)[:, None] + tl.arange(0, EACH)[None, :]
    x = _four(logits, index, vocab, float("-inf")).to(tl.float32)
    if seen is not None:
        if penalty != 1:
            x = _penalised(x, _four(seen, index, vocab, 0), penalty)
    if temperature != 1:
        x = tl.div_rn(x, temperature)
    return x


@triton.jit
def _four(pointer, index, count, other):
    """What four loads find that all lanes of a tile make, one behind the other; joined, so that all are under way."""
    span: tl.constexpr = TILE_LANES * EACH
    a = tl.load(pointer + index, index < count, other=other)
    b = tl.load(pointer + index + span, index + span < count, other=other)
    c = tl.load(pointer + index + 2 * span, index + 2 * span < count, other=other)
    d = tl.load(pointer + index + 3 * span, index + 3 * span < count, other=other)
    return tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), (LANES, 4 * EACH))


@triton.jit
def _of_list(list, start, lengths, depth):
    """Logits ``[LANES, EACH]`` of every lane's part of a list from ``start`` on; -inf beyond its length."""
    lane, each = tl.arange(0, LANES), tl.arange(0, EACH)
    nth = start + each[None, :]
    return tl.load(list + lane[:, None] * depth + nth, nth < lengths[:, None], other=float("-inf"))


@triton.jit
def _measured(x, top, domain, upto, a, b, c, d, of_a, of_b, of_c, of_d, of_all, WEIGHTED: tl.constexpr):
    """Every lane's measures of what is greater than each of four pivots, and of the domain, with those of x added."""
    if WEIGHTED:
        weight = tl.exp(x - top).to(tl.float64)
        of_all += tl.sum(tl.where(x >= domain, weight, 0.0), 1)
    else:
        weight = tl.full(x.shape, 1, tl.int32)
    weight = tl.where(x <= upto, weight, 0)
    of_a += tl.sum(tl.where(x > a, weight, 0), 1)
    of_b += tl.sum(tl.where(x > b, weight, 0), 1)
    of_c += tl.sum(tl.where(x > c, weight, 0), 1)
    of_d += tl.sum(tl.where(x > d, weight, 0), 1)
    return of_a, of_b, of_c, of_d, of_all


@triton.jit
def _copied(x, target, lengths, depth, least, above, upto, smallest, largest):
    """Append what of x is at least ``least`` and in (above, upto] to every lane's part of ``target``, up to ``depth``.

    Returns how long the parts would be, and every lane's smallest and largest.
    """
    inside = (x >= least) & (x > above) & (x <= upto)
    one = inside.to(tl.int32)
    place = lengths[:, None] + tl.cumsum(one, 1) - 1
    lane = tl.arange(0, LANES)
    tl.store(target + lane[:, None] * depth + place, x, inside & (place < depth))
    smallest = tl.minimum(smallest, tl.min(tl.where(inside, x, float("inf")), 1))
    largest = tl.maximum(largest, tl.max(tl.where(inside, x, float("-inf")), 1))
    return lengths + tl.sum(one, 1), smallest, largest


@triton.jit
def _measure(
    list,
    listed,
    lengths,
    depth,
    ids,
    reaching,
    logits,
    seen,
    vocab,
    penalty,
    temperature,
    top,
    domain,
    upto,
    pivots,
    WEIGHTED: tl.constexpr,
    TILE_SIZE: tl.constexpr,
):
    """How many of the list or row are greater than each of four pivots, and at most ``upto``; or, if WEIGHTED, their
    mass relative to ``top``, and that of all that is at least ``domain``."""
    nth = tl.arange(0, 4)
    a = tl.max(tl.where(nth == 0, pivots, float("-inf")), 0)
    b = tl.max(tl.where(nth == 1, pivots, float("-inf")), 0)
    c = tl.max(tl.where(nth == 2, pivots, float("-inf")), 0)
    d = tl.max(tl.where(nth == 3, pivots, float("-inf")), 0)
    of_a = tl.zeros((LANES,), tl.float64 if WEIGHTED else tl.int32)
    of_b, of_c, of_d, of_all = of_a, of_a, of_a, of_a
    if listed:
        for start in range(0, tl.max(lengths, 0), EACH):
            x = _of_list(list, start, lengths, depth)
            of_a, of_b, of_c, of_d, of_all = _measured(
                x, top, domain, upto, a, b, c, d, of_a, of_b, of_c, of_d, of_all, WEIGHTED
            )
    else:
        for start in range(0, reaching, LANES // TILE_LANES):
            x = tiles_of_row(ids, start, reaching, logits, seen, vocab, penalty, temperature, TILE_SIZE)
            of_a, of_b, of_c, of_d, of_all = _measured(
                x, top, domain, upto, a, b, c, d, of_a, of_b, of_c, of_d, of_all, WEIGHTED
            )
    measure = tl.where(
        nth < 2,
        tl.where(nth == 0, tl.sum(of_a, 0), tl.sum(of_b, 0)),
        tl.where(nth == 2, tl.sum(of_c, 0), tl.sum(of_d, 0)),
    )
    return measure.to(tl.float64), tl.sum(of_all, 0).to(tl.float64)


@triton.jit
def _gather(
    target,
    list,
    listed,
    lengths,
    depth,
    new_depth,
    ids,
    reaching,
    logits,
    seen,
    vocab,
    penalty,
    temperature,
    least,
    above,
    upto,
    TILE_SIZE: tl.constexpr,
):
    """Copy what is at least ``least`` and in (above, upto] from the list or row to ``target``.

    Returns how long every lane's part is, more than ``new_depth`` where it does not fit, the smallest and the largest.
    In place, a lane stores no further than it has loaded.
    """
    found = tl.zeros((LANES,), tl.int32)
    smallest = tl.full((LANES,), float("inf"), tl.float32)
    largest = tl.full((LANES,), float("-inf"), tl.float32)
    if listed:
        for start in range(0, tl.max(lengths, 0), EACH):
            x = _of_list(list, start, lengths, depth)
            found, smallest, largest = _copied(x, target, found, new_depth, least, above, upto, smallest, largest)
    else:
        for start in range(0, reaching, LANES // TILE_LANES):
            x = tiles_of_row(ids, start, reaching, logits, seen, vocab, penalty, temperature, TILE_SIZE)
            found, smallest, largest = _copied(x, target, found, new_depth, least, above, upto, smallest, largest)
    tl.debug_barrier()  # other threads may load what this one has stored
    return found, tl.min(smallest, 0), tl.max(largest, 0)


@triton.jit
def _smallest_kept(
    work,
    list,
    listed,
    lengths,
    depth,
    work_depth,
    ids,
    reaching,
    logits,
    seen,
    vocab,
    penalty,
    temperature,
    top,
    least,
    domain,
    budget,
    WEIGHTED: tl.constexpr,
    TILE_SIZE: tl.constexpr,
):
    """The smallest of the logits from ``least`` on whose strictly greater ones stay below a budget; else the largest.

    They number less than ``budget`` or, if WEIGHTED, weigh less than ``budget`` times the mass of the logits from
    ``domain`` on. Weights are float32, as a row is too long for one program to compute float64 exponentials of; their
    sums are float64.

    Invariant: the answer is one of the logits in [smallest, largest], and ``greater`` measures those above. A pivot in
    [smallest, largest) makes one of the ends move inwards. The last pivot lies in the middle of the ordered bit
    patterns between them: each round halves their number, so that 33 rounds suffice for any row. Those at equal
    distances need about six. Only the first two passes are over the row, unless what the first leaves is too long.
    """
    above, upto = tl.full((), float("-inf"), tl.float32), tl.full((), float("inf"), tl.float32)
    smallest, largest = least, top
    greater, wanted = tl.zeros((), tl.float64), budget
    unknown = WEIGHTED
    while smallest < largest:
        pivots = pivots_between(smallest, largest, 4)
        measure, mass = _measure(
            list, listed, lengths, depth, ids, reaching, logits, seen, vocab, penalty, temperature, top, domain, upto,
            pivots, WEIGHTED, TILE_SIZE,
        )  # fmt: skip
        wanted = tl.where(unknown, budget * mass, wanted)
        unknown = False
        measure += greater
        over = measure >= wanted  # the answer is above this pivot
        above = tl.maximum(above, tl.max(tl.where(over, pivots, float("-inf")), 0))
        upto = tl.minimum(upto, tl.min(tl.where(over, float("inf"), pivots), 0))
        greater = tl.max(tl.where(over, greater, measure), 0)
        lengths, smallest, largest = _gather(
            work, list, listed, lengths, depth, work_depth, ids, reaching, logits, seen, vocab, penalty, temperature,
            least, above, upto, TILE_SIZE,
        )  # fmt: skip
        list, depth, listed = work, work_depth, tl.max(lengths, 0) <= work_depth
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
    ids,
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
    TILES: tl.constexpr,
    TILE_SIZE: tl.constexpr,
):
    """The smallest logit that top-k, and then top-p among what that leaves, keep.

    For top-k the tiles that hold candidates are read once, and what both filters look for is found in the list of
    these. Top-p alone has both lists for one of twice the length.
    """
    infinite = tl.full((), float("inf"), tl.float32)
    least = _floor(maxima, top, total, vocab, top_k, top_p)
    domain = tl.where(top_k > 0, least, -infinite)
    reaching = reaching_tiles(ids, maxima, domain, TILES)
    lengths, listed = tl.zeros((LANES,), tl.int32), top_k > 0
    depth = CAPACITY // LANES
    work, work_depth = lists, 2 * depth
    threshold = least
    if top_k > 0:
        lengths, smallest, _ = _gather(
            lists, lists, False, lengths, depth, depth, ids, reaching, logits, seen, vocab, penalty, temperature,
            least, -infinite, infinite, TILE_SIZE,
        )  # fmt: skip
        listed = tl.max(lengths, 0) <= depth
        work, work_depth = lists + CAPACITY, depth
        threshold = _smallest_kept(
            work, lists, listed, lengths, depth, depth, ids, reaching, logits, seen, vocab, penalty, temperature, top,
            smallest, least, top_k.to(tl.float64), False, TILE_SIZE,
        )  # fmt: skip
        domain = threshold
    if top_p < 1:
        threshold = _smallest_kept(
            work, lists, listed, lengths, depth, work_depth, ids, reaching, logits, seen, vocab, penalty, temperature,
            top, threshold, domain, top_p.to(tl.float64), True, TILE_SIZE,
        )  # fmt: skip
    return threshold

"""One sampling step in two launches: sums of every tile of logits, then one program per row that filters and draws.

The first launch reads the logits once, spread over the whole device. The second reads one tile of each row; of a row
with a filter the tiles that can matter are read again, for the threshold that its filters come to and for the sums of
what reaches it.
"""

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from stars_fast.ops._library import FLOAT_CODES
from stars_fast.ops.philox import Stream
from stars_fast.ops.sample_step import STATE, TILE_SIZE, state_addresses

from .filters import LANES, TILE_LANES, processed_logits, rank_threshold, reaching_tiles, tiles_of_row
from .philox import gumbel_noise
from .row_math import log_positive, min_p_threshold, row_sum, row_weighted_sum
from .variant import Variant

_LARGEST_VOCABULARY = 2**19
TILE_WARPS = 1  # a tile is reduced inside one warp, without shared memory
DRAW_REGISTERS = 255  # on CUDA; left alone, ptxas may choose 128 and spill
CAPACITY = 16384  # of the lists of candidates for a threshold; longer ones are read from the row again
_SUMS = 5  # of a tile: raw maximum, sum and weighted sum, processed maximum and sum

_Result = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@triton.jit
def _maximum_and_shift(x):
    """Largest of a tile, NaN for one with a NaN or +inf in it, and what to subtract before exponentials."""
    wrong = tl.max(((x != x) | (x == float("inf"))).to(tl.int32), 0)  # the maximum may pass over NaN
    maximum = tl.where(wrong != 0, float("nan"), tl.max(x, 0))
    return maximum, tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def tile_sums_kernel(
    logits, sums, alive, temperature, repetition_penalty, seen, vocab, row_stride, TILE_SIZE: tl.constexpr
):
    """``sums`` float32 ``[5, rows, tiles]``: raw maximum, sums of exp(x - max) and of (x - max) exp(x - max),
    processed maximum and sum. Rows that are not alive have none."""
    row, tile, tiles = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    if tl.load(alive + row) == 0:
        return
    index = tile * TILE_SIZE + tl.arange(0, TILE_SIZE)
    divisor = tl.load(temperature + row)
    penalty = tl.load(repetition_penalty + row)
    seen_row = None if seen is None else seen + row * vocab
    raw, processed = processed_logits(logits + row * row_stride, seen_row, index, vocab, penalty, divisor)

    maximum, shift = _maximum_and_shift(raw)
    difference = raw - shift
    weights = tl.exp(difference)
    total = tl.sum(weights, 0)
    weighted = tl.sum(tl.where(weights > 0, weights * difference, 0.0), 0)  # 0 * -inf would be NaN
    processed_maximum, processed_total = maximum, total
    if (divisor != 1) | (penalty != 1):
        processed_maximum, shift = _maximum_and_shift(processed)
        processed_total = tl.sum(tl.exp(processed - shift), 0)

    place, plane = sums + row * tiles + tile, tl.num_programs(0).to(tl.int64) * tiles
    tl.store(place, maximum)
    tl.store(place + plane, total)
    tl.store(place + 2 * plane, weighted)
    tl.store(place + 3 * plane, processed_maximum)
    tl.store(place + 4 * plane, processed_total)


@triton.jit
def draw_kernel(
    logits,
    sums,
    lists,
    keys,
    segment,
    attempt,
    position,
    alive,
    limit,
    temperature,
    top_k,
    top_p,
    min_p,
    repetition_penalty,
    seen,
    eos,
    token,
    logprob,
    sampling_logprob,
    entropy,
    vocab,
    row_stride,
    eos_count,
    TILES: tl.constexpr,
    TILE_SIZE: tl.constexpr,
    CAPACITY: tl.constexpr,
    TILE_STREAM: tl.constexpr,
    TOKEN_STREAM: tl.constexpr,
):
    """Filters, draw, log-probabilities and state of one row, from the sums of its tiles."""
    row = tl.program_id(0).to(tl.int64)
    living = tl.load(alive + row) != 0
    tiles = tl.cdiv(vocab, TILE_SIZE)
    plane = tl.num_programs(0).to(tl.int64) * tiles
    tile = tl.arange(0, TILES)
    sums += row * tiles
    exists = tile < tl.where(living, tiles, 0)
    maxima = tl.load(sums + 3 * plane + tile, exists, other=float("-inf"))
    totals = tl.load(sums + 4 * plane + tile, exists, other=0.0)
    raw_maxima = tl.load(sums + tile, exists, other=float("-inf"))
    top, total = row_sum(maxima, totals)
    wrong = tl.max(((maxima != maxima) | (raw_maxima != raw_maxima)).to(tl.int32), 0) != 0
    if wrong | (top == float("-inf")):  # a row that is not alive has no sums either
        nothing = tl.where(living, float("nan"), 0.0)
        tl.store(token + row, 0)
        tl.store(logprob + row, nothing)
        tl.store(sampling_logprob + row, nothing)
        tl.store(entropy + row, nothing)
        tl.store(alive + row, 0)
        return

    logits += row * row_stride
    seen_row = None if seen is None else seen + row * vocab
    penalty, divisor = tl.load(repetition_penalty + row), tl.load(temperature + row)
    k, p, lowest = tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row)
    threshold = tl.full((), float("-inf"), tl.float32)
    lists += row * (2 * CAPACITY + TILES)
    ids = lists + 2 * CAPACITY
    if (k > 0) | (p < 1):
        threshold = rank_threshold(
            lists, ids, maxima, logits, seen_row, penalty, divisor, vocab, top, total, k, p, CAPACITY, TILES, TILE_SIZE,
        )  # fmt: skip
    if lowest > 0:
        threshold = tl.minimum(tl.maximum(threshold, min_p_threshold(top, lowest)), top)
    if threshold > float("-inf"):
        reaching = reaching_tiles(ids, maxima, threshold, TILES)
        for start in range(0, reaching, LANES // TILE_LANES):
            nth = start + tl.arange(0, LANES) // TILE_LANES
            t = tl.load(ids + nth, nth < reaching, other=0.0).to(tl.int32)
            reached = tl.load(sums + 3 * plane + t)
            x = tiles_of_row(ids, start, reaching, logits, seen_row, vocab, penalty, divisor, TILE_SIZE)
            weights = tl.where(x >= threshold, tl.exp(x - reached[:, None]), 0.0)
            kept = tl.sum(tl.reshape(tl.sum(weights, 1), (LANES // TILE_LANES, TILE_LANES)), 1)
            nth = start + tl.arange(0, LANES // TILE_LANES)
            t = tl.load(ids + nth, nth < reaching, other=0.0).to(tl.int32)
            tl.store(sums + 4 * plane + t, kept, nth < reaching)
        tl.debug_barrier()  # other threads load what this one has stored
        maxima = tl.where(maxima >= threshold, maxima, float("-inf"))
        totals = tl.load(sums + 4 * plane + tile, tile < tiles, other=0.0)
        top, total = row_sum(maxima, totals)

    key, place = tl.load(keys + row), tl.load(position + row)
    s, a = tl.load(segment + row), tl.load(attempt + row)
    noise = gumbel_noise(key, s, a, place, TILE_STREAM, 0, TILES)
    possible = maxima > float("-inf")
    score = maxima + log_positive(tl.where(possible, totals, 1.0)) + noise
    first = tl.argmax(tl.where(possible, score, float("-inf")), 0) * TILE_SIZE
    within = tl.arange(0, TILE_SIZE)
    raw, x = processed_logits(logits, seen_row, first + within, vocab, penalty, divisor)
    noise = gumbel_noise(key, s, a, place, TOKEN_STREAM, first, TILE_SIZE)
    chosen = tl.argmax(tl.where(x >= threshold, x + noise, float("-inf")), 0)
    raw_logit = tl.sum(tl.where(within == chosen, raw, 0.0), 0)
    logit = tl.sum(tl.where(within == chosen, x, 0.0), 0)
    drawn = (first + chosen).to(tl.int64)

    tl.store(token + row, drawn)
    # In this order: with logits far from 0 the sum max + log(sum) would round log(sum) away.
    raw_totals = tl.load(sums + plane + tile, exists, other=0.0)
    weighted = tl.load(sums + 2 * plane + tile, exists, other=0.0)
    raw_top, raw_total = row_sum(raw_maxima, raw_totals)
    log_total = tl.log(raw_total)
    tl.store(logprob + row, (raw_logit.to(tl.float64) - raw_top - log_total).to(tl.float32))
    tl.store(sampling_logprob + row, (logit.to(tl.float64) - top - tl.log(total)).to(tl.float32))
    tl.store(entropy + row, (log_total - row_weighted_sum(raw_maxima, raw_totals, weighted) / raw_total).to(tl.float32))
    eos += row * eos_count
    ended = tl.zeros((32,), tl.int32)
    for start in range(0, eos_count, 32):
        e = start + tl.arange(0, 32)
        ended += (tl.load(eos + e, e < eos_count, other=-1) == drawn).to(tl.int32)
    tl.store(position + row, place + 1)
    tl.store(alive + row, (place + 1 < tl.load(limit + row)) & (tl.sum(ended, 0) == 0))
    if seen is not None:
        tl.store(seen_row + drawn, 1)


def check(logits: torch.Tensor, *state: torch.Tensor | None) -> None:
    """Raise a ValueError for arguments of :func:`sample_step` that the kernels would misread."""
    if logits.ndim != 2 or logits.dtype not in FLOAT_CODES:
        got = f"{logits.dtype} {list(logits.shape)}"
        raise ValueError(f"logits must be float32, float16 or bfloat16 [rows, vocabulary], got {got}")
    rows, vocab = logits.shape
    if not 1 <= vocab <= _LARGEST_VOCABULARY:
        raise ValueError(f"the vocabulary must have 1 to {_LARGEST_VOCABULARY} tokens, got {vocab}")
    state_addresses(rows, vocab, state[-1].shape[-1], state)


def sample_step(logits: torch.Tensor, *state: torch.Tensor | None) -> _Result:
    """:func:`stars_fast.ops.sample_step`, launched. Needs 128 KiB a row for candidates of filters, at most.

    Raises
    ------
    ValueError
        If an argument has a dtype, a shape or strides that the kernels do not read.
    """
    check(logits, *state)
    named = {name: tensor for (name, _, _), tensor in zip(STATE, state, strict=True)}
    rows, vocab = logits.shape
    if vocab > 1 and logits.stride(1) != 1:
        logits = logits.contiguous()
    token = torch.empty(rows, dtype=torch.int64, device=logits.device)
    outputs = tuple(torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(3))
    if rows == 0:
        return token, *outputs
    tiles = triton.cdiv(vocab, TILE_SIZE)
    sums = torch.empty((_SUMS, rows, tiles), dtype=torch.float32, device=logits.device)
    constants = _constants(vocab)
    size = 2 * constants["CAPACITY"] + constants["TILES"]
    lists = torch.empty((rows, size), dtype=torch.float32, device=logits.device)
    stride = logits.stride(0)
    tile_sums_kernel[(rows, tiles)](
        logits,
        sums,
        *(named[name] for name in ("alive", "temperature", "repetition_penalty", "seen")),
        vocab,
        stride,
        TILE_SIZE,
        num_warps=TILE_WARPS,
        enable_fp_fusion=False,
    )
    limited, warp = ({}, 64) if torch.version.hip else ({"maxnreg": DRAW_REGISTERS}, 32)
    draw_kernel[(rows,)](
        logits, sums, lists, *state, token, *outputs, vocab, stride, named["eos"].shape[1], **constants,
        num_warps=LANES.value // warp, enable_fp_fusion=False, **limited,
    )  # fmt: skip
    return token, *outputs


def _constants(vocab: int) -> dict[str, int]:
    """Of :func:`draw_kernel`."""
    return {
        "TILES": max(4, triton.next_power_of_2(triton.cdiv(vocab, TILE_SIZE))),
        "TILE_SIZE": TILE_SIZE,
        "CAPACITY": min(CAPACITY, max(1, vocab // TILE_SIZE) * 2048),
        "TILE_STREAM": int(Stream.TILE),
        "TOKEN_STREAM": int(Stream.TOKEN),
    }


def variants(target: GPUTarget) -> list[Variant]:
    """Both kernels for three dtypes and vocabularies of today's models and of the largest size, and for one row of one.

    The last is what Triton compiles where sizes are 1, which it takes for constants.
    """
    types = dict.fromkeys(("keys", "eos", "token"), "*i64") | dict.fromkeys(("alive", "seen"), "*i1")
    types |= dict.fromkeys(("segment", "attempt", "position", "limit", "top_k"), "*i32")
    types |= {"vocab": "i32:16", "row_stride": "i32:16", "eos_count": "i32"}
    found = []
    for dtype, vocab, with_seen in (
        ("fp32", 151_936, True),
        ("fp16", 151_936, True),
        ("bf16", 151_936, True),
        ("bf16", 151_936, False),
        ("bf16", _LARGEST_VOCABULARY, True),
        ("fp32", 1, False),
    ):
        constants = {} if with_seen else {"seen": None}
        if vocab == 1:
            constants |= {"vocab": 1, "row_stride": 1, "eos_count": 1}
        label = f"[{dtype},v{vocab}{',seen' if with_seen else ''}]"
        most = None if target.backend == "hip" else DRAW_REGISTERS
        for name, kernel, warps, registers, more in (
            ("sample_step.tile_sums", tile_sums_kernel, TILE_WARPS, None, {"TILE_SIZE": TILE_SIZE}),
            ("sample_step.draw", draw_kernel, LANES.value // target.warp_size, most, _constants(vocab)),
        ):
            kernel_constants = {key: value for key, value in constants.items() if key in kernel.arg_names} | more
            run_time = [key for key in kernel.arg_names if key not in kernel_constants]
            kernel_types = {key: types.get(key, f"*{dtype}" if key == "logits" else "*fp32") for key in run_time}
            found.append(Variant(name + label, kernel, kernel_types, kernel_constants, warps, maxnreg=registers))
    return found

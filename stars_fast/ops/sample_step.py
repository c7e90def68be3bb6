"""One sampling step: filters, draw, log-probabilities, and the state of each row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from stars_fast.ops._library import FLOAT_CODES, Layout, addresses, define
from stars_fast.ops.philox import Stream, gumbel_noise

TILE_SIZE = 1024  # token ids drawn together; part of the specification of the draw

_Result = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def sample_step_reference(
    logits: torch.Tensor,
    keys: torch.Tensor,
    segment: torch.Tensor,
    attempt: torch.Tensor,
    position: torch.Tensor,
    alive: torch.Tensor,
    limit: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    repetition_penalty: torch.Tensor,
    seen: torch.Tensor | None,
    eos: torch.Tensor,
) -> _Result:
    """Draw one token per row, each row with its own random numbers and its own sampling settings.

    The settings apply in the order repetition penalty, temperature, top-k, top-p, min-p. The draw is Gumbel-max in two
    levels: a tile of 1,024 ids by its log-sum-exp plus noise keyed by the tile, then a token in it by its logit plus
    noise keyed by its id. Logits that move by rounding then hardly ever change the token, and one tile needs noise.

    Logits are processed in float32 and nucleus masses summed in float64 by every implementation, so that they choose
    the same token from the same logits.

    Parameters
    ----------
    logits
        ``[B, V]`` float32, float16 or bfloat16.
    keys
        int64 ``[B]``, from :func:`stars_fast.ops.philox_key`.
    segment, attempt
        int32 ``[B]``: with ``position`` the counter of the random numbers.
    position
        int32 ``[B]``, written: index of the token drawn; one more afterwards.
    alive
        bool ``[B]``, written: False after an EOS or when ``position`` reaches ``limit``.
    limit
        int32 ``[B]``.
    temperature
        float32 ``[B]``, positive.
    top_k
        int32 ``[B]``, 0 for off. Ties at the k-th place are kept.
    top_p
        float32 ``[B]``, 1 for off. A token is kept if the more probable ones weigh less than ``top_p``; the most
        probable is always kept, ties are kept together.
    min_p
        float32 ``[B]``, 0 for off. Smallest probability kept, relative to the largest.
    repetition_penalty
        float32 ``[B]``, 1 for off. Logits of seen tokens are divided by it, negative ones multiplied.
    seen
        bool ``[B, V]`` or None, written: tokens of the prompt and of the text so far.
    eos
        int64 ``[B, E]``: tokens that end the row, padded with -1; E may be 0.

    Returns
    -------
    token : torch.Tensor
        int64 ``[B]``.
    logprob : torch.Tensor
        float32 ``[B]``: log-softmax of the logits as given, nats.
    sampling_logprob : torch.Tensor
        float32 ``[B]``: log-softmax of what was sampled from, nats.
    entropy : torch.Tensor
        float32 ``[B]``: of the softmax of the logits as given, nats.

    Raises
    ------
    ValueError
        For a dtype, shape or strides that a kernel would misread, and where ``_library`` says that contents are
        checked, for an argument that is written and shares memory with another.

    Notes
    -----
    A row that is not alive gives token 0 and zeros and keeps its state. A row with a NaN, a +inf or no finite logit
    gives token 0 and NaN, is no longer alive, and otherwise keeps its state.
    """
    raw = logits.float()
    processed = raw
    if seen is not None:
        penalty = repetition_penalty[:, None]
        processed = torch.where(seen, torch.where(raw < 0, raw * penalty, raw / penalty), raw)
    processed = processed / temperature[:, None]
    processed = filter_logits(processed, top_k, top_p, min_p)

    drawn = alive & raw.amax(1).isfinite() & processed.amax(1).isfinite()
    token = torch.where(drawn, _draw(processed, keys, segment, attempt, position), 0)
    chosen = token[:, None]
    unset = torch.where(alive, torch.nan, 0.0)
    raw_logprobs = raw.log_softmax(1)
    logprob = torch.where(drawn, raw_logprobs.gather(1, chosen)[:, 0], unset)
    sampling_logprob = torch.where(drawn, processed.log_softmax(1).gather(1, chosen)[:, 0], unset)
    entropy = torch.where(drawn, torch.special.entr(raw_logprobs.exp()).sum(1), unset)

    if seen is not None:
        seen.scatter_(1, chosen, seen.gather(1, chosen) | drawn[:, None])
    position.add_(drawn)
    alive.copy_(drawn & (position < limit) & ~(chosen == eos).any(1))
    return token, logprob, sampling_logprob, entropy


def filter_logits(logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """Logits ``[B, V]`` with -inf where top-k, top-p or min-p removes a token: each keeps what reaches a threshold."""
    filtering = (top_k > 0) | (top_p < 1) | (min_p > 0)
    if logits.device.type == "cpu" and not bool(filtering.any()):  # elsewhere the question would wait for the device
        return logits
    vocab = logits.shape[1]
    ordered = logits.sort(1, descending=True).values
    top = ordered[:, :1]
    kth = ordered.gather(1, (top_k.clamp(1, vocab) - 1).long()[:, None])
    kth = torch.where(top_k[:, None] > 0, kth, -torch.inf)

    weights = torch.where(ordered >= kth, (ordered - top).double().exp(), 0)
    mass = weights.cumsum(1)
    before = torch.cat((torch.zeros_like(mass[:, :1]), mass[:, :-1]), 1)
    new_value = torch.cat((torch.ones_like(top, dtype=torch.bool), ordered[:, 1:] != ordered[:, :-1]), 1)
    greater = torch.where(new_value, before, 0).cummax(1).values  # mass of strictly greater logits
    nucleus = (greater < top_p[:, None].double() * mass[:, -1:]) | (ordered == top)
    smallest = torch.where(nucleus, ordered, torch.inf).amin(1, keepdim=True)
    smallest = torch.where(top_p[:, None] < 1, smallest, -torch.inf)

    kept = (logits >= kth) & (logits >= smallest)
    kept &= (logits.double() - top.double()) >= min_p[:, None].double().log()
    return torch.where(kept, logits, -torch.inf)


def _draw(
    processed: torch.Tensor, keys: torch.Tensor, segment: torch.Tensor, attempt: torch.Tensor, position: torch.Tensor
) -> torch.Tensor:
    """Token int64 ``[B]`` by two-level Gumbel-max."""
    rows, vocab = processed.shape
    tiles = -(-vocab // TILE_SIZE)
    padding = tiles * TILE_SIZE - vocab
    tiled = torch.nn.functional.pad(processed, (0, padding), value=-torch.inf).view(rows, tiles, TILE_SIZE)
    counter = (keys, segment, attempt, position)
    first = torch.zeros_like(keys)
    tile = (tiled.logsumexp(2) + gumbel_noise(*counter, Stream.TILE, first, tiles)).argmax(1)  # [B]
    inside = tiled.gather(1, tile[:, None, None].expand(-1, 1, TILE_SIZE))[:, 0]  # [B, TILE_SIZE]
    first = tile * TILE_SIZE
    return first + (inside + gumbel_noise(*counter, Stream.TOKEN, first, TILE_SIZE)).argmax(1)


STATE: Layout = (  # what follows the logits
    ("keys", torch.int64, "B"),
    ("segment", torch.int32, "B"),
    ("attempt", torch.int32, "B"),
    ("position", torch.int32, "B"),
    ("alive", torch.bool, "B"),
    ("limit", torch.int32, "B"),
    ("temperature", torch.float32, "B"),
    ("top_k", torch.int32, "B"),
    ("top_p", torch.float32, "B"),
    ("min_p", torch.float32, "B"),
    ("repetition_penalty", torch.float32, "B"),
    ("seen", torch.bool, "BV"),
    ("eos", torch.int64, "BE"),
)


def state_addresses(rows: int, vocab: int, eos_count: int, state: Sequence[torch.Tensor | None]) -> list[int]:
    """Where the arguments after the logits lie, in their order; 0 for ``seen`` where there is none.

    Raises
    ------
    ValueError
        For a dtype, shape or strides that a kernel would misread.
    """
    return addresses(state, STATE, {"B": (rows,), "BV": (rows, vocab), "BE": (rows, eos_count)})


def _call(function: Callable[..., None], logits: torch.Tensor, *state: Any) -> _Result:
    (rows, vocab), eos_count = logits.shape, state[-1].shape[-1]
    if logits.dtype not in FLOAT_CODES:
        raise ValueError(f"logits must be float32, float16 or bfloat16, got {logits.dtype}")
    logits = logits.contiguous()
    found = _results(logits)
    function(
        logits.data_ptr(),
        FLOAT_CODES[logits.dtype],
        rows,
        vocab,
        *state_addresses(rows, vocab, eos_count, state),
        eos_count,
        *(out.data_ptr() for out in found),
        torch.get_num_threads(),
    )
    return found


def _results(logits: torch.Tensor, *state: Any) -> _Result:
    logprob, sampling_logprob, entropy = (logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(3))
    return logits.new_empty(logits.shape[0], dtype=torch.int64), logprob, sampling_logprob, entropy


sample_step = define(
    "sample_step",
    reference=sample_step_reference,
    call=_call,
    fake=_results,
    written=("position", "alive", "seen"),
)

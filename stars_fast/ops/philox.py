"""Counter-based random numbers: Philox4x32-10 (Salmon et al., SC 2011), the same integers on every device.

A number is a function of what it is for: the key says which request draws, the counter says for which segment, attempt,
position and purpose. Nothing depends on the batch, so candidates may be drawn side by side or one after another.
"""

from __future__ import annotations

from enum import IntEnum

import torch

from stars_fast._C import philox4x32 as words_of


class Stream(IntEnum):
    """What a number is for: the upper four bits of the counter's last word."""

    TILE = 0  # Gumbel noise: which tile of ids a token is drawn from
    TOKEN = 1  # Gumbel noise: which id of that tile
    ACCEPT = 2  # whether a candidate, or a token of it, is accepted
    CHOICE = 3  # Gumbel noise: which of candidates that all stand
    RESAMPLE = 4  # which members of a population go on
    CUT = 5  # from where on a chain draws its text anew


class Domain(IntEnum):
    """Whose number it is: part of the key."""

    ANSWER = 0  # a row of the output
    PILOT = 1  # a response from which a rule is calibrated
    MEMBER = 2  # one of several answers that a request has at a time


_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF


def philox_key(seed: int, prompt: int, sample: int, domain: int = Domain.ANSWER) -> int:
    """64-bit Philox key of one sample of one prompt.

    Parameters
    ----------
    seed, prompt, sample
        Any integers; what differs in one of them draws independent numbers.
    domain
        A :class:`Domain`: keeps apart those who must not share numbers.

    Returns
    -------
    int
        The hash as a signed value, so that it fits ``torch.int64``.
    """
    state = 0
    for word in (domain, seed, prompt, sample):
        state = _splitmix64(state ^ (word & _MASK64))
    return state - (1 << 64) if state >> 63 else state


def _splitmix64(state: int) -> int:
    """One output of the SplitMix64 generator (Steele et al., OOPSLA 2014)."""
    state = (state + 0x9E3779B97F4A7C15) & _MASK64
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK64
    return state ^ (state >> 31)


def philox4x32(keys: torch.Tensor, counter: tuple[torch.Tensor | int, ...]) -> torch.Tensor:
    """Philox4x32-10 in int64 arithmetic.

    Parameters
    ----------
    keys
        int64, any shape: low 32 bits first key word, high 32 bits second.
    counter
        Four words that broadcast with ``keys``; only their low 32 bits count.

    Returns
    -------
    torch.Tensor
        int64 ``[..., 4]`` in ``[0, 2**32)``.
    """
    key0, key1 = keys & _MASK32, (keys >> 32) & _MASK32
    words = [torch.as_tensor(word, dtype=torch.int64, device=keys.device) & _MASK32 for word in counter]
    key0, key1, c0, c1, c2, c3 = torch.broadcast_tensors(key0, key1, *words)
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + _WEYL[0]) & _MASK32, (key1 + _WEYL[1]) & _MASK32
    return torch.stack((c0, c1, c2, c3), -1)


def _multiply(constant: int, word: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of a 64-bit product; halves of ``word`` keep the high part within int64."""
    low = (constant * (word & 0xFFFF)) >> 16
    return (constant * (word >> 16) + low) >> 16, (constant * word) & _MASK32


def gumbel_noise(
    keys: torch.Tensor,
    segment: torch.Tensor,
    attempt: torch.Tensor,
    position: torch.Tensor,
    stream: int,
    first: torch.Tensor,
    count: int,
) -> torch.Tensor:
    """Standard Gumbel noise for ``count`` consecutive indices (tiles or token ids) of each row.

    Index i takes word ``i % 4`` of block ``i // 4``.

    Parameters
    ----------
    keys, segment, attempt, position
        ``[rows]``, int64 and int32.
    stream
        A :class:`Stream`.
    first
        ``[rows]`` first index, a multiple of 4.

    Returns
    -------
    torch.Tensor
        float32 ``[rows, count]``.
    """
    blocks = first[:, None] // 4 + torch.arange((count + 3) // 4, device=keys.device)  # [rows, blocks]
    counter = (segment[:, None], attempt[:, None], position[:, None], (stream << 28) | blocks)
    return gumbel(philox4x32(keys[:, None], counter).flatten(1)[:, :count])


def gumbel(bits: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise float32 from 32 random bits each (int64).

    ``-log(-log1p(-v))`` with v near 0 for the largest values keeps all bits where they decide the winner;
    ``-log(-log(u))`` would lose them to the rounding of u near 1.
    """
    v = (bits.float() * 2.0**-32 + 2.0**-33).clamp(max=1 - 2.0**-24)
    return (-torch.log1p(-v)).log_().neg_()


def uniform(
    keys: torch.Tensor,
    segment: torch.Tensor,
    attempt: torch.Tensor,
    position: torch.Tensor | int = 0,
    stream: int = Stream.ACCEPT,
) -> torch.Tensor:
    """A uniform number float64 inside (0, 1) for each candidate, or for its token at ``position``.

    Arguments broadcast.
    """
    bits = philox4x32(keys, (segment, attempt, position, stream << 28))[..., 0]
    return (bits.double() + 0.5) * 2.0**-32


def uniform_number(key: int, segment: int, attempt: int, stream: int = Stream.ACCEPT) -> float:
    """:func:`uniform` of one candidate, without tensors: for who needs a number at a time."""
    return (words_of(key & _MASK64, (segment, attempt, 0, stream << 28))[0] + 0.5) * 2.0**-32


def choice_noise(keys: torch.Tensor, segment: torch.Tensor, attempt: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise float64 for a choice among candidates; arguments broadcast."""
    return -(-uniform(keys, segment, attempt, stream=Stream.CHOICE).log()).log()

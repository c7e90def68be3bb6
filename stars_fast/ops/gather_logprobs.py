"""Log-probabilities of given tokens, for implicit rewards."""

from __future__ import annotations

from collections.abc import Callable

import torch

from stars_fast.ops._library import FLOAT_CODES, address, define


def gather_logprobs_reference(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-softmax of the logits at one token per row.

    Parameters
    ----------
    logits
        ``[T, V]`` float32, float16 or bfloat16.
    tokens
        int64 ``[T]`` in ``[0, V)``.

    Returns
    -------
    torch.Tensor
        float32 ``[T]``, nats.

    Raises
    ------
    ValueError
        For a dtype or shape that a kernel would misread, and where ``_library`` says that contents are checked, for a
        token outside the vocabulary.
    """
    return logits.log_softmax(1, dtype=torch.float32).gather(1, tokens[:, None])[:, 0]


def _call(function: Callable[..., None], logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    rows, vocab = logits.shape
    if logits.dtype not in FLOAT_CODES:
        raise ValueError(f"logits must be float32, float16 or bfloat16, got {logits.dtype}")
    logits, tokens, out = logits.contiguous(), tokens.contiguous(), _fake(logits, tokens)
    function(
        address(logits, "logits", logits.dtype, (rows, vocab)),
        FLOAT_CODES[logits.dtype],
        rows,
        vocab,
        address(tokens, "tokens", torch.int64, (rows,)),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def _fake(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


gather_logprobs = define("gather_logprobs", reference=gather_logprobs_reference, call=_call, fake=_fake)

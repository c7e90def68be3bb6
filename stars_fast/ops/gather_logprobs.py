"""Log-probabilities of given tokens, for implicit rewards."""

from __future__ import annotations

import torch

from stars_fast.ops._library import FLOAT_CODES, address, define, native

_native = native("gather_logprobs")


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
    """
    return logits.log_softmax(1, dtype=torch.float32).gather(1, tokens[:, None])[:, 0]


def _cpu(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    rows, vocab = logits.shape
    if logits.dtype not in FLOAT_CODES:
        raise ValueError(f"logits must be float32, float16 or bfloat16, got {logits.dtype}")
    logits, out = logits.contiguous(), logits.new_empty(rows, dtype=torch.float32)
    _native(
        address(logits, "logits", logits.dtype, (rows, vocab)),
        FLOAT_CODES[logits.dtype],
        rows,
        vocab,
        address(tokens.contiguous(), "tokens", torch.int64, (rows,)),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def _fake(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


gather_logprobs = define("gather_logprobs", reference=gather_logprobs_reference, cpu=_cpu, fake=_fake)

"""Log-probabilities of given tokens: one program per row, which reads its logits once."""

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from stars_fast.ops._library import FLOAT_CODES, address

from .row_math import log_positive
from .variant import Variant

BLOCK = 4096
WARPS = 8


@triton.jit
def gather_logprobs_kernel(logits, tokens, out, vocab, row_stride, BLOCK: tl.constexpr):
    """Log-softmax of a row at its token. Each place of a block keeps a running maximum and sum until the end."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    # Begun with the smallest finite number: the difference of two -inf would be NaN.
    maximum = tl.full((BLOCK,), -3.4028234663852886e38, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, vocab, BLOCK, num_stages=3):
        index = start + tl.arange(0, BLOCK)
        x = tl.load(logits + index, index < vocab, other=float("-inf")).to(tl.float32)
        smaller = tl.exp(-tl.abs(x - maximum))  # weight of the smaller one of the two, relative to the larger
        total = tl.where(x > maximum, total * smaller + 1.0, total + smaller)
        maximum = tl.where(x > maximum, x, maximum)
    top = tl.max(maximum, 0)
    sum_of_all = tl.sum(total * tl.exp(maximum - top), 0)
    token = tl.load(tokens + row)
    logit = tl.load(logits + token, (token >= 0) & (token < vocab), other=float("nan")).to(tl.float32)
    # A NaN or +inf among the logits has made the sum NaN, and without a finite one it is 0.
    logprob = (logit - top) - log_positive(sum_of_all)
    tl.store(out + row, tl.where(sum_of_all > 0, logprob, float("nan")))


def check(logits: torch.Tensor, tokens: torch.Tensor) -> None:
    """Raise a ValueError for arguments that the kernel would misread."""
    if logits.ndim != 2 or logits.dtype not in FLOAT_CODES or logits.shape[1] == 0:
        got = f"{logits.dtype} {list(logits.shape)}"
        raise ValueError(f"logits must be float32, float16 or bfloat16 [rows, vocabulary], got {got}")
    address(tokens, "tokens", torch.int64, (logits.shape[0],))


def gather_logprobs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """:func:`stars_fast.ops.gather_logprobs`, launched; NaN for a token outside the vocabulary.

    Raises
    ------
    ValueError
        If an argument has a dtype or a shape that the kernel does not read.
    """
    tokens = tokens.contiguous()
    check(logits, tokens)
    rows, vocab = logits.shape
    if vocab > 1 and logits.stride(1) != 1:
        logits = logits.contiguous()
    out = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows > 0:
        gather_logprobs_kernel[(rows,)](
            logits, tokens, out, vocab, logits.stride(0), BLOCK, num_warps=WARPS, enable_fp_fusion=False
        )
    return out


def variants(target: GPUTarget) -> list[Variant]:
    """Three dtypes."""
    return [
        Variant(
            f"gather_logprobs[{dtype}]",
            gather_logprobs_kernel,
            {"logits": f"*{dtype}", "tokens": "*i64", "out": "*fp32", "vocab": "i32:16", "row_stride": "i32:16"},
            {"BLOCK": BLOCK},
            WARPS,
        )
        for dtype in ("fp32", "fp16", "bf16")
    ]

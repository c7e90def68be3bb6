"""Cases of ``sample_step`` and ``gather_logprobs``, which are bound by the read of the logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from stars_fast.ops import gather_logprobs, philox_key, sample_step
from stars_fast.ops.gather_logprobs import gather_logprobs_reference
from stars_fast.ops.sample_step import sample_step_reference

from .refcheck import OURS, REFERENCE, Case, Prepared, copies, short

MULTINOMIAL, CROSS_ENTROPY = "torch multinomial", "torch cross_entropy"
VOCABULARIES = (32_000, 128_256, 152_064)  # Llama 2, Llama 3, Qwen 2.5

FILTERS: dict[str, dict[str, float]] = {
    "unfiltered": {},
    "top_k50": {"top_k": 50},
    "top_p0.9": {"top_p": 0.9},
    "all": {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.02, "penalty": 1.1},
}


class Draw(NamedTuple):
    """One sampling step of ``rows`` candidates."""

    rows: int
    vocab: int
    filters: str
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.vocab}/{self.filters}/{short(self.dtype)}"


class Gather(NamedTuple):
    """Log-probabilities of ``rows`` tokens."""

    rows: int
    vocab: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.vocab}/{short(self.dtype)}"


DRAWS = {
    "cuda": [Draw(rows, vocab, name) for vocab in VOCABULARIES for rows in (1, 64, 128, 256) for name in FILTERS],
    "cpu": [
        *(Draw(8, 32_000, name, dtype) for dtype in (torch.float32, torch.bfloat16) for name in FILTERS),
        Draw(1, 128_256, "unfiltered"),
        Draw(1, 128_256, "all"),
    ],
}
GATHERS = {
    "cuda": [Gather(rows, vocab) for vocab in VOCABULARIES for rows in (16, 256, 1024)],
    "cpu": [Gather(64, 32_000, torch.float32), Gather(64, 32_000)],
}


def _logits(shape: Draw | Gather, device: torch.device) -> list[torch.Tensor]:
    """Sets of ``[rows, vocab]``, normal with deviation 3: some 5 % of the tokens hold 90 % of the mass, more than in
    most models, so that filters have work.

    They rotate, although the head's product has just written them and a large cache may hold some still.
    """
    generator = torch.Generator(device).manual_seed(0)
    size = (shape.rows, shape.vocab)
    sets = copies(shape.rows * shape.vocab * shape.dtype.itemsize, device)
    draw = lambda: torch.randn(size, device=device, generator=generator) * 3  # noqa: E731
    return [draw().to(shape.dtype) for _ in range(sets)]


def build_draw(shape: Draw, device: torch.device) -> Case:
    """All rows alive and far from their limit, an EOS that is never drawn: every call does the same work."""
    options, rows, logits = FILTERS[shape.filters], shape.rows, _logits(shape, device)
    for one in logits:
        one[:, -1] = -100

    def full(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.full((rows,), value, dtype=dtype, device=device)

    seen = None
    if "penalty" in options:
        generator = torch.Generator(device).manual_seed(1)
        seen = torch.rand(rows, shape.vocab, device=device, generator=generator) < 0.01
    state = {
        "keys": torch.tensor([philox_key(0, row, 0) for row in range(rows)], device=device),
        "segment": full(3, torch.int32),
        "attempt": torch.arange(rows, dtype=torch.int32, device=device),
        "position": full(5, torch.int32),
        "alive": full(True, torch.bool),
        "limit": full(2**30, torch.int32),
        "temperature": full(options.get("temperature", 1.0)),
        "top_k": full(options.get("top_k", 0), torch.int32),
        "top_p": full(options.get("top_p", 1.0)),
        "min_p": full(options.get("min_p", 0.0)),
        "repetition_penalty": full(options.get("penalty", 1.0)),
        "seen": seen,
        "eos": torch.full((rows, 1), shape.vocab - 1, device=device),
    }
    written = {name: state[name].clone() for name in ("position", "alive", "seen") if state[name] is not None}

    def restore() -> None:
        for name, value in written.items():
            state[name].copy_(value)

    expected = _drawn(sample_step_reference(logits[0], *state.values()))
    restore()
    return Case(
        "sample_step",
        shape.name,
        device,
        bytes=logits[0].nbytes + (0 if seen is None else seen.nbytes),
        contenders={
            OURS[device.type]: lambda: _step(sample_step, logits, state),
            REFERENCE: lambda: _step(sample_step_reference, logits, state),
            MULTINOMIAL: lambda: _multinomial(options, logits, seen, expected["token"]),
        },
        expected=expected,
        # Identical logits give identical tokens.
        tolerance={"token": 0.0, "logprob": 1e-4, "sampling_logprob": 1e-3, "entropy": 1e-4},
        restore=restore,
    )


def _drawn(result: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    return dict(zip(("token", "logprob", "sampling_logprob", "entropy"), result, strict=True))


def _step(step: Callable[..., Any], logits: list[torch.Tensor], state: dict[str, torch.Tensor | None]) -> Prepared:
    rest = tuple(state.values())
    return Prepared(lambda i: step(logits[i % len(logits)], *rest), _drawn, len(logits))


def _multinomial(
    options: dict[str, float], logits: list[torch.Tensor], seen: torch.Tensor | None, reference_token: torch.Tensor
) -> Prepared:
    """The same law in plain torch with a sort, and no log-probabilities, entropy or state: less work than the operator.

    Its draws are its own, so its law is compared: at the reference's tokens, and that its own have a probability.
    """

    def call(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        probabilities = _law(logits[i % len(logits)], options, seen)
        return torch.multinomial(probabilities, 1), probabilities

    def observe(result: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
        token, probabilities = result
        possible = probabilities.gather(1, token)[:, 0] > 0
        return {
            "token": torch.where(possible, reference_token, -1),
            "sampling_logprob": probabilities.gather(1, reference_token[:, None])[:, 0].log(),
        }

    return Prepared(call, observe, len(logits))


def _law(logits: torch.Tensor, options: dict[str, float], seen: torch.Tensor | None) -> torch.Tensor:
    x = logits.float()
    if seen is not None:
        penalty = options["penalty"]
        x = torch.where(seen, torch.where(x < 0, x * penalty, x / penalty), x)
    if "temperature" in options:
        x = x / options["temperature"]
    if "top_k" in options:
        kth = x.topk(int(options["top_k"])).values[:, -1:]
        x = x.masked_fill(x < kth, -torch.inf)
    if "top_p" in options:
        ordered = x.sort(1, descending=True).values
        mass = ordered.softmax(1).cumsum(1)
        last = (mass < options["top_p"]).sum(1, keepdim=True).clamp(max=x.shape[1] - 1)
        x = x.masked_fill(x < ordered.gather(1, last), -torch.inf)
    probabilities = x.softmax(1)
    if "min_p" in options:
        kept = probabilities >= options["min_p"] * probabilities.amax(1, keepdim=True)
        probabilities = probabilities * kept
        probabilities = probabilities / probabilities.sum(1, keepdim=True)
    return probabilities


def build_gather(shape: Gather, device: torch.device) -> Case:
    """Tokens anywhere in the vocabulary."""
    logits = _logits(shape, device)
    generator = torch.Generator(device).manual_seed(1)
    tokens = torch.randint(shape.vocab, (shape.rows,), device=device, generator=generator)

    def prepared(gather: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Prepared:
        return Prepared(lambda i: gather(logits[i % len(logits)], tokens), lambda out: {"logprob": out}, len(logits))

    return Case(
        "gather_logprobs",
        shape.name,
        device,
        bytes=logits[0].nbytes + 12 * shape.rows,
        contenders={
            OURS[device.type]: lambda: prepared(gather_logprobs),
            REFERENCE: lambda: prepared(gather_logprobs_reference),
            CROSS_ENTROPY: lambda: prepared(lambda x, t: -F.cross_entropy(x.float(), t, reduction="none")),
        },
        expected={"logprob": gather_logprobs_reference(logits[0], tokens)},
        tolerance={"logprob": 1e-4},
    )

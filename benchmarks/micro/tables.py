"""Cases of ``kv_append`` and ``select_and_commit``, which move little: what counts is the launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from stars_fast.ops import kv_append, philox_key, select_and_commit
from stars_fast.ops.kv_append import kv_append_reference
from stars_fast.ops.select_and_commit import select_and_commit_reference

from .refcheck import OURS, REFERENCE, Case, Prepared, copies, short

COPY = "torch index_copy_"


class Append(NamedTuple):
    """Keys and values of ``tokens`` new tokens of one layer."""

    tokens: int
    heads: int
    size: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        return f"{self.tokens}tokens/{self.heads}x{self.size}/{short(self.dtype)}"


class Select(NamedTuple):
    """``groups`` requests with ``rows`` scored candidates each, segments of 16 tokens."""

    groups: int
    rows: int

    @property
    def name(self) -> str:
        return f"{self.groups}x{self.rows}"


APPENDS = {
    "cuda": [
        Append(tokens, heads, size)
        for heads, size in ((8, 64), (4, 128), (32, 128))  # of Llama 3.2 1B, Qwen 2.5 7B, Llama 2 7B
        for tokens in (8, 128, 1024, 4096)
    ],
    "cpu": [Append(tokens, 8, 64, dtype) for dtype in (torch.float32, torch.bfloat16) for tokens in (16, 1024)],
}
SELECTS = {
    "cuda": [Select(1, 8), Select(16, 8), Select(64, 8), Select(64, 16)],
    "cpu": [Select(1, 8), Select(64, 8)],
}


def build_append(shape: Append, device: torch.device) -> Case:
    """Scattered slots of pools that rotate; the tokens themselves stay, as the projections have just made them."""
    tokens, heads, size, dtype = shape
    generator = torch.Generator(device).manual_seed(0)
    random = {"device": device, "dtype": dtype, "generator": generator}
    k, v = torch.randn(tokens, heads, size, **random), torch.randn(tokens, heads, size, **random)
    slots = torch.randperm(2 * tokens, device=device, generator=generator)[:tokens].int() + 1
    pools = [
        tuple(torch.zeros(2 * tokens + 1, heads, size, dtype=dtype, device=device) for _ in "kv")
        for _ in range(copies(2 * k.nbytes, device))
    ]
    expected = tuple(pool.clone() for pool in pools[0])
    kv_append_reference(k, v, *expected, slots)

    def prepared(append: Callable[..., None]) -> Prepared:
        def call(i: int) -> None:
            append(k, v, *pools[i % len(pools)], slots)

        return Prepared(call, lambda _: dict(zip(("k_pool", "v_pool"), pools[0], strict=True)), len(pools))

    index = slots.long()

    def index_copy(
        k: torch.Tensor, v: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, slots: torch.Tensor
    ) -> None:
        k_pool.index_copy_(0, index, k)
        v_pool.index_copy_(0, index, v)

    def restore() -> None:
        for pool in pools[0]:  # the others are not looked at
            pool.zero_()

    return Case(
        "kv_append",
        shape.name,
        device,
        bytes=4 * k.nbytes + slots.nbytes,
        contenders={
            OURS[device.type]: lambda: prepared(kv_append),
            REFERENCE: lambda: prepared(kv_append_reference),
            COPY: lambda: prepared(index_copy),
        },
        expected=dict(zip(("k_pool", "v_pool"), expected, strict=True)),
        tolerance={"k_pool": 0.0, "v_pool": 0.0},
        restore=restore,
    )


def build_select(shape: Select, device: torch.device) -> Case:
    """Rewards around the threshold, so that some groups commit and some do not; attempts are never used up."""
    groups, rows, segment = shape.groups, shape.groups * shape.rows, 16
    generator = torch.Generator().manual_seed(0)

    def full(count: int, value: float, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.full((count,), value, dtype=dtype)

    arguments = {
        "reward": torch.randn(rows, generator=generator) - 1.5,
        "length": full(rows, segment),
        "ended": full(rows, False, torch.bool),
        "group_indptr": torch.arange(groups + 1, dtype=torch.int32) * shape.rows,
        "keys": torch.tensor([philox_key(0, group, 0) for group in range(groups)]),
        "segment": full(groups, 2),
        "attempts": full(groups, 0),
        "committed": full(groups, 32),
        "max_new_tokens": full(groups, 128),
        "max_attempts": full(groups, 10**6),
        "base": full(groups, -0.5, torch.float64),
        "target": full(groups, 1.0, torch.float64),
        "beta": full(groups, 0.2, torch.float64),
        "ramp": full(groups, False, torch.bool),
        "best_reward": full(groups, 0, torch.float32),
        "best_attempt": full(groups, -1),
        "best_length": full(groups, 0),
        "best_ended": full(groups, False, torch.bool),
    }
    arguments = {name: x.to(device) for name, x in arguments.items()}
    written = ("attempts", "best_reward", "best_attempt", "best_length", "best_ended")
    saved = {name: arguments[name].clone() for name in written}

    def restore() -> None:
        for name, value in saved.items():
            arguments[name].copy_(value)

    def observe(result: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
        returned = dict(zip(("winner", "accepted", "threshold", "finish"), result, strict=True))
        return returned | {name: arguments[name].clone() for name in saved}

    def prepared(select: Callable[..., Any]) -> Prepared:
        values = tuple(arguments.values())
        return Prepared(lambda _: select(*values), observe)

    expected = observe(select_and_commit_reference(**arguments))
    restore()
    return Case(
        "select_and_commit",
        shape.name,
        device,
        bytes=sum(x.nbytes for x in (*arguments.values(), *expected.values())),
        contenders={
            OURS[device.type]: lambda: prepared(select_and_commit),
            REFERENCE: lambda: prepared(select_and_commit_reference),
        },
        expected=expected,
        tolerance=dict.fromkeys(expected, 0.0),
        restore=restore,
    )

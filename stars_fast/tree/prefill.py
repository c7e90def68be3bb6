"""Attention of fresh texts: a library's kernel for packed rows of unequal length, or ours.

A pass is *fresh* where every row is read from its first token on: prompts that begin like none in the tree, and texts
whose slots were given back. All keys and values that it needs are then its own, and lie side by side. Ours reads them
from their slots; flash-attn and torch's ``varlen_attn`` read them where they are, in tiles made for long rows. They are
written to their slots all the same.

Small passes are padded and captured (:mod:`stars_fast.tree.passes`), and keep our kernel; fresh ones that a library
serves are launched. There a token whose value is not finite makes NaN of earlier ones of its own row, too.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from stars_fast.ops._library import operators

FLASH_ATTN, TORCH, OURS = "flash-attn", "torch's varlen_attn", "the tree's kernel"
# Tokens of a pass's longest row from which each is taken: assumed, not measured (`prefill` of benchmarks/gpu.py).
LEAST_TOKENS = {FLASH_ATTN: 256, TORCH: 256}
_DTYPES = (torch.float16, torch.bfloat16)
_LARGEST_HEAD = 256

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, float, int, float], torch.Tensor]


class Shape(NamedTuple):
    """What a layer asks of attention, whatever the texts."""

    heads: int
    kv_heads: int
    key_size: int
    value_size: int
    dtype: torch.dtype
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False

    @classmethod
    def of(cls, q: torch.Tensor, v: torch.Tensor, window: int, softcap: float, sinks: Any) -> Shape:
        """Of queries ``[T, Hq, D]``, values ``[T, Hkv, Dv]`` and a layer's options."""
        return cls(q.shape[1], v.shape[1], q.shape[2], v.shape[2], q.dtype, window, softcap, sinks is not None)


class Library(NamedTuple):
    """A kernel of somebody else's, called as (q, k, v, row pointers, longest row, scale, window, soft cap)."""

    name: str
    attend: Attend
    soft_caps: bool = False
    problem: str = ""  # why it serves nothing on this device


def refused(library: Library, shape: Shape) -> str:
    """Why the library does not take this shape, in words; empty where it does."""
    lacks = (
        (library.problem, library.problem),
        (shape.dtype not in _DTYPES, str(shape.dtype).removeprefix("torch.")),
        (shape.key_size != shape.value_size, "values of another size than keys"),
        (shape.key_size % 8 or shape.key_size > _LARGEST_HEAD, f"heads of {shape.key_size} elements"),
        (shape.softcap and not library.soft_caps, "a soft cap"),
        (shape.sinks, "sinks"),
    )
    return ", ".join(words for wrong, words in lacks if wrong)


def chosen(shape: Shape, longest: int, device: torch.device) -> Library | None:
    """Who attends in a fresh pass whose longest row has so many tokens: the first that is worth it; None: ours."""
    for library in libraries(device):
        if longest >= LEAST_TOKENS[library.name] and not refused(library, shape):
            return library
    return None


def in_words(shapes: set[Shape], device: torch.device) -> str:
    """Who serves the fresh passes of a model with layers of these shapes."""
    found, reasons = dict[str, None](), dict[str, None]()
    for shape in sorted(shapes, key=str):
        for library in libraries(device):
            reason = refused(library, shape)
            if not reason:
                found[f"{library.name} from {LEAST_TOKENS[library.name]} tokens on"] = None
                break
            reasons[f"{library.name}: {reason}"] = None
        else:
            found[OURS] = None
    return ", ".join(found) + (f" ({'; '.join(reasons)})" if reasons else "")


@functools.cache
def libraries(device: torch.device) -> tuple[Library, ...]:
    """Those that there are for this device, the preferred first; of those that do not work, why."""
    ours = operators["tree_attention"].kernel(device.type)
    if device.type != "cuda" or torch.version.cuda is None or ours != "Triton":  # else somebody asked for those kernels
        return ()
    found = (_tried(name, make, device) for name, make in ((FLASH_ATTN, _flash_attn), (TORCH, _torch)))
    return tuple(found)


def _tried(name: str, make: Callable[[], tuple[Attend, bool]], device: torch.device) -> Library:
    """The library, if two short rows come out as they must: a wheel for another GPU or torch loads and fails."""
    try:
        attend, soft_caps = make()
        values = torch.arange(5.0, device=device).half()[:, None, None].repeat(1, 1, 64)
        queries = values.new_zeros(5, 2, 64)  # weigh all that they see alike
        pointers = torch.tensor([0, 3, 5], dtype=torch.int32, device=device)
        means = [attend(queries, values, values, pointers, 3, 1.0, window, 0.0)[:, 1, 0].tolist() for window in (0, 2)]
        right = means == [[0.0, 0.5, 1.0, 3.0, 3.5], [0.0, 0.5, 1.5, 3.0, 3.5]]
        return Library(name, attend, soft_caps, "" if right else "it gives other numbers")
    except Exception as error:  # whatever an extension raises
        return Library(name, _missing, problem=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")


def _missing(*_: Any) -> torch.Tensor:
    raise AssertionError("a library that does not work was asked")


def _flash_attn() -> tuple[Attend, bool]:
    from flash_attn import flash_attn_varlen_func as function

    soft_caps = "softcap" in inspect.signature(function).parameters

    def attend(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rows: torch.Tensor,
        longest: int,
        scale: float,
        window: int,
        softcap: float,
    ) -> torch.Tensor:
        more = {"softcap": softcap} if softcap else {}
        options = {"softmax_scale": scale, "causal": True, "window_size": _window(window), **more}
        out: torch.Tensor = function(q, k, v, rows, rows, longest, longest, **options)
        return out

    return attend, soft_caps


def _torch() -> tuple[Attend, bool]:
    from torch.nn.attention.varlen import varlen_attn as function

    names = inspect.signature(function).parameters
    shared: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in names else {}  # torch 2.11 does so unasked

    def attend(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rows: torch.Tensor,
        longest: int,
        scale: float,
        window: int,
        softcap: float,
    ) -> torch.Tensor:
        out: Any = function(q, k, v, rows, rows, longest, longest, scale=scale, window_size=_window(window), **shared)
        return out

    return attend, False


def _window(window: int) -> tuple[int, int]:
    """As both libraries say it: how many keys before and behind its own a query sees, -1 for all."""
    return (window - 1 if window else -1, 0)

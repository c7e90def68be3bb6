"""The plug-in through which any transformers model runs on a tree of slots.

One function is registered with transformers' ``AttentionInterface``. While a :class:`TreeContext` is active on the
current thread it writes the new keys and values to slots and attends over the tree; otherwise it delegates, so that
ordinary use of the model is untouched.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stars_fast.locks import Lock
from stars_fast.ops import kv_append, rotary_append, tree_attention
from stars_fast.ops._library import library
from stars_fast.ops.tree_attention import tree_work
from stars_fast.tree import prefill
from stars_fast.tree.linear import faster_linears
from stars_fast.tree.segment_tree import TreePlan
from stars_fast.tree.slots import SlotPool

# Must not contain "flash", "sdpa", "flex_attention", "|" or "/": transformers looks for those inside the name.
NAME = "stars_tree"

_MARK = torch.int8
_active = threading.local()
_plugged: dict[int, _Plugged] = {}  # id of a config -> what it said before
_plugged_lock = Lock()


class AttentionContext(Protocol):
    """What stands in for a model's attention while it is active on this thread."""

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        """q ``[T, Hq, D]``, k ``[T, Hkv, D]``, v ``[T, Hkv, Dv]`` -> ``[T, Hq, Dv]``."""
        ...


@dataclass
class TreeContext:
    """One packed forward over the tree: where each new token is written and what it may attend to."""

    pool: SlotPool
    plan: TreePlan
    write_slots: torch.Tensor  # [T] int32
    branch_len: torch.Tensor  # [B] int32, the new tokens included
    query_indptr: torch.Tensor  # [B + 1] int32
    max_rows: int  # most rows of one group
    max_queries: int  # most new tokens of one row
    work: dict[Any, torch.Tensor | None] = field(default_factory=dict)  # of layers, by the sizes of their heads
    fresh: bool = False  # each row's new tokens are all that it has, and are not padded

    @classmethod
    def of_whole_branches(cls, pool: SlotPool, plan: TreePlan, max_rows: int) -> TreeContext:
        """All that a plan has slots for, in one pass."""
        tables, longest = (plan.write_slots, plan.branch_len, plan.query_indptr), plan.branch_slots.shape[1]
        return cls(pool, plan, *tables, max_rows, longest, fresh=plan.fresh)

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor] | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """As in :class:`AttentionContext`; where there are ``angles``, cosines and sines ``[T, R]``, queries and keys
        are still to be rotated by them."""
        k_pool, v_pool = self.pool.layer(layer)
        if angles is None:
            kv_append(k, v, k_pool, v_pool, self.write_slots)
        else:
            q = rotary_append(q, k, v, *angles, k_pool, v_pool, self.write_slots)
        if self.fresh and (library := self._library(q, v, **options)) is not None:
            keys = k if angles is None else k_pool[self.write_slots]  # rotated there
            rows, longest, scale = self.query_indptr, self.max_queries, options["scale"]
            attended = library.attend(q, keys, v, rows, longest, scale, options["window"], options["softcap"])
            # Some lay their output out as q is; compiled layers rely on what the operator promises.
            return attended.contiguous()
        return self.look(layer, q, **options)

    def look(self, layer: int, q: torch.Tensor, **options: Any) -> torch.Tensor:
        """Attention of q ``[T, Hq, D]`` over what the slots hold -> ``[T, Hq, Dv]``."""
        k_pool, v_pool = self.pool.layer(layer)
        out = torch.empty(*q.shape[:2], v_pool.shape[-1], dtype=q.dtype, device=q.device)
        plan, sizes = self.plan, (q.shape[1:], v_pool.shape[1:])
        lengths = (plan.group_indptr, self.query_indptr, self.max_rows, self.max_queries)
        if sizes not in self.work:
            self.work[sizes] = tree_work(q, v_pool, plan.trunk_len, self.branch_len, *lengths)
        tree_attention(
            q,
            k_pool,
            v_pool,
            out,
            plan.trunk_slots,
            plan.trunk_len,
            plan.branch_slots,
            self.branch_len,
            *lengths,
            **options,
            work=self.work[sizes],
        )
        return out

    def _library(
        self, q: torch.Tensor, v: torch.Tensor, *, window: int, softcap: float, sinks: torch.Tensor | None, **_: Any
    ) -> prefill.Library | None:
        """Whose kernel attends in a fresh pass, where it is not ours."""
        return prefill.chosen(prefill.Shape.of(q, v, window, softcap, sinks), self.max_queries, q.device)


@dataclass
class ShapeRecorder:
    """Learns which layers reach the attention interface, and the shape of their keys and values."""

    shapes: dict[int, tuple[int, int, int]]  # layer -> (kv heads, key head size, value head size)
    modules: dict[nn.Module, int] = field(default_factory=dict)  # the decoder's own, and their layers
    windows: dict[int, int] = field(default_factory=dict)  # layer -> sliding window it asks for, 0 for none
    asks: set[prefill.Shape] = field(default_factory=set)
    dtype: torch.dtype = torch.float32
    marked: bool = True  # whether all of them were given the pass's own mask

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        self.dtype = k.dtype
        self.windows[layer] = options["window"]
        self.asks.add(prefill.Shape.of(q, v, options["window"], options["softcap"], options["sinks"]))
        self.shapes[layer] = (k.shape[1], k.shape[2], v.shape[2])
        return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)


class Write(NamedTuple):
    """Where the keys and values of a module go."""

    pool: SlotPool
    layer: int
    size: tuple[int, int]  # (B, T) of the ids that it has keys of
    tokens: torch.Tensor  # [N] int64, places in the batch's tokens [B * T]
    slots: torch.Tensor  # [N] int32


@dataclass
class PromptContext:
    """A forward pass that stays the model's own, masks and all, but for what it leaves in slots.

    Modules without a :class:`Write`, such as a vision tower's, are as if no context were active.
    """

    writes: Mapping[nn.Module, Write]
    seen: set[nn.Module] = field(default_factory=set)  # which have written

    def call(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **options: Any,
    ) -> Any:
        """A whole call of transformers' attention: key ``[B, Hkv, T, D]``, value ``[B, Hkv, T, Dv]``."""
        if (write := self.writes.get(module)) is not None:
            if (key.shape[0], key.shape[2]) != write.size:
                raise NotImplementedError(
                    f"{type(module).__name__} has keys of {key.shape[0]} x {key.shape[2]} tokens, where the prompts "
                    f"are {' x '.join(map(str, write.size))} ids: a processor must put an id for every token of a "
                    "picture"
                )
            keys, values = (states.transpose(1, 2).flatten(0, 1)[write.tokens] for states in (key, value))
            kv_append(keys, values, *write.pool.layer(write.layer), write.slots)
            self.seen.add(module)
        return _ordinary_attention(module)(module, query, key, value, attention_mask, **options)


class WholeCalls(Protocol):
    """An :class:`AttentionContext` of whole calls, such as :class:`PromptContext`."""

    def call(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **options: Any,
    ) -> Any:
        """What transformers' attention returns."""
        ...


def tree_mask(device: torch.device) -> torch.Tensor:
    """What a pass over a tree has for a mask, ``[1, 1, 1, 1]`` int8.

    transformers returns a 4-D mask as it is: none is built, and nothing waits for the device. Its dtype, which nobody
    else's mask has, tells compiled code whose pass it is: Dynamo compares every tensor's dtype, but no thread's
    context, before it takes code that is there.
    """
    return torch.zeros(1, 1, 1, 1, dtype=_MARK, device=device)


def is_of_a_tree(mask: torch.Tensor | None) -> bool:
    """Whether it is a :func:`tree_mask`."""
    return isinstance(mask, torch.Tensor) and mask.dtype == _MARK


@contextmanager
def active(context: AttentionContext | WholeCalls) -> Iterator[None]:
    """Run the forward passes inside on ``context`` (this thread only)."""
    previous = getattr(_active, "context", None)
    _active.context = context
    try:
        yield
    finally:
        _active.context = previous


def stars_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention signature: query ``[1, Hq, T, D]`` -> ``([1, T, Hq, Dv], None)``."""
    compiling = torch.compiler.is_compiling()
    context = None if compiling else getattr(_active, "context", None)
    ordinary = not is_of_a_tree(attention_mask) if compiling else context is None
    call = _ordinary_attention(module) if ordinary else getattr(context, "call", None)
    if call is not None:
        return call(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise NotImplementedError(f"{type(module).__name__} has no layer_idx: its keys cannot be told apart")
    if isinstance(context, ShapeRecorder):
        context.modules[module] = layer
        context.marked &= is_of_a_tree(attention_mask)
    attend = torch.ops.stars_fast.attend.default if compiling else _attend
    out = attend(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        layer,
        query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        kwargs.get("sliding_window") or 0,
        kwargs.get("softcap") or 0.0,
        kwargs.get("s_aux"),
    )
    return out[None], None


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layer: int,
    scale: float,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """The active context's attention. To compiled code it is one operator: what the context holds changes from pass to
    pass, and pools that were arguments would be copied, because compiled code is made free of writes first."""
    return _active.context.attend(layer, q, k, v, scale=scale, window=window, softcap=softcap, sinks=sinks)


def _attend_rotated(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    layer: int,
    scale: float,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """:func:`_attend` of queries and keys that are still to be rotated (:mod:`stars_fast.tree.joined`)."""
    options = {"scale": scale, "window": window, "softcap": softcap, "sinks": sinks}
    return _active.context.attend(layer, q, k, v, angles=(cos, sin), **options)


library.define(
    "attend(Tensor q, Tensor k, Tensor v, SymInt layer, float scale, SymInt window, float softcap, Tensor? sinks)"
    " -> Tensor"
)
library.impl("attend", _attend, "CompositeExplicitAutograd")
library.define(
    "attend_rotated(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, SymInt layer, float scale, SymInt window,"
    " float softcap, Tensor? sinks) -> Tensor"
)
library.impl("attend_rotated", _attend_rotated, "CompositeExplicitAutograd")
for _name in ("attend", "attend_rotated"):
    torch.library.register_fake(
        f"stars_fast::{_name}", lambda q, k, v, *options: q.new_empty(*q.shape[:2], v.shape[2]), lib=library
    )


def _ordinary_attention(module: nn.Module) -> Callable[..., Any]:
    """What ``module`` would have called, had its model not been plugged in."""
    implementation = _ordinary_implementation(getattr(module, "config", None))
    if implementation in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[implementation]
    for cls in type(module).__mro__:  # "eager" stands in each family's own file
        eager = getattr(sys.modules[cls.__module__], "eager_attention_forward", None)
        if eager is not None:
            return eager
    raise NotImplementedError(f"{type(module).__name__}: no attention named {implementation!r}")


def _ordinary_implementation(config: Any) -> str:
    plugged = _plugged.get(id(config))
    return "sdpa" if plugged is None else plugged.implementation


def _ordinary_mask(*args: Any, config: Any = None, **kwargs: Any) -> Any:
    """The mask that goes with :func:`_ordinary_attention`."""
    implementation = _ordinary_implementation(config)
    make = ALL_MASK_ATTENTION_FUNCTIONS.get(implementation)
    return None if make is None else make(*args, config=config, **kwargs)


AttentionInterface.register(NAME, stars_attention)
AttentionMaskInterface.register(NAME, _ordinary_mask)


@dataclass
class _Evaluating:
    """A model in eval mode: the modules to put back into training, what else to undo, and how many calls rely on it."""

    training: list[nn.Module]
    undo: ExitStack
    depth: int = 0


_evaluated: dict[int, _Evaluating] = {}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, on the machine's faster linear layers; the last to leave restores every module's own mode.

    May be nested and shared.
    """
    with _plugged_lock.held():
        if id(model) not in _evaluated:
            undo = ExitStack()
            undo.enter_context(faster_linears(model))
            _evaluated[id(model)] = _Evaluating([module for module in model.modules() if module.training], undo)
        _evaluated[id(model)].depth += 1
    try:
        model.eval()
        yield
    finally:
        with _plugged_lock.held():
            _evaluated[id(model)].depth -= 1
            if not _evaluated[id(model)].depth:
                evaluated = _evaluated.pop(id(model))
                evaluated.undo.close()
                for module in evaluated.training:
                    module.training = True


@dataclass
class _Plugged:
    """A config whose model runs on the plug-in: what it was set to, and how many times it is plugged."""

    implementation: str
    depth: int = 0


@contextmanager
def plugged(model: PreTrainedModel) -> Iterator[None]:
    """Run ``model`` on the plug-in and in eval mode inside; restore both afterwards.

    May be nested, and models may share a config: the setting lies there, so that is what is counted.
    """
    # Parents come before their parts, so that restoring a part's setting is not undone by its parent's.
    configs = {id(part.config): part.config for part in model.modules() if isinstance(part, PreTrainedModel)}
    with _plugged_lock.held():
        for key, config in configs.items():
            _plugged.setdefault(key, _Plugged(config._attn_implementation)).depth += 1
    try:
        model.set_attn_implementation(NAME)
        with evaluating(model):
            yield
    finally:
        with _plugged_lock.held():
            for key, config in configs.items():
                _plugged[key].depth -= 1
                if not _plugged[key].depth:
                    config._attn_implementation = _plugged.pop(key).implementation


def is_plugged(model: PreTrainedModel) -> bool:
    """Whether somebody runs ``model`` on the plug-in."""
    return id(model.config) in _plugged


@contextmanager
def own_dtypes() -> Iterator[None]:
    """Models compute in the dtypes of their weights inside, whatever ``torch.autocast`` says on this thread.

    It belongs to a thread, and any thread may take a step for all: the texts of one would depend on another's.
    """
    on = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    for kind in on:
        torch.set_autocast_enabled(kind, False)
    try:
        yield
    finally:
        for kind in on:
            torch.set_autocast_enabled(kind, True)


def causal_probe(length: int, vocab_size: int, device: torch.device) -> torch.Tensor:
    """A few token ids that every vocabulary has, ``[length]`` int64."""
    return torch.arange(length, device=device) % vocab_size


def is_causal(base: nn.Module, vocab_size: int, device: torch.device) -> bool:
    """Whether a changed last token leaves the hidden states before it alone. Asks the numbers, not the class name."""
    ids = causal_probe(5, vocab_size, device)
    other = ids.clone()
    other[-1] = (other[-1] + 1) % vocab_size
    hidden = base(input_ids=torch.stack([ids, other])).last_hidden_state[:, :-1].float()
    return bool(F.mse_loss(hidden[0], hidden[1]) <= 1e-6 * hidden[0].square().mean().clamp_min(1e-12))

"""CUDA graphs of one model's work: made when a shape asks for one, kept until the pool or the weights move."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any, Protocol, TypeVar

import torch
from transformers import PreTrainedModel

from stars_fast.notices import warn
from stars_fast.report.weights import plain_tensors
from stars_fast.tree.lack import is_lack_of_memory

_MOST_GRAPHS = 64  # of a kind


class Pooled(Protocol):
    """What captured work relies on: a model, and a pool of slots that stays where it is."""

    model: PreTrainedModel
    device: torch.device
    pools_made: int


class Captured:
    """Work on tensors that stay where they are, so that a CUDA graph can hold it.

    The model keeps this object and is held weakly, so that pools are freed when it is dropped.
    """

    def __init__(self, model: Pooled) -> None:
        self.model: Any = weakref.proxy(model)
        self.graph: torch.cuda.CUDAGraph | None = None

    def rest(self) -> None:
        """Put the tensors in a state in which :meth:`work` changes nothing but padding."""
        raise NotImplementedError

    def work(self) -> None:
        """What the graph holds."""
        raise NotImplementedError

    def run(self) -> None:
        """Replay the graph or, where there is none, do the work."""
        if self.graph is not None:
            self.graph.replay()
        else:
            self.work()

    def capture(self, pool: Any, stream: torch.cuda.Stream) -> None:
        """Let :meth:`run` replay a CUDA graph from now on. What the tensors held is gone."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles kernels, and lets libraries allocate what they keep
                self.rest()
                self.work()
            self.rest()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self.work()
        finally:
            torch.cuda.set_stream(current)  # a capture that fails leaves its own behind
        current.wait_stream(stream)
        self.graph = graph


_Work = TypeVar("_Work", bound=Captured)


class Graphs:
    """The captured work of a model, by shape."""

    def __init__(self, model: Pooled, enabled: bool) -> None:
        self.enabled = enabled  # whether work is padded to shapes that recur; on a CUDA device it is captured then
        self.made = 0  # graphs so far
        self.tried = 0  # captures so far, those that failed included
        self.unaffordable: dict[Hashable, str] = {}  # shapes that memory was short of, and what torch said
        self._model: Any = weakref.proxy(model)
        self._kept: dict[Hashable, Captured] = {}
        self._impossible: set[type[Captured]] = set()  # what could not be captured once
        self.relied_on: tuple[Any, ...] = ()
        self._pool: Any = None
        self._stream: Any = None

    @property
    def captures(self) -> bool:
        """Whether the model lies where there are graphs."""
        return bool(self._model.device.type == "cuda")

    def refresh(self) -> None:
        """Drop all graphs if something that they take for granted has moved."""
        if self.enabled:
            now = (self._model.pools_made, *addresses(self._model.model))
            if now != self.relied_on:
                self.drop()
            self.relied_on = now

    @property
    def captured(self) -> int:
        """Graphs that there are."""
        return sum(work.graph is not None for work in self._kept.values())

    def drop(self, kind: type[Captured] | None = None) -> None:
        """Forget all graphs, or those of a kind."""
        self._kept = {shape: work for shape, work in self._kept.items() if kind and type(work) is not kind}
        self.unaffordable.clear()  # there is memory again
        self._forget_empty_pool()

    def get(self, shape: Hashable, make: Callable[[], _Work], *, capture: bool = True) -> _Work:
        """The work of that shape, kept; on a CUDA device captured, where ``capture`` asks for it and it is possible.

        Where memory is short of one shape's graph, its kernels are launched from then on; the others' graphs stay.
        """
        work: Any = self._kept.pop(shape, None)
        if work is None:
            work = make()
            possible = self.captures and type(work) not in self._impossible and shape not in self.unaffordable
            if capture and possible and not self._capture(shape, work):
                del work  # what half a capture holds is needed
                work = make()
        same = [key for key, kept in self._kept.items() if type(kept) is type(work)]
        if len(same) >= _MOST_GRAPHS:
            del self._kept[same[0]]  # the one that was not used for longest
        self._kept[shape] = work
        return work

    def __contains__(self, shape: Hashable) -> bool:
        return shape in self._kept

    def _capture(self, shape: Hashable, work: Captured) -> bool:
        """Whether there is a graph now. Where there is none, none is asked for again: of this shape where memory was
        short, else of this kind.
        """
        self.tried += 1
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()  # all graphs share its memory: one runs at a time
        if self._stream is None:
            self._stream = torch.cuda.Stream()  # one: cuBLAS keeps 32 MiB for every stream it has worked on
        try:
            work.capture(self._pool, self._stream)
            self.made += 1
            return True
        except RuntimeError as error:
            # What breaks a capture off may come as the context of what its end raises.
            told = next((str(one) for one in (error, error.__context__) if is_lack_of_memory(one)), None)
            if told is None:
                self.drop()
                self._impossible.add(type(work))
                warn(
                    f"the layers of {type(self._model.model).__name__} cannot be captured in a CUDA graph, so their "
                    f"kernels are launched one by one: {error}"
                )
                return False
        if not self.unaffordable:  # once: the next shapes fare no better
            warn(
                f"there is no memory for a CUDA graph of {shape}, nor perhaps for others of "
                f"{type(self._model.model).__name__}, so their kernels are launched one by one (leave more with a "
                f"smaller gpu_memory_utilization or kv_cache_tokens): {told}"
            )
        self.unaffordable[shape] = told
        self._forget_empty_pool()
        return False

    def _forget_empty_pool(self) -> None:
        if not self.captured:
            self._pool = None  # memory that no graph uses is gone, and its handle with it


def addresses(model: PreTrainedModel) -> tuple[Any, ...]:
    """What a captured graph takes for granted: where weights lie, which hooks there are, which adapters are on and how
    much they count."""
    adapters = tuple(
        (str(module.active_adapters), module.disable_adapters, module.merged, str(getattr(module, "scaling", None)))
        for module in model.modules()
        if hasattr(module, "active_adapters") and hasattr(module, "disable_adapters") and hasattr(module, "merged")
    )
    hooks = tuple(key for m in model.modules() for key in (*m._forward_pre_hooks, *m._forward_hooks))
    tensors = (*model.parameters(), *model.buffers())
    return (*(part.data_ptr() for tensor in tensors for part in plain_tensors(tensor)), adapters, hooks)

"""A transformers model whose keys and values live in a tree of slots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedModel

from stars_fast.notices import warn
from stars_fast.ops import check_supported
from stars_fast.ops.tree_attention import works_on_padding
from stars_fast.stays import Stays
from stars_fast.tree import media
from stars_fast.tree.attention import (
    NAME,
    ShapeRecorder,
    TreeContext,
    active,
    causal_probe,
    own_dtypes,
    plugged,
    tree_mask,
)
from stars_fast.tree.graphs import Graphs
from stars_fast.tree.passes import Pass, PassShape, trunk_room
from stars_fast.tree.prefixes import Prefixes
from stars_fast.tree.segment_tree import SegmentTree, TreePlan, plan
from stars_fast.tree.slots import SlotPool
from stars_fast.tree.support import (
    described,
    hidden_window,
    max_positions,
    place,
    refuse_unsupported,
    vocabulary,
    warn_of_shared_scales,
)

if TYPE_CHECKING:
    from stars_fast.tree.compiled import CompiledLayers

# A packed prefill is cut into pieces of this many tokens a row, so that a long prompt's scores fit in memory; on a CUDA
# device, whose kernels keep none, of so many that the first piece is mostly the whole text.
PREFILL_CHUNK = 512
PREFILL_CHUNK_CUDA = 4096
# Tokens of the largest forward pass, where nobody asks for less.
MOST_PACKED = 16384


class TreeModel(Stays):
    """Runs packed forward passes of ``model`` over a :class:`SegmentTree`.

    Parameters
    ----------
    model : transformers model
        Plugged and unplugged by the caller (:func:`stars_fast.tree.attention.plugged`).
    body : transformers model
        What a forward pass calls: the model itself, or its base model (without a head).
    role : str
        "policy" or "reward", or what else it is; for error messages.

    Attributes
    ----------
    tree : SegmentTree
        Another one after :meth:`allocate` and :meth:`clear`.
    takes_media : bool
        Whether the model reads anything besides text (:meth:`read_media`).
    reads_whole : bool
        Whether prompts of text alone must go through :meth:`read_media` as well, because their tokens see later ones.
        Said by :func:`stars_fast.tree.check.checked`.
    from_source : bool
        Whether prompts are sources, which an encoder reads (:class:`stars_fast.policy.encoder_decoder.EncoderDecoder`).
    prefixes : Prefixes
        What the tree holds for texts that begin alike; of this tree. For as long as the weights do not change.

    Notes
    -----
    Whoever makes one has its numbers compared (:func:`stars_fast.tree.check.checked`) before anything is captured or
    compiled (:meth:`accelerate`).

    Raises
    ------
    NotImplementedError
        For a family the attention interface does not reach, a stateful model, or ``dynamic`` rotary scaling, by name.
    """

    logit_size = 0  # ids with a logit, of models that are drawn from
    barred: torch.Tensor | None = None  # int64 [N], of such a model: ids that are never drawn

    from_source = False

    def __init__(
        self,
        model: PreTrainedModel,
        body: PreTrainedModel,
        role: str,
    ) -> None:
        refuse_unsupported(model, role, self.from_source)
        warn_of_shared_scales(model, role)
        self.model = model
        self.body = body
        self.role = role
        self.name = described(model, role)
        parameter = next(model.parameters())
        self.device = parameter.device
        self.text_config = model.config.get_text_config()
        self.vocab_size = vocabulary(model)
        self.made_for = place(model)
        self.max_positions = max_positions(self.text_config)
        self._mask = tree_mask(self.device)
        recorder = self._record_shapes()
        self.shapes, self.dtype, self.asks = recorder.shapes, recorder.dtype, recorder.asks
        self.modules = recorder.modules  # that attend, and their layers
        self._marked = recorder.marked
        self.takes_media, self.reads_whole = media.takes_media(model), False
        for _, key_size, value_size in sorted(set(self.shapes.values())):
            try:
                check_supported(key_size, value_size, self.dtype, self.device)
            except ValueError as error:
                raise NotImplementedError(f"the {self.name}: {error}") from error
        # A window that lives in the mask alone does not reach the plug-in: texts no longer than it are the same.
        hidden = hidden_window(self.text_config, recorder.windows)
        if hidden is not None:
            self.max_positions = min(self.max_positions or hidden, hidden)
        self.pool = SlotPool({}, 1, self.dtype, self.device)
        self._plant(1)
        self.pools_made = 0
        self.graphs = Graphs(self, False)
        self.torch_compile = False
        self._compiled: CompiledLayers | None = None
        self.watched = False  # by hooks, which a graph does not call
        self.trunk_room = 0  # of captured work; never smaller again, so that later calls find graphs that fit

    def check_unchanged(self) -> None:
        """Raise RuntimeError if the model has another device, dtype or vocabulary than when this was made."""
        was, now = self.made_for, place(self.model)
        if was != now:
            raise RuntimeError(
                f"the {self.role} was {was} when the engine was made, and is {now} now: make a new engine (only the "
                "numbers of its weights may change)"
            )

    def accelerate(self, cuda_graphs: bool, torch_compile: bool) -> None:
        """Whether work is captured (:class:`stars_fast.tree.graphs.Graphs`), and whether decoder layers run compiled
        (:class:`stars_fast.tree.compiled.CompiledLayers`); on a CUDA device only.
        """
        on_gpu = self.device.type == "cuda"
        self.graphs.enabled = cuda_graphs and on_gpu and not works_on_padding(self.device)
        self.torch_compile = torch_compile and on_gpu
        if self.torch_compile and not self._marked:
            self.torch_compile = False
            warn(
                f"the layers of {type(self.model).__name__} run without torch.compile: their attention gets another "
                "mask than the model was given, by which compiled code tells the engine's passes from a user's"
            )

    @property
    def prompt_positions(self) -> int | None:
        """Most tokens of a prompt."""
        return self.max_positions

    @property
    def longest(self) -> int | None:
        """Most tokens of a prompt with its answer."""
        return self.max_positions

    @property
    def prepared(self) -> int:
        """Captures and compilations so far: a heartbeat with one says nothing of speed."""
        return self.graphs.tried + (0 if self._compiled is None else self._compiled.compilations)

    @own_dtypes()
    def _record_shapes(self) -> ShapeRecorder:
        recorder = ShapeRecorder({})
        with torch.no_grad(), plugged(self.model):
            if self.model.config._attn_implementation == NAME:
                with active(recorder):
                    ids = causal_probe(1, self.vocab_size, self.device)
                    self.body(
                        input_ids=ids[None],
                        position_ids=torch.zeros_like(ids)[None],
                        attention_mask=self._mask,
                        use_cache=False,
                    )
        expected = self.text_config.num_hidden_layers
        if len(recorder.shapes) != expected:
            raise NotImplementedError(
                f"the {self.name}: "
                f"{len(recorder.shapes)} of its {expected} layers reach transformers' attention interface, so its "
                "keys and values cannot be kept in a tree"
            )
        return recorder

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values that one token takes."""
        return SlotPool.bytes_per_slot(self.shapes, self.dtype)

    def allocate(self, tokens: int, longest: int = 1) -> None:
        """An empty tree over ``tokens`` slots (and slot 0), for texts of up to ``longest``; a pool that is large enough
        is kept.

        Raises
        ------
        MemoryError
            Where the device has no room for them.
        """
        if self.pool.slots < tokens + 1:
            self.free()  # before the new one is made
            try:
                self.pool = SlotPool(self.shapes, tokens + 1, self.dtype, self.device)
            except (RuntimeError, MemoryError) as error:  # torch's, which says neither what for nor what to do
                raise MemoryError(
                    f"{tokens} slots of the {self.role} take {tokens * self.bytes_per_token / 2**30:.1f} GiB, which "
                    f"{self.device} does not have: set a smaller kv_cache_tokens or max_model_len, or ask for fewer or "
                    "shorter answers at a time (max_new_tokens; particles, n of the method)"
                ) from error
            self.pools_made += 1
        self._plant(tokens + 1)
        self.graphs.refresh()
        self._make_room(longest)

    def _make_room(self, longest: int) -> None:
        """Let captured work have room for trunks of so many tokens; what had less is not asked for again."""
        if (room := trunk_room(longest)) > self.trunk_room:
            self.trunk_room = room
            self.graphs.drop()

    def free(self) -> None:
        """Give the pool's memory back, and that of what was captured with it, until :meth:`allocate`."""
        self.graphs.drop()
        self.pool = SlotPool({}, 1, self.dtype, self.device)
        self._plant(1)

    def clear(self) -> None:
        """Drop everything the tree holds, whoever holds it."""
        self._plant(self.tree.capacity)

    def _plant(self, slots: int) -> None:
        """An empty tree, of which no prefixes are kept."""
        self.tree = SegmentTree(slots)
        self.prefixes = Prefixes(self.tree)

    def plan(
        self, leaves: Sequence[int], rows: Sequence[int], new_slots: Sequence[int], ids: np.ndarray | None = None
    ) -> TreePlan:
        """Fork ``rows[g]`` branches of ``leaves[g]`` (-1: from nothing), branch b with ``new_slots[b]`` slots, for
        ``ids`` where they are known.

        Kept prefixes (:attr:`prefixes`) make way where these are not free.
        """
        as_array = np.asarray
        slots = as_array(new_slots, dtype=np.int32)
        self.prefixes.make_room(int(slots.sum()))
        of_groups = as_array(leaves, dtype=np.int64), as_array(rows, dtype=np.int32)
        return plan(self.tree, *of_groups, slots, self.device, ids)

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, context: TreeContext, **kwargs: Any) -> Any:
        """One packed forward pass. ids, positions ``[T]`` int64; returns the body's output, batch size 1."""
        if self.torch_compile:
            from stars_fast.tree.compiled import CompilationError, CompiledLayers  # imports torch's compiler: a second

            if self._compiled is None:
                self._compiled = CompiledLayers(self.model)
            try:
                with self._compiled.running():
                    output = self.call_body(ids, positions, context, **kwargs)
                # Hooks that watch the model would take the few tokens for others.
                told = "" if self.watched else self._compiled.disagreement(self, single=len(ids) == 1)
                if not told:
                    return output
            except CompilationError as error:
                told = f"do not compile, so they run without: {error}"
            self.torch_compile = False
            warn(f"the layers of {type(self.model).__name__} {told}")
        return self.call_body(ids, positions, context, **kwargs)

    def call_body(self, ids: torch.Tensor, positions: torch.Tensor, context: TreeContext, **kwargs: Any) -> Any:
        """:meth:`forward`, whatever the layers run as."""
        with active(context):
            return self.body(
                input_ids=ids[None],
                position_ids=positions[None],
                attention_mask=self._mask,
                use_cache=False,
                **kwargs,
            )

    def encode(
        self, leaves: Sequence[int], rows: Sequence[int], branches: Sequence[Sequence[int]], **kwargs: Any
    ) -> tuple[list[int], Any, torch.Tensor]:
        """Encode whole branches at once: :meth:`plan` them, and run the body over all their tokens.

        Parameters
        ----------
        leaves, rows : sequence of int
            As in :meth:`plan`.
        branches : sequence of token ids, one per row, none empty
        **kwargs
            Further arguments of the body. A ``logits_to_keep`` that is a number stands for each branch's last token.

        Returns
        -------
        (nodes, output, last)
            The branches' nodes (a reference of the caller's to each), the body's output, and the index ``[B]`` int64 of
            each branch's last token in the packed row. Whatever this raises (memory), the tree is as before.
        """
        lengths = [len(branch) for branch in branches]
        ids = np.fromiter(chain.from_iterable(branches), dtype=np.int64, count=sum(lengths))
        plan = self.plan(leaves, rows, lengths, ids)
        try:
            return plan.branches, *self._encode(plan, lengths, max(rows), **kwargs)
        except BaseException:
            self.tree.release_all(plan.branches)
            raise

    def _encode(self, plan: TreePlan, lengths: Sequence[int], rows: int, **kwargs: Any) -> tuple[Any, torch.Tensor]:
        last = plan.query_indptr[1:].long() - 1
        small = self._small_pass(plan, lengths, rows, kwargs)
        if small is not None:
            return self._run_small(small, plan), last
        if isinstance(kwargs.get("logits_to_keep"), int):  # else the caller's index of the packed row
            kwargs["logits_to_keep"] = last
        context = TreeContext.of_whole_branches(self.pool, plan, rows)
        return self.forward(plan.ids.long(), plan.positions.long(), context, **kwargs), last

    def on_device(self) -> AbstractContextManager[Any]:
        """Makes the model's CUDA device the current one inside: graphs and their streams lie on it."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _small_pass(self, plan: TreePlan, lengths: Sequence[int], rows: int, kwargs: Mapping[str, Any]) -> Pass | None:
        """What to run it on where it is small: tensors of a padded shape, captured when that is first met."""
        logits, kept = self.body is self.model, kwargs.get("logits_to_keep", 0)
        usual = kwargs.keys() <= {"logits_to_keep"} and isinstance(kept, int) and kept == 0
        if not self.graphs.enabled or self.watched or not usual or logits != ("logits_to_keep" in kwargs):
            return None
        groups, longest = plan.trunk_slots.shape
        self._make_room(longest)
        shape = PassShape.padded(lengths, groups, rows, self.trunk_room, logits)
        if shape is None:
            return None
        return self.small_pass(shape)

    def small_pass(self, shape: PassShape) -> Pass:
        """The pass of that shape, captured where that is possible."""
        with self.on_device():
            return self.graphs.get(shape, lambda: Pass(self, shape))

    def _run_small(self, small: Pass, plan: TreePlan) -> SimpleNamespace:
        with self.on_device():
            small.plan.load(plan)
            small.run()
        if small.shape.logits:
            return SimpleNamespace(logits=small.output[:, : len(plan.branches)].clone())
        return SimpleNamespace(last_hidden_state=small.output[:, : len(plan.ids)].clone())

    def extend(
        self, leaves: Sequence[int], tokens: Sequence[Sequence[int]], limit: int | None = None, **kwargs: Any
    ) -> tuple[list[int], list[Any]]:
        """Append tokens below each leaf, long runs in chunks; no forward pass takes more than ``limit`` tokens.

        Default: :data:`MOST_PACKED`.

        Returns
        -------
        (nodes, outputs)
            A new node per leaf (a reference of the caller's; the leaf's own reference is untouched), and per leaf
            (output, last, place): what :meth:`encode` returned for its last token, whose index is ``last[place]``.
        """
        nodes = [self.retain(leaf) for leaf in leaves]
        try:
            return nodes, self._extend(nodes, tokens, limit, **kwargs)
        except BaseException:
            for node in nodes:
                self.release(node)
            raise

    def _extend(self, nodes: list[int], tokens: Sequence[Sequence[int]], limit: int | None, **kwargs: Any) -> list[Any]:
        outputs: list[Any] = [None] * len(nodes)
        done, limit = [0] * len(nodes), MOST_PACKED if limit is None else limit
        longest = PREFILL_CHUNK_CUDA if self.device.type == "cuda" else PREFILL_CHUNK
        while any(start < len(run) for start, run in zip(done, tokens, strict=True)):
            rows, pieces, packed = list[int](), list[Sequence[int]](), 0
            for i, run in enumerate(tokens):
                room = min(longest, limit - packed)
                if room > 0 and (piece := run[done[i] : done[i] + room]):
                    rows.append(i)
                    pieces.append(piece)
                    packed += len(piece)
                    done[i] += len(piece)
            branches, output, last = self.encode([nodes[i] for i in rows], [1] * len(rows), pieces, **kwargs)
            for at, (i, node) in enumerate(zip(rows, branches, strict=True)):
                self.release(nodes[i])
                nodes[i] = node
                outputs[i] = (output, last, at)
        return outputs

    def read_media(
        self, inputs: Mapping[str, Any], rows: Sequence[int] = (0,), lag: int = 0, **kwargs: Any
    ) -> tuple[list[int], Any]:
        """Read prompts in one forward pass of the model as it is, its own attention, masks and towers included.

        Parameters
        ----------
        inputs : mapping
            What a processor makes of prompts: the body's arguments, ``input_ids`` and ``attention_mask`` ``[B, T]``
            among them, padded on either side. Tensors are moved to the model's device, floats to its dtype.
        rows : sequence of int
            Of the batch, whose keys and values are kept.
        lag : int
            Tokens at the end of each that are not.
        **kwargs
            Further arguments of the body, such as ``logits_to_keep``.

        Returns
        -------
        (nodes, output)
            A new node per row (a reference of the caller's), below which positions go on as the model has them; and the
            body's output for the whole batch. Whatever it raises, the tree is as before.

        Raises
        ------
        SlotsExhausted
            When the tree has fewer free slots than the rows have tokens.
        """
        return media.read(self, inputs, rows, lag, **kwargs)

    def retain(self, node: int) -> int:
        """One more reference to the node, which is returned; -1 stands for none."""
        if node >= 0:
            self.tree.retain(node)
        return node

    def release(self, node: int) -> None:
        """One reference fewer to the node; -1 stands for none."""
        if node >= 0:
            self.tree.release(node)

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

class SlotsExhausted(RuntimeError):
    """More slots were requested than are free; the tree is as before."""

class SegmentTree:
    """Who holds which slots.

    A slot is the place of one token's keys and values. A node is a run of slots with a parent; its *path* is the slots
    from the root down to its own last one. ``fork``, ``cut`` and ``plan`` give the caller one reference to the node
    they return, ``retain`` one more, and ``release`` takes one back; a child keeps its parent alive by itself. Only who
    holds a node may name it: any other name raises ValueError, and a name is never given to a second node.

    ``capacity`` counts slot 0, which is never handed out: it absorbs the writes of padding.
    ``free_slots + live_slots == capacity - 1`` at all times.
    """

    def __init__(self, capacity: int) -> None: ...
    @property
    def capacity(self) -> int: ...
    @property
    def free_slots(self) -> int: ...
    @property
    def live_slots(self) -> int: ...
    @property
    def nodes(self) -> int:
        """Live nodes."""

    def fork(self, parent: int = -1) -> int:
        """A new empty child of ``parent``, or a new empty root."""

    def extend(self, node: int, n: int) -> npt.NDArray[np.int32]:
        """Append ``n`` slots to the node's own run and return them, [n].

        Raises ValueError when the node has another holder or a child, SlotsExhausted when fewer are free.
        """

    def cut(self, node: int, length: int) -> int:
        """A node whose path is the first ``length`` slots of the path of ``node``.

        It is the deepest such node on the path, ``node`` included; where ``length`` falls inside a node, that node is
        split: a new node takes its first slots and becomes its parent, so that every name keeps its path. Length 0
        gives an empty root. ``node`` stays held: release it separately.
        """

    def shift(self, node: int, offset: int) -> None:
        """Let tokens of the node have the position ``offset + place in the path``, and those of its later descendants.

        Children, branches and both halves of a cut have the offset of what they come from; a root has 0. Raises
        ValueError when the node has a child, and for an offset that makes the next position negative or overflow.
        """

    def retain(self, node: int) -> None:
        """Take one more reference."""

    def release(self, node: int) -> None:
        """Give one reference back; frees the node and its ancestors as far as nobody holds them."""

    def release_all(self, nodes: Sequence[int]) -> None:
        """Release one node after another; where one is not held, those before it are released."""

    def length(self, node: int) -> int:
        """Number of slots of the node's path."""

    def slots(self, node: int) -> npt.NDArray[np.int32]:
        """The node's path, root to leaf, [length]."""

    def plan(
        self,
        leaves: Sequence[int] | npt.NDArray[np.integer],
        rows: Sequence[int] | npt.NDArray[np.integer],
        new_slots: Sequence[int] | npt.NDArray[np.integer],
        ids: Sequence[int] | npt.NDArray[np.integer] | None = None,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], int, int]:
        """Fork and extend all branches of a heartbeat, or none of them; see :func:`stars_fast.tree.segment_tree.plan`.

        Returns ``(branches [B], packed, P, S)``. ``packed`` holds, each from a multiple of 4 entries on: trunk_slots
        [G, P], trunk_len [G], branch_slots [B, S], branch_len [B], group_indptr [G + 1], trunk_position [G]; and of the
        T new tokens query_indptr [B + 1], write_slots [T], positions [T] and, where they are given, ids [T]. P and S
        are the longest trunk and branch, at least 1; unused places hold 0.
        """

# The kernels behind stars_fast.ops. Tensors are passed as addresses (``tensor.data_ptr()``) of contiguous CPU memory;
# stars_fast/ops/*.py checks dtypes and shapes and states the contracts. `type` is 0 for float32, 1 for float16, 2 for
# bfloat16. Each kernel raises ValueError for integers that would reach memory outside the tensors, before it writes; a
# function check_NAME with the arguments of NAME does that alone, and reads no tensors but those of integers.

def philox4x32(key: int, counter: Sequence[int]) -> list[int]:
    """Four 32-bit words of Philox4x32-10."""

def gumbel(bits: int) -> float:
    """Gumbel noise from 32 random bits."""

def sample_step(
    logits: int,
    type: int,
    rows: int,
    vocab: int,
    keys: int,
    segment: int,
    attempt: int,
    position: int,
    alive: int,
    limit: int,
    temperature: int,
    top_k: int,
    top_p: int,
    min_p: int,
    repetition_penalty: int,
    seen: int,
    eos: int,
    eos_count: int,
    token: int,
    logprob: int,
    sampling_logprob: int,
    entropy: int,
    threads: int,
    /,
) -> None:
    """``seen`` is 0 where there is none."""

def gather_logprobs(logits: int, type: int, rows: int, vocab: int, tokens: int, out: int, threads: int, /) -> None:
    """Raises ValueError where a token is outside the vocabulary."""

def select_and_commit(
    rows: int,
    groups: int,
    reward: int,
    length: int,
    ended: int,
    group_indptr: int,
    keys: int,
    segment: int,
    attempts: int,
    committed: int,
    max_new_tokens: int,
    max_attempts: int,
    base: int,
    target: int,
    beta: int,
    ramp: int,
    best_reward: int,
    best_attempt: int,
    best_length: int,
    best_ended: int,
    winner: int,
    accepted: int,
    threshold: int,
    finish: int,
    /,
) -> None: ...
def skinny_product(
    x: int, weight: int, bias: int, out: int, rows: int, inputs: int, outputs: int, threads: int, /
) -> None:
    """A product with one weight, in float32; no integers to check. ``bias`` is 0 where there is none."""

def floats_of_registers() -> int:
    """How many floats the vector registers hold that the kernels use here: 16 with AVX-512, 8 with AVX2, else 4."""

def cpu_is_amd() -> bool:
    """Whether this is an x86 processor of AMD's."""

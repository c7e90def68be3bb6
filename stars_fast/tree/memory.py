"""How many tokens of keys and values a machine can hold."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from weakref import WeakKeyDictionary

import torch

from stars_fast.tree.model import MOST_PACKED, TreeModel
from stars_fast.tree.passes import MOST_TOKENS, PassShape, group_bucket, trunk_room

# Of the memory that is free when the pool is made, where no engine has divided the device; the rest is for activations
# and for everybody else.
_SHARE_OF_FREE_MEMORY = 0.4
# Of the physical memory, where a machine does not tell what is free (macOS).
_SHARE_OF_PHYSICAL_MEMORY = 0.5
# Where it does not even tell that.
_UNKNOWN_MEMORY = 4 << 30
_ROOT = Path("/")
# Of a token a layer holds at once: residual, norms in float32, queries, keys, values, attention; gate, up, product.
_HIDDEN_COPIES, _INTERMEDIATE_COPIES = 8, 4
# Of the largest decode step's table, for those of all that are captured as requests end: of up to 256, each number of
# them that is padded to takes 2.6 times as much together. What does not fit beside them is launched.
_TABLES_OF_STEPS = 3

# Wanted by default at least, so that callers with longer prompts may join whoever came first.
_LEAST_TOKENS = 4096

# Most tokens of a model's pool, where an engine has divided its device.
_bounds: WeakKeyDictionary[TreeModel, int] = WeakKeyDictionary()


def free_bytes(device: torch.device) -> int:
    """Free memory of a CUDA device, what torch's allocator keeps in reserve included, or of the machine, as far as its
    container may use it.
    """
    if device.type == "cuda":
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserve
    limits = [*_available(), *_left_to_container()]
    if limits:
        return max(min(limits), 0)
    try:
        return int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * _SHARE_OF_PHYSICAL_MEMORY)
    except (AttributeError, ValueError, OSError):
        return _UNKNOWN_MEMORY


def _available() -> Iterator[int]:
    """What Linux says could be had without swapping."""
    for name, value in _numbers(_ROOT / "proc/meminfo"):
        if name == "MemAvailable:":
            yield value << 10


def _left_to_container() -> Iterator[int]:
    """What each control group that this process is in leaves of its limit."""
    try:
        groups = (_ROOT / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for number, controllers, path in (line.split(":", 2) for line in groups):
        if "memory" in controllers.split(","):  # version 1
            top = _ROOT / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        elif number == "0":
            top, names = _ROOT / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        else:
            continue
        here = top / path.lstrip("/")
        # A container may see its own group as the top, or all of them.
        for group in {top, *(parent for parent in (here, *here.parents) if top in parent.parents)}:
            try:
                limit, usage = (int((group / name).read_text()) for name in names[:2])
            except (OSError, ValueError):  # no such group, or "max"
                continue
            # Files that were read and may be dropped count as used: weights, above all.
            yield limit - usage + dict(_numbers(group / "memory.stat")).get(names[2], 0)


def _numbers(path: Path) -> Iterator[tuple[str, int]]:
    """Names and values of a file that has one pair a line."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return
    for words in map(str.split, lines):
        if len(words) >= 2 and words[1].isdigit():
            yield words[0], int(words[1])


def default_tokens(model: TreeModel, rows: int, tokens_per_row: int) -> int:
    """Tokens that ``rows`` rows want, and whoever may join them, or as many as memory holds if that is less.

    That is the model's part of a divided device (:func:`divide_devices`), else a share of the free memory. A pool that
    is there is used as a whole.
    """
    wanted = max(rows * tokens_per_row, _LEAST_TOKENS, model.pool.slots - 1)
    affordable = _bounds.get(model)
    if affordable is None:
        held = model.pool.slots * model.bytes_per_token  # is kept, or freed before a larger pool is made
        affordable = int((free_bytes(model.device) + held) * _SHARE_OF_FREE_MEMORY / model.bytes_per_token)
    affordable = max(affordable, model.pool.slots - 1)
    return max(min(wanted, affordable), tokens_per_row)


def divide_devices(models: Sequence[TreeModel], rows: int, utilization: float, longest: int = 1) -> None:
    """Bound the pools of these models so that they keep to ``utilization`` of each CUDA device's memory, all in all.

    Forward passes are of up to so many rows, below trunks of up to ``longest`` tokens.

    Elsewhere the memory is everybody's, and the pools keep to a share of what is free. Models on one device get pools
    of equally many tokens. Call it before any of them allocates.
    """
    for device in {model.device for model in models}:
        here = [model for model in models if model.device == device]
        each = [model.bytes_per_token for model in here]
        held = sum(model.pool.slots * model.bytes_per_token for model in here)  # kept, or freed before the new is made
        free = free_bytes(device) + held
        if device.type == "cuda":
            total = torch.cuda.mem_get_info(device)[1]
            workspace = sum(_workspace(model, rows, longest) for model in here)
            tokens = pool_tokens(total, total - free, workspace, each, utilization)
        else:
            tokens = int(free * _SHARE_OF_FREE_MEMORY) // sum(each)
        for model in here:
            _bounds[model] = tokens


def pool_tokens(total: int, in_use: int, workspace: int, bytes_per_token: Sequence[int], utilization: float) -> int:
    """Tokens that each of several pools on one device can hold.

    All in bytes: of ``total`` the share ``utilization`` may be used; ``in_use`` is what weights and others take, and
    ``workspace`` what forward passes need (:func:`workspace_bytes`).
    """
    return max(0, int(utilization * total - in_use - workspace) // sum(bytes_per_token))


def workspace_bytes(
    rows: int, vocab: int, hidden: int, intermediate: int, itemsize: int, packed_tokens: int = MOST_PACKED
) -> int:
    """Bytes of a forward pass's logits (``rows``, twice in float32) and of a layer's activations."""
    logits = 2 * rows * vocab * torch.float32.itemsize
    return logits + packed_tokens * (_HIDDEN_COPIES * hidden + _INTERMEDIATE_COPIES * intermediate) * itemsize


def _workspace(model: TreeModel, rows: int, longest: int) -> int:
    hidden = int(model.text_config.hidden_size)
    intermediate = int(getattr(model.text_config, "intermediate_size", None) or 4 * hidden)
    vocab = model.vocab_size if model.body is model.model else 0  # a reward model's body has no logits
    launched, captured = (
        workspace_bytes(rows, vocab, hidden, intermediate, model.dtype.itemsize, tokens)
        for tokens in (MOST_PACKED, MOST_TOKENS)
    )
    if not model.graphs.enabled:
        return launched
    logits = model.body is model.model
    trunk = max(model.trunk_room, trunk_room(longest))
    passes = list(PassShape.usual(trunk, logits, rows if logits else 0))
    kept = sum(shape.rows if logits else shape.tokens for shape in passes)
    outputs = kept * (vocab if logits else hidden) * model.dtype.itemsize  # each small pass keeps its own
    steps = _TABLES_OF_STEPS * group_bucket(rows) if logits else 0
    tables = trunk * (sum(shape.groups for shape in passes) + steps)
    return launched + captured + outputs + tables * torch.int32.itemsize  # memory of graphs serves nobody else

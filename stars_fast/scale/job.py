"""The job behind ``stars-fast batch``: rows as small tables, actors that answer them and write parts."""

from __future__ import annotations

import json
import logging
import os
import pickle
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from stars_fast.config import StarsConfig
from stars_fast.engine import StarsEngine
from stars_fast.rows.engines import MEANT, Names, build_engine
from stars_fast.rows.reading import Row
from stars_fast.scale.parts import Parts
from stars_fast.scale.stars_batch import complete

if TYPE_CHECKING:
    import pyarrow as pa

_STORE_BYTES = 256 << 20  # rows of a job wait there, and on the disk behind it; a share of the memory is Ray's default
_MOST_TRIES = 5  # of a batch whose worker dies every time, which might go on for ever
_UNDER_WAY = 2  # batches of an actor: while the longest rows of one end, the next one fills the engine


class Pool(NamedTuple):
    """Actors, from the least to the most, and what each of them holds."""

    least: int
    most: int
    cpus: float
    gpus: float


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """A cluster: the one at an address, or one on this machine that ends with this.

    Raises
    ------
    ConnectionError, ValueError
        Where there is none at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what ends the job is raised, and told once
    local = {"include_dashboard": False, "object_store_memory": _STORE_BYTES} if address is None else {}
    ray.init(address or "local", logging_level=logging.ERROR, **local)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield
    finally:
        ray.shutdown()


def make_room(actors: tuple[int, int] | None, cpus: float, gpus: float | None, patience: float) -> Pool:
    """The actors that the connected cluster shall have room for.

    Parameters
    ----------
    actors : (int, int), optional
        The least and the most. None: as many as its GPUs are enough for, or one.
    cpus : float
        Logical CPUs of each.
    gpus : float, optional
        GPUs of each. None: one where there are any.
    patience : float
        Seconds to wait for nodes that are joining, and for jobs that are leaving.

    Raises
    ------
    ValueError
        Where there is no room for the least. Ray itself would wait for it without a word.
    """
    import ray

    end = time.monotonic() + patience
    while True:
        total, free = ray.cluster_resources(), ray.available_resources()
        every = total.get("GPU", 0.0)
        each = {"CPU": cpus, "GPU": float(every > 0) if gpus is None else gpus}
        least, most = actors or [max(1, int(every / each["GPU"]) if each["GPU"] else 1)] * 2
        short = [name for name, amount in each.items() if free.get(name, 0.0) < least * amount]
        if not short:
            return Pool(least, most, each["CPU"], each["GPU"])
        if time.monotonic() >= end:
            break
        time.sleep(0.5)
    name = short[0]
    fit = int(free.get(name, 0.0) / each[name])
    raise ValueError(
        f"{least} actors of {each[name]:g} {name} each do not fit: {free.get(name, 0.0):g} of {total.get(name, 0.0):g} "
        f"{name}s are free: pass "
        + f"--actors {fit}, or " * (fit > 0)
        + f"--{name.lower()}s-per-actor with less than {each[name]:g}, or start more nodes"
    )


class PartWriter:
    """An actor: loads its models, answers batches and writes their parts."""

    def __init__(
        self,
        parts: Parts,
        config: StarsConfig,
        chat_template_kwargs: Mapping[str, Any] | None,
        names: Names,
        *engine: Any,
    ) -> None:
        self._parts, self._config, self._templates = parts, config, chat_template_kwargs
        self._engine: StarsEngine | Exception
        try:
            self._engine = build_engine(names, *engine)
        except Exception as error:
            self._engine = error

    def __call__(self, table: pa.Table) -> dict[str, list[Any]]:
        """How many rows were written and failed, or what ends the job: Ray would keep its traceback's text only."""
        try:
            return {"rows": [len(table)], "failed": [self._answer(table)], "error": [b""]}
        except Exception as error:
            return {"rows": [0], "failed": [0], "error": [_pickled(error)]}

    def _answer(self, table: pa.Table) -> int:
        if isinstance(self._engine, Exception):
            raise self._engine
        rows = [Row(**json.loads(row)) for row in table["row"].to_pylist()]
        if self._parts.tries([row.id for row in rows]) > _MOST_TRIES:
            cause = f"its worker died {_MOST_TRIES} times while it answered this row or others of its batch"
            rows = [replace(row, error=row.error or cause) for row in rows]
        records = complete(self._engine, rows, self._config, self._templates)
        return self._parts.write(records)


def run_job(
    rows: Iterable[Row],
    parts: Parts,
    pool: Pool,
    batch_size: int,
    worker: tuple[Any, ...],
    advance: Callable[[int], None],
) -> int:
    """Have rows answered on the connected cluster. Returns how many failed.

    Parameters
    ----------
    rows : iterable of Row
    parts : Parts
        That have begun.
    pool : Pool
        Of :func:`make_room`.
    batch_size : int
        Rows of a part.
    worker : tuple
        Arguments of :class:`PartWriter` after the first.
    advance : callable
        Told how many rows were written.

    Raises
    ------
    Exception
        What ended a worker's call, as it was raised there.
    """
    import ray.data
    from ray.data import ActorPoolStrategy

    failed = 0
    # A block is a batch: what a retry does again is the very part that was lost.
    blocks = [ray.put(table) for table in _tables(rows, batch_size)]
    answered = ray.data.from_arrow_refs(blocks).map_batches(
        PartWriter,
        fn_constructor_args=(parts, *worker),
        batch_size=batch_size,
        batch_format="pyarrow",
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
        compute=ActorPoolStrategy(
            min_size=min(pool.least, len(blocks)),
            max_size=min(pool.most, len(blocks)),
            max_tasks_in_flight_per_actor=_UNDER_WAY,
            max_concurrent_calls_per_actor=_UNDER_WAY,
            enable_true_multi_threading=True,
        ),
    )
    for told in answered.iter_rows():
        if told["error"]:
            raise pickle.loads(told["error"])
        advance(told["rows"])
        failed += told["failed"]
    return failed


def _tables(rows: Iterable[Row], batch_size: int) -> Iterator[pa.Table]:
    import pyarrow as pa

    every = iter(rows)
    while batch := [json.dumps(vars(row)) for row in islice(every, batch_size)]:
        yield pa.table({"row": pa.array(batch, pa.large_string())})


def _pickled(error: Exception) -> bytes:
    """An exception, as it is where that can be; a mistake of ours has its traceback in the worker's log."""
    if not isinstance(error, MEANT):
        traceback.print_exception(error)
    try:
        pickle.loads(given := pickle.dumps(error))
    except Exception:
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
    return given

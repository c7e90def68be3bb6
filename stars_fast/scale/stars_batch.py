"""An engine as a class for ``ray.data.Dataset.map_batches``: columns in, columns out."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stars_fast.config import StarsConfig
from stars_fast.engine import StarsEngine
from stars_fast.loop.stream import Progress
from stars_fast.rows.pictures import COLUMNS
from stars_fast.rows.reading import Row, each_row
from stars_fast.rows.responses import Records, finished_rows

if TYPE_CHECKING:
    import pyarrow as pa

_READ = ("id", "prompt", "messages", "prompt_ids", *COLUMNS, "seed")


class StarsBatch:
    """Completes the rows of a batch. Each Ray Data actor makes one, with models of its own.

    A row's text depends on the seed, its id and the settings only: not on batches, workers or retries, and it is what
    ``stars-fast generate`` writes for that row. (In bfloat16 another batch may round differently.)

    Parameters
    ----------
    policy, reward : str
        Folders, hub ids or "demo": every actor loads them itself. ``reward`` may also be what
        :class:`~stars_fast.StarsEngine` takes and pickles, such as a function.
    config : StarsConfig, optional
    seed : int
        Rows draw by this and their id, or by a column ``seed`` of their own.
    chat_template_kwargs : mapping, optional
        Variables for chat templates.
    **engine
        Further arguments of :class:`~stars_fast.StarsEngine`: ``tokenizer``, ``max_rows``, ``device``, ...

    Notes
    -----
    A batch (Arrow, pandas or NumPy) has a column ``id``, text or integers, which differ within the dataset, and one of
    ``prompt`` (text), ``messages`` (chats) and ``prompt_ids`` in each row. A column ``image`` or ``images`` has
    pictures: whole paths, data URLs, the bytes of files, or what data sets of the hub have,
    ``{"bytes": ..., "path": ...}``; one or a list. A null in a message is a key that the message has not: Arrow gives
    all of them the keys of one. The batch comes back as an Arrow table with all its columns and these: ``sample,
    completion, reward, finish_reason, error, tokens, completion_ids, segments, seed``; a row per sample where
    ``num_return_sequences`` is more than 1. A row that fails has its reason in ``error``, which is null in others, and
    costs no other row. ValueError and TypeError are for what is wrong with every row.

    Examples
    --------
    >>> import ray  # doctest: +SKIP
    >>> from ray.data import ActorPoolStrategy
    >>> from stars_fast import StarsConfig
    >>> from stars_fast.scale import StarsBatch
    >>> rows = ray.data.read_parquet("s3://bucket/prompts")  # columns id and prompt
    >>> rows = rows.map_batches(
    ...     StarsBatch,
    ...     fn_constructor_kwargs={
    ...         "policy": "org/policy",
    ...         "reward": "org/reward",
    ...         "config": StarsConfig(max_new_tokens=256, target_reward=2.0),
    ...     },
    ...     batch_size=64,
    ...     batch_format="pyarrow",
    ...     num_gpus=1,
    ...     compute=ActorPoolStrategy(size=8, max_concurrent_calls_per_actor=2, enable_true_multi_threading=True),
    ... )
    >>> rows.write_parquet("s3://bucket/answers")
    """

    def __init__(
        self,
        policy: str,
        reward: Any,
        config: StarsConfig | None = None,
        *,
        seed: int = 0,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **engine: Any,
    ) -> None:
        self.engine = StarsEngine(policy, reward, **engine)
        self.config = config or StarsConfig()
        self.seed = seed
        self.chat_template_kwargs = chat_template_kwargs

    def __call__(self, batch: Any) -> pa.Table:
        import pyarrow as pa

        table = _as_table(batch)
        if "id" not in table.column_names or table["id"].null_count:
            raise ValueError("rows need an id: give every row of column 'id' a text or an integer of its own")
        given = table.select([name for name in _READ if name in table.column_names]).to_pylist()
        rows = list(each_row((json.dumps(_spoken(row)) for row in given), self.seed, {}, "the batch"))
        records = complete(self.engine, rows, self.config, self.chat_template_kwargs)
        places = [place for place, samples in enumerate(records) for _ in samples]
        flat = [record for samples in records for record in samples]
        table = table.take(pa.array(places, pa.int64()))
        for name, kind in _written().items():
            column = pa.array([record[name] for record in flat], kind)
            if name in table.column_names:
                table = table.drop_columns([name])
            table = table.append_column(name, column)
        return table


def complete(
    engine: StarsEngine, rows: Sequence[Row], config: StarsConfig, chat_template_kwargs: Mapping[str, Any] | None = None
) -> list[Records]:
    """Records of rows, in their order, a list of samples each."""
    told = Progress(config.chosen_method)
    finished = finished_rows(engine, rows, config, max(1, len(rows)), told, chat_template_kwargs)
    found = {records[0]["id"]: records for records in finished}
    return [found[row.id] for row in rows]


def _spoken(value: Any) -> Any:
    """Without the keys that Arrow gives all messages of a table since one of them has it; pictures as data URLs."""
    if isinstance(value, dict) and value.keys() == {"bytes", "path"}:  # as data sets of the hub have pictures
        value = value["path"] if value["bytes"] is None else value["bytes"]
    if isinstance(value, bytes):
        return f"data:image/*;base64,{base64.b64encode(value).decode()}"
    if isinstance(value, dict):
        return {name: _spoken(one) for name, one in value.items() if one is not None}
    return [_spoken(one) for one in value] if isinstance(value, list) else value


def _as_table(batch: Any) -> pa.Table:
    import pyarrow as pa

    if isinstance(batch, pa.Table):
        return batch
    if isinstance(batch, Mapping):
        return pa.table({name: pa.array(column.tolist()) for name, column in batch.items()})
    return pa.Table.from_pandas(batch, preserve_index=False)


def _written() -> dict[str, pa.DataType]:
    """Columns and their types: a batch in which nothing failed must not differ from one in which something did."""
    import pyarrow as pa

    segment = {
        "tokens": pa.int64(),
        "reward": pa.float64(),
        "threshold": pa.float64(),
        "attempts": pa.int64(),
        "accepted": pa.bool_(),
    }
    return {
        "sample": pa.int64(),
        "completion": pa.string(),
        "reward": pa.float64(),
        "finish_reason": pa.string(),
        "error": pa.string(),
        "tokens": pa.int64(),
        "completion_ids": pa.list_(pa.int64()),
        "segments": pa.list_(pa.struct(segment)),
        "seed": pa.int64(),
    }

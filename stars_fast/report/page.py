"""A trace as a page: one file that shows itself, with nothing fetched."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent / "trace_page"
_SETTINGS = ("method", "loop", "settings", "seed", "target", "beta")
_KEPT = ("row", "sample_index", "prompt_text", "reward", "finish_reason", "error", *_SETTINGS)


def page(runs: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]) -> str:
    """HTML of one run, or of two to compare: their names, and their records as ``load_trace`` reads them."""
    data = {"runs": [_run(name, records) for name, records in runs]}
    # In a script element nothing but "<" can end it, or begin a comment; in a JSON string it can be written otherwise.
    written = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    pieces = {"data": written, **{end: (_FOLDER / f"page.{end}").read_text("utf-8") for end in ("css", "js")}}
    pieces["digest"] = b64encode(sha256(pieces["js"].encode()).digest()).decode()  # the one script that may run
    # In one go, so that what stands in a text is never taken for a place of the template.
    return re.sub(r"\{\{(\w+)\}\}", lambda place: pieces[place[1]], (_FOLDER / "page.html").read_text("utf-8"))


def _run(name: str, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"name": name, "settings": records[0]["settings"], "answers": [_answer(record) for record in records]}


def _answer(record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **{name: record[name] for name in _KEPT},
        **({"prompt_ids": record["prompt_ids"]} if record["prompt_text"] is None else {}),
        "segments": [
            {**_light(one), "candidates": [_light(candidate) for candidate in one["candidates"]]}
            for one in record["segments"]
        ],
        "unfinished": [_light(one) for one in record["unfinished"]],
    }


def _light(one: Mapping[str, Any]) -> dict[str, Any]:
    """Without the ids, where there is text."""
    kept = {name: value for name, value in one.items() if name != "tokens" or one["text"] is None}
    return {**kept, "count": len(one["tokens"])}

"""README's table of GPU figures: from the newest record in ``benchmarks/results``, beside the roofline's expectation.

python benchmarks/readme_table.py            # prints the table
python benchmarks/readme_table.py --write    # puts it into README.md
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.roofline import GPUS, Gpu, ModelCost, Workload, best_candidates, gpu_called  # noqa: E402

BEGIN, END = "<!-- benchmarks/readme_table.py -->", "<!-- end -->"
_PAIRS = {"llama-2-7b": "Llama-2-7B", "qwen2.5-7b": "Qwen2.5-7B"}
_ACCEPTANCES = (0.15, 0.3, 0.5)
_BATCH, _SEGMENT = 64, 16
_LEAST_BEATS = 3  # steady heartbeats of a figure


def newest(folder: Path = ROOT / "benchmarks" / "results") -> dict[str, Any] | None:
    """The latest record of ``benchmarks/gpu.py`` on a GPU, or None."""
    records = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    records = [record for record in records if record.get("machine", {}).get("gpu") and not record.get("tiny")]
    return max(records, key=lambda record: record["date"], default=None)


def gpu_of(record: dict[str, Any] | None) -> Gpu:
    """The data sheet of the GPU that a record is from; an H200's where there is none."""
    return (record and gpu_called(record["machine"]["gpu"])) or GPUS["h200"]


def expected(pair: str, acceptance: float, gpu: Gpu = GPUS["h200"]) -> float:
    """Accepted tokens/s of a good implementation, by the roofline."""
    costs = ModelCost.named(pair, "policy"), ModelCost.named("llama-2-7b-reward", "reward")
    workload = Workload(batch=_BATCH, segment=_SEGMENT, acceptance=acceptance)
    return best_candidates(*costs, workload, gpu).tokens_per_second


def measured(record: dict[str, Any] | None, pair: str, acceptance: float) -> list[str]:
    """Cells: accepted tokens/s, and times ``strong``, ``plain`` and one candidate; of the run's best row."""
    rows = [row for entry in (record or {"parts": {}})["parts"].values() for row in entry["rows"]]
    rows = [row for row in rows if row.get("pair") == pair and row.get("segment") == _SEGMENT]

    def of(kind: str, batch: int, **fields: Any) -> float | None:
        found = [
            at_acceptance(row, acceptance)
            for row in rows
            if row["kind"] == kind and row["batch"] == batch and row.get("wanted", acceptance) == acceptance
            if row.get("beats", _LEAST_BEATS) >= _LEAST_BEATS
            and all(row.get(name) == value for name, value in fields.items())
        ]
        return max(found, default=None)

    rate = of("engine", _BATCH)
    if rate is None:
        return ["not measured yet", "", "", ""]
    others = [of("strong", _BATCH), of("plain", 1), of("engine", _BATCH, candidates=1)]
    return [f"{rate:,.0f}", *("" if other is None else f"{rate / other:.3g}x" for other in others)]


def at_acceptance(row: dict[str, Any], acceptance: float) -> float:
    """Tokens/s that the row's heartbeats make at an acceptance near the one they had, of steady heartbeats.

    ``batch K (1 - (1 - a)^M) / seconds``, as a segment is committed where one of M candidates is accepted. Of others
    (``plain`` is at the wanted acceptance already, ``strong`` runs to the end) what they say.
    """
    if "rows" not in row:
        return float(row["tokens_per_second"])
    candidates = row["rows"] / row["batch"]
    return row["batch"] * row["segment"] * (1 - (1 - acceptance) ** candidates) / (row["milliseconds"] / 1e3)


def table(record: dict[str, Any] | None) -> str:
    """Markdown, with the machine and date of the record."""
    source, gpu = "No run yet.", gpu_of(record)
    name_of_gpu = gpu.name.split("-")[0].upper()
    if record is not None:
        machine = record["machine"]
        source = f"Measured {record['date'][:10]} on {machine['gpu']}, torch {machine['torch']}."
    lines = [
        f"{source} Accepted tokens per second at batch {_BATCH}, segments of {_SEGMENT}, bfloat16, a 7B reward model; "
        "of steady heartbeats, at the wanted acceptance:",
        "",
        f"| policy | wanted acceptance | roofline, {name_of_gpu} | measured | x strong | x plain | x one candidate |",
        "|---|---|---|---|---|---|---|",
    ]
    for pair, name in _PAIRS.items():
        for acceptance in _ACCEPTANCES:
            cells = [name, f"{acceptance:.0%}", f"{expected(pair, acceptance, gpu):,.0f}"]
            lines.append("| " + " | ".join([*cells, *measured(record, pair, acceptance)]) + " |")
    return "\n".join(lines)


def with_table(readme: str, content: str) -> str:
    """``readme`` with what stands between the marks replaced."""
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{content}\n{END}{rest.split(END, 1)[1]}"


if __name__ == "__main__":
    text = table(newest())
    print(text)
    if "--write" in sys.argv[1:]:
        readme = ROOT / "README.md"
        readme.write_text(with_table(readme.read_text(), text))

"""Pages say what was measured, and no more; what they show can be typed."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import pages

README = Path(__file__).resolve().parents[1] / "README.md"
PAGES = [README, *sorted((README.parent / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_of_a_page_is_valid(page):
    for block in re.findall(r"```python.*?\n(.*?)```", page.read_text(), re.S):
        compile(block, str(page), "exec")


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: page.name)
def test_tables_are_what_the_newest_records_give(page):
    text = page.read_text()
    assert "<!-- benchmarks/pages.py: " in text
    assert pages.filled(text, pages.records()) == text


def row(kind, batch, rate, **fields):
    return {"kind": kind, "pair": "llama-2-7b", "batch": batch, "segment": 16, "tokens_per_second": rate, **fields}


def engine(batch, **fields):
    beats = {"rows": 64.0, "milliseconds": 128.0, "median_milliseconds": 120.0, "context": 256.0}
    return row("engine", batch, 9999.0, **{"wanted": 0.3, "candidates": "auto", "beats": 9, **beats, **fields})


def test_measured_figures_stand_beside_what_is_expected(tmp_path):
    rows = [
        {"kind": "rates", "copy": 4e12, "matrix": 8e14},
        engine(64),
        engine(64, candidates=1, milliseconds=256.0),
        engine(64, candidates=3, beats=0),
        engine(16, candidates=3),
        row("strong", 64, 300.0, wanted=0.3),
        row("plain", 1, 12.0, wanted=0.3),
    ]
    record = {"date": "2027-01-02T03:04", "machine": {"gpu": "Some GPU", "torch": "2.11"}, "tiny": False}
    parts = {"parts": {"heartbeats": {"rows": rows}}}
    (tmp_path / "one.json").write_text(json.dumps(record | parts))
    (tmp_path / "older.json").write_text(json.dumps(record | parts | {"date": "2026-01-01T00:00"}))
    (tmp_path / "tiny.json").write_text(json.dumps(record | parts | {"date": "2028-01-01T00:00", "tiny": True}))
    found = pages.records(tmp_path)
    assert [one["date"][:4] for one in found] == ["2027", "2026"]
    lines = pages.rates(found).splitlines()
    assert lines[0].startswith("Measured 2027-01-02, Some GPU, torch 2.11.")
    (line,) = [line for line in lines if line.startswith("| Llama-2-7B | 30%")]
    told = pages.steady(found[0], rows[1])
    assert told["floor"] < told["expected"] < 128
    cells = f"| 1 | 128 | {told['expected']:.0f} | {told['floor']:.0f} | 2,400 | 8x | 200x | 2x |"
    assert line.endswith(cells)
    assert [line for line in lines if "not measured yet" in line and line.startswith("| Llama-2-7B | 15%")]


def test_verdicts_and_profiles_of_a_record_become_tables():
    verdict = {"what": "a step", "predicted": 2.0, "unit": "ms", "bound": "at most", "verdict": "refuted"}
    classes = {"product": {"milliseconds": [3.0, 2.0, 4.0], "count": 7}}
    profile = {"kind": "profile", "what": "step", "groups": 64, "candidates": 3, "classes": classes, "top": []}
    profile |= {"milliseconds": [5.0, 5.0, 5.0], "busy_milliseconds": [3.0, 4.5, 4.0]}
    record = {
        "date": "2027-01-02T03:04",
        "machine": {"gpu": "Some GPU", "torch": "2.11"},
        "parts": {"step-profile": {"rows": [profile]}},
        "verdicts": {"H3": verdict | {"measured": 3.0, "spread": 0.5}, "H4": verdict | {"verdict": "not measured"}},
    }
    assert pages.verdicts([record]).splitlines()[-2:] == [
        "| H3 | a step | at most 2 ms | 3 | 0.5 | refuted |",
        "| H4 | a step | at most 2 ms |  |  | not measured |",
    ]
    assert pages.kernels([record]).splitlines()[-2:] == [
        "| step 64 x 3 | product | 3.00 | 7 |  |  |",
        "| step 64 x 3 | none: the device waits | 1.00 |  |  |  |",
    ]

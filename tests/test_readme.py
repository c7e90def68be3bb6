"""README says what was measured, and no more; what it and the other pages show can be typed."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import readme_table

README = Path(__file__).resolve().parents[1] / "README.md"
PAGES = [README, *sorted((README.parent / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_of_a_page_is_valid(page):
    for block in re.findall(r"```python.*?\n(.*?)```", page.read_text(), re.S):
        compile(block, str(page), "exec")


def test_the_table_is_what_the_newest_record_gives():
    text = README.read_text()
    assert readme_table.with_table(text, readme_table.table(readme_table.newest())) == text


def row(kind, batch, rate, **fields):
    return {"kind": kind, "pair": "llama-2-7b", "batch": batch, "segment": 16, "tokens_per_second": rate, **fields}


def test_measured_figures_stand_beside_what_is_expected(tmp_path):
    rows = [
        row("engine", 64, 9999.0, wanted=0.3, candidates="auto", beats=9, rows=64.0, milliseconds=128.0),
        row("engine", 64, 2000.0, wanted=0.3, candidates=1, beats=9),
        row("engine", 64, 9999.0, wanted=0.3, candidates=3, beats=0),
        row("engine", 16, 9999.0, wanted=0.3, candidates=3, beats=9),
        row("strong", 64, 300.0, wanted=0.3),
        row("plain", 1, 12.0, wanted=0.3),
    ]
    record = {"date": "2027-01-02T03:04", "machine": {"gpu": "Some GPU", "torch": "2.11"}, "tiny": False}
    parts = {"parts": {"llama-2-7b": {"rows": rows}}}
    (tmp_path / "one.json").write_text(json.dumps(record | parts))
    (tmp_path / "older.json").write_text(json.dumps(record | parts | {"date": "2026-01-01T00:00"}))
    (tmp_path / "tiny.json").write_text(json.dumps(record | parts | {"date": "2028-01-01T00:00", "tiny": True}))
    newest = readme_table.newest(tmp_path)
    assert newest["date"].startswith("2027")
    lines = readme_table.table(newest).splitlines()
    assert lines[0].startswith("Measured 2027-01-02 on Some GPU, torch 2.11.")
    (line,) = [line for line in lines if line.startswith("| Llama-2-7B | 30%")]
    assert line.endswith("| 2,400 | 8x | 200x | 1.2x |")
    assert [line for line in lines if "not measured yet" in line and line.startswith("| Llama-2-7B | 15%")]

"""Parts of a long measurement, one after another: time, failures, and a record that is never lost.

The record is one JSON file, written after every figure. A part that raises is recorded and the next one runs. A part
that takes the process or the device with it (a crash, an illegal memory access, which no later call survives) ends this
process only: started again on the same record, it goes on with the parts behind.
"""

from __future__ import annotations

import json
import os
import sysconfig
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu_parts.hypotheses import judged, line

DEVICE_BROKEN = 75  # exit status: start me again
_PATIENCE = 45.0  # seconds; of a part that has had its time, for the measurement that it is in
_LONGEST_START = 120.0  # seconds; of what a part makes for itself and for those behind it


class Part(NamedTuple):
    """Something to measure; the docstring of ``run`` says what."""

    name: str
    seconds: float  # estimate; a part should stop measuring when it has had half as much again
    run: Callable[[Runner], None]
    needs_gpu: bool = False

    @property
    def about(self) -> str:
        """First line of the docstring."""
        return (self.run.__doc__ or self.name).strip().splitlines()[0]


@dataclass
class Record:
    """What is known so far, and the file that says so."""

    path: Path
    content: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path) -> Record:
        """The record in that file, or an empty one."""
        return cls(path, json.loads(path.read_text()) if path.exists() else {"parts": {}})

    def save(self) -> None:
        """Replace the file in one move: a kill leaves the old one or the new one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text(json.dumps(self.content, indent=1, default=str) + "\n")
        os.replace(partial, self.path)

    def bury(self, cause: str) -> None:
        """A part that is still running here was running when its process ended."""
        for entry in self.content["parts"].values():
            if entry["status"] == "running":
                entry.update(status="failed", error=cause, seconds=time.time() - entry["started"])
                self.save()

    def overdue(self) -> str:
        """The part that runs far longer than it should: some kernel or lock keeps it. Empty where all is well."""
        for name, entry in self.content["parts"].items():
            allowed = 1.5 * entry["estimate"] + entry.get("start_seconds", 0.0) + _PATIENCE
            if entry["status"] == "running" and time.time() > entry["started"] + allowed:
                return str(name)
        return ""


class Runner:
    """Runs parts that the record does not hold until the time is up: nothing is started after ``ends``, of
    ``time.time()``. With ``tiny``, toy models and few figures; ``pair`` names the models.
    """

    def __init__(self, record: Record, ends: float, device: Any, tiny: bool, pair: str = "llama-2-7b") -> None:
        self.record, self.ends, self.device, self.tiny, self.pair = record, ends, device, tiny, pair
        self.shared: dict[str, Any] = {}  # what one part makes and others use
        self._part_ends = ends
        self._entry: dict[str, Any] = {}
        self._rows: list[dict[str, Any]] = []

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def left(self) -> float:
        """Seconds this part may still take."""
        return min(self.ends, self._part_ends) - time.time()

    def time_for(self, seconds: float) -> bool:
        """Whether a measurement of about so many seconds should be started; of a toy model it takes hardly any."""
        if self.left() >= (0 if self.tiny else seconds):
            return True
        self.say(f"    no time left for a measurement of {seconds:.0f} s")
        self._rows.append({"kind": "left_out", "seconds": seconds})
        return False

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What one part makes and others use. It takes nothing of the time of the part that happens to be the first to
        ask, which would otherwise be over before anything is measured.
        """
        if name not in self.shared:
            started, before = time.time(), self._entry.get("start_seconds", 0.0)
            self._entry["start_seconds"] = before + _LONGEST_START
            self.record.save()
            try:
                self.shared[name] = make()
            finally:
                spent = time.time() - started
                self._entry["start_seconds"] = before + spent
                self._part_ends += spent
        return self.shared[name]

    def add(self, kind: str, **figures: Any) -> dict[str, Any]:
        """Write one measurement down."""
        row = {"kind": kind, **figures}
        self._rows.append(row)
        self.record.save()
        brief = (f"{name} {_short(value)}" for name, value in figures.items() if not isinstance(value, (list, dict)))
        self.say(f"    {kind}: " + ", ".join(brief))
        return row

    @contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """Record an error inside and let the part go on, unless the device is broken."""
        try:
            yield
        except Exception as error:
            if not self._device_works():
                raise
            self.say(traceback.format_exc())
            self.add("error", what=what, error=repr(error)[:500], traceback=_without_folders().splitlines())

    def rows(self, kind: str) -> list[dict[str, Any]]:
        """Measurements of this kind by all parts so far."""
        return [r for entry in self.record.content["parts"].values() for r in entry["rows"] if r["kind"] == kind]

    def say(self, line: str) -> None:
        print(line, flush=True)

    def run(self, parts: Iterable[Part]) -> bool:
        """Run what is not in the record yet. False where the device is broken and the process must end."""
        for part in parts:
            if part.name in self.record.content["parts"]:
                continue
            entry: dict[str, Any] = {"status": "running", "started": time.time(), "estimate": part.seconds}
            entry |= {"seconds": 0.0, "rows": []}
            self.record.content["parts"][part.name] = entry
            self._entry, self._rows = entry, entry["rows"]
            self._part_ends = min(self.ends, time.time() + 1.5 * part.seconds)
            reason = self._reason_to_skip(part)
            if reason:
                entry.update(status="skipped", error=reason)
                self.say(f"{part.name}: skipped, {reason}")
                self.judge(part.name)
                continue
            self.record.save()
            self.say(f"{part.name}: {part.about} (about {part.seconds:.0f} s; {self.ends - time.time():.0f} s left)")
            started = time.time()
            try:
                part.run(self)
                errors = [row["error"] for row in self._rows if row["kind"] == "error"]
                entry.update(status="failed", error=errors[-1]) if errors else entry.update(status="done")
            except Exception:
                entry.update(status="failed", error=_without_folders())
                self.say(entry["error"])
                self.shared.clear()  # an engine that was interrupted, models that fill the memory
            entry["seconds"] = time.time() - started
            self.judge(part.name)
            if not self._device_works():
                return False
        return True

    def judge(self, part: str) -> None:
        """Say and write down what the part's figures make of what was predicted of them."""
        found = judged(self.record.content, part)
        self.record.content.setdefault("verdicts", {}).update(found)
        self.record.save()
        for told in found.values():
            self.say(line(told))

    def _reason_to_skip(self, part: Part) -> str:
        if part.needs_gpu and not self.on_gpu:
            return "it needs a GPU"
        if self.ends - time.time() < min(10.0, 0.25 * part.seconds):
            return "no time left"
        return ""

    def _device_works(self) -> bool:
        if not self.on_gpu:
            return True
        import torch

        try:
            torch.cuda.synchronize()
            torch.ones(8, device=self.device).sum().item()
        except RuntimeError:
            return False
        return True


def _without_folders() -> str:
    """The traceback of the error being handled; where a checkout and its environment lie is nobody's business."""
    text = traceback.format_exc()
    for folder in (Path(__file__).resolve().parents[2], sysconfig.get_path("purelib")):
        text = text.replace(f"{folder}/", "")
    return text


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).strip()[:80]

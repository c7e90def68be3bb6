"""Draw docs/trace.png: the page of ``stars-fast trace --html`` for a run of the demonstration models.

    python examples/trace_picture.py

Needs chromium. Texts are the same everywhere but for rounding; letters are those of the fonts at hand.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

from stars_fast import StarsConfig, StarsEngine, demo
from stars_fast.report.page import page
from stars_fast.report.trace import load_trace

CONFIG = StarsConfig(max_new_tokens=96, top_k=50, candidates=4)
SIZE = "1240,890"  # CSS pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs" / "trace.png")
    parser.add_argument("--show", default="3.2", help="answer and segment that are open")
    options = parser.parse_args()
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("no chromium: it makes the picture")
    engine = StarsEngine(demo.NAME, demo.NAME, device="cpu")
    output = engine.generate(list(demo.PROMPTS), CONFIG, seed=0, trace=True)
    with TemporaryDirectory() as folder:
        trace, html = Path(folder, "reviews.jsonl"), Path(folder, "reviews.html")
        output.save_trace(trace)
        text = page([(trace.name, load_trace(trace))]).replace("</style>", "footer { display: none; }</style>", 1)
        html.write_text(text, "utf-8")
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={SIZE}"]
        target = f"{html.as_uri()}#{options.show}"
        subprocess.run([*command, f"--screenshot={options.output.resolve()}", target], check=True, capture_output=True)
    print(f"written to {options.output}, {options.output.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
